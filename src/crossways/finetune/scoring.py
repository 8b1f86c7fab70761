"""Perplexity of answers given their instructions.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.perplexity import Likelihood, score_batches
from crossways.finetune.examples import Example
from crossways.training.windows import IGNORED


def score_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
    causal: bool = False,
) -> Likelihood:
    """Negative log-likelihood of the completions, end-of-text token included; prompts are context.

    Args:
        model: of crossways or transformers, rerouted or not.
        tokenizer: with an end-of-text token.
        examples: prompts and completions.
        max_length: tokens kept of each, from the front.
        batch_size: examples in a forward pass.
        causal: route by the decode twins.

    Raises:
        UserError: if no completion begins within `max_length`.
    """
    encoded = [pair for pair in (encode(tokenizer, example, max_length) for example in examples) if pair]
    if not encoded:
        raise UserError(f"no answer begins within max_length={max_length} tokens")
    return score_batches(model, _batches(encoded, batch_size, pad_id=tokenizer.eos_token_id), causal=causal)


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int
) -> tuple[list[int], list[int]] | None:
    """Token ids and labels of an example, as TRL makes them of a prompt and a completion; None if nothing of the
    completion is left within `max_length`."""
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = tokenizer(example.prompt + example.completion)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    start = len(prompt) - 1 if prompt and prompt[-1] == tokenizer.eos_token_id else len(prompt)
    ids = ids[:max_length]
    return (ids, [IGNORED] * start + ids[start:]) if len(ids) > start else None


def _batches(encoded: Sequence[tuple[list[int], list[int]]], size: int, pad_id: int) -> Iterator[dict[str, Tensor]]:
    ordered = sorted(encoded, key=lambda pair: -len(pair[0]))
    for first in range(0, len(ordered), size):
        rows = ordered[first : first + size]
        longest = len(rows[0][0])
        yield {
            "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
        }
