"""Whole documents as batches under a protocol, for calibration and tuning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crossways.evaluation.settings import EvaluationSettings
from crossways.training.corpus import utf8_length
from crossways.training.tokenizer import encode_documents
from crossways.training.windows import batch_windows, evaluation_windows


def documents_batches(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationSettings,
    max_tokens: int | None,
) -> list[dict[str, Tensor]]:
    """Batches that score whole documents under a protocol, up to `max_tokens` tokens."""
    windows = evaluation_windows(
        encode_documents(tokenizer, documents),
        map(utf8_length, documents),
        protocol.window,
        protocol.stride or protocol.window,
        tokenizer.eos_token_id,
        max_tokens,
    )
    return list(batch_windows(windows.windows, protocol.batch_size, pad_id=tokenizer.eos_token_id))
