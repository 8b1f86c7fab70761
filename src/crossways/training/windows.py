"""Windows to evaluate on: every token of every document scored exactly once, never across a document
boundary.

The protocol. A document is preceded by one end-of-text token, as in training, and scored by itself. A window
holds at most `window` tokens and the next one starts `stride` later; a token is scored by the first window
that can, so it sees all of its document's preceding tokens up to the start of that window. Because a window's
first token is context and never scored, a stride of `window` is carried out as `window - 1`: neighbouring
windows then share that one token, which is context in the second. Bits per byte = total negative
log-likelihood / ln 2 / UTF-8 bytes of the scored documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crossways.errors import UserError

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True, eq=False)
class EvalWindow:
    """Consecutive tokens of one document, the first `context` of which are not scored."""

    input_ids: np.ndarray
    """int64 (tokens,), at most `window`."""
    context: int
    """Tokens that only give context, at least one."""

    @property
    def labels(self) -> np.ndarray:
        """`input_ids` where scored, -100 elsewhere, int64 (tokens,); unshifted: position i predicts label i +
        1."""
        labels = self.input_ids.copy()
        labels[: self.context] = IGNORED
        return labels


@dataclass(frozen=True, eq=False)
class EvaluationWindows:
    """The windows of a set of documents, and what they add up to."""

    windows: list[EvalWindow]
    num_documents: int
    """Documents scored: the first ones given."""
    num_tokens: int
    """Tokens scored, each once; the denominator of perplexity per token."""
    num_bytes: int
    """UTF-8 bytes of the scored documents; the denominator of bits per byte."""


def evaluation_windows(
    token_ids_per_document: Iterable[Sequence[int]],
    bytes_per_document: Iterable[int],
    window: int,
    stride: int,
    bos_id: int,
    max_tokens: int | None = None,
) -> EvaluationWindows:
    """Cut documents into windows that score each token once.

    Args:
        token_ids_per_document: token ids of each document, without special tokens.
        bytes_per_document: UTF-8 length of each document's text.
        window: most tokens in a window, context included, >= 2.
        stride: tokens from one window's start to the next one's, 1 to `window`; smaller gives more context
            and takes proportionally longer.
        bos_id: the token before each document; the end-of-text token if that is what preceded documents in
            training.
        max_tokens: stop before the first document that would make it more; the first document is always
            scored.

    Raises:
        UserError: sizes out of range.
        ValueError: lists of unequal length, no tokens at all.
    """
    if window < 2 or not 1 <= stride <= window:
        raise UserError(f"need window >= 2 and 1 <= stride <= window, got window={window}, stride={stride}")
    windows: list[EvalWindow] = []
    num_documents = num_tokens = num_bytes = 0
    for ids, length in zip(token_ids_per_document, bytes_per_document, strict=True):
        if num_tokens and max_tokens is not None and num_tokens + len(ids) > max_tokens:
            break
        tokens = np.concatenate([[bos_id], np.asarray(ids, dtype=np.int64)]).astype(np.int64)
        windows += _document_windows(tokens, window, min(stride, window - 1))
        num_documents, num_tokens, num_bytes = num_documents + 1, num_tokens + len(ids), num_bytes + length
    if not num_tokens:
        raise ValueError(f"nothing to evaluate: {num_documents} documents without a token")
    return EvaluationWindows(windows, num_documents, num_tokens, num_bytes)


def _document_windows(tokens: np.ndarray, window: int, stride: int) -> Iterator[EvalWindow]:
    """`tokens` starts with the context token; positions 1 to the end are scored."""
    start, scored = 0, 1
    while scored < len(tokens):
        end = min(start + window, len(tokens))
        yield EvalWindow(tokens[start:end], context=scored - start)
        start, scored = start + stride, end


def batch_windows(windows: Sequence[EvalWindow], batch_size: int, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """Batches for a model, longest windows first so that little is padded and memory runs out at once or
    never.

    The order depends on lengths only (ties keep theirs), hence is the same in every run.

    Args:
        windows: what `evaluation_windows` made.
        batch_size: most windows in a batch, >= 1.
        pad_id: fills rows on the right; masked and never scored, so any valid id does.

    Yields:
        `input_ids`, `attention_mask` (1 for tokens, 0 for padding) and `labels` (-100 where not scored; the
        model shifts), all int64 (windows in the batch, longest of them).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    ordered = sorted(windows, key=lambda item: -len(item.input_ids))
    for start in range(0, len(ordered), batch_size):
        yield _pad(ordered[start : start + batch_size], pad_id)


def _pad(windows: Sequence[EvalWindow], pad_id: int) -> dict[str, Tensor]:
    shape = (len(windows), max(len(item.input_ids) for item in windows))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
    }
    for row, item in enumerate(windows):
        length = len(item.input_ids)
        batch["input_ids"][row, :length] = torch.from_numpy(item.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = torch.from_numpy(item.labels)
    return batch
