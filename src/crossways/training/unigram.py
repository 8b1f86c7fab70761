"""The floor that a language model must beat: predicting every token by its frequency, without context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class UnigramScore:
    """What an add-one smoothed unigram model reaches on validation documents."""

    bits_per_byte: float
    """Bits to code the documents, per UTF-8 byte."""
    perplexity: float
    """Per token."""


def unigram_bits_per_byte(
    train_token_counts: np.ndarray,
    token_ids_per_document: Iterable[Sequence[int]],
    bytes_per_document: Iterable[int],
) -> UnigramScore:
    """Score documents by p(token) = (count + 1) / (total + V), the counts being those of the training text.

    Args:
        train_token_counts: integers (V,), V the vocabulary size.
        token_ids_per_document: token ids of each validation document, without special tokens.
        bytes_per_document: UTF-8 length of each document's text.

    Raises:
        ValueError: no tokens or no bytes to score, or lists of unequal length.
    """
    counts = np.asarray(train_token_counts, dtype=np.float64)
    nats = np.log(counts.sum() + len(counts)) - np.log(counts + 1)
    total = 0.0
    num_tokens = num_bytes = 0
    for ids, length in zip(token_ids_per_document, bytes_per_document, strict=True):
        total += float(nats[np.asarray(ids, dtype=np.int64)].sum())
        num_tokens, num_bytes = num_tokens + len(ids), num_bytes + length
    if not num_tokens or not num_bytes:
        raise ValueError(f"nothing to score: {num_tokens} tokens, {num_bytes} bytes")
    return UnigramScore(float(total / np.log(2) / num_bytes), float(np.exp(total / num_tokens)))
