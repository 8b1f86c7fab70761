"""The likelihood of every document of a text, and what was executed to get it.

Legend: B batch, S sequence, V vocabulary, W windows, D documents, L layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from crossways.evaluation.subject import subject_of
from crossways.tuning.texts import Text


@dataclass(frozen=True)
class Scored:
    """A text under one routing."""

    nats_D: tuple[float, ...]
    """Negative log-likelihood of each document."""
    tokens_D: tuple[int, ...]
    """Its scored tokens."""
    pairs_L: tuple[int, ...]
    """Executed pairs of each layer."""
    routed_tokens: int
    """Tokens that went through the model, context included, padding not."""

    @property
    def nats(self) -> float:
        """Per token."""
        return math.fsum(self.nats_D) / sum(self.tokens_D)

    @property
    def perplexity(self) -> float:
        """exp of `nats`; infinity where that overflows."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def executed_L(self) -> tuple[float, ...]:
        """Mean executed experts per token of each layer."""
        return tuple(pairs / self.routed_tokens for pairs in self.pairs_L)

    @property
    def budget(self) -> float:
        """Mean executed experts per token and layer."""
        return sum(self.executed_L) / len(self.pairs_L)


@torch.inference_mode()
def score_text(model: Any, text: Text, dtype: torch.dtype = torch.float32) -> Scored:
    """Score a text under the model's present routing; a rule that looks around does look.

    Args:
        model: rerouted, in evaluation mode.
        text: what to score.
        dtype: float32, or a 16-bit type to compute under autocast.

    Raises:
        ValueError: if nothing was recorded of the executed pairs.
    """
    subject = subject_of(model)
    nats_W: list[Tensor] = []
    pairs_L: list[int] = []
    routed = 0
    for batch in text.batches():
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            logits_BSV, load_LE = subject.run(batch, causal=False)
        nats_W.append(_nats_B(logits_BSV, batch["labels"]).cpu())
        seen_L = [int(load_E.sum()) for load_E in load_LE]
        pairs_L = [a + b for a, b in zip(pairs_L, seen_L, strict=True)] if pairs_L else seen_L
        routed += int(batch["attention_mask"].sum())
    if not pairs_L:
        raise ValueError("no executed pairs were recorded: the model is not routed, or its handle was undone")
    nats_D = np.zeros(len(text.token_D))
    np.add.at(nats_D, text.document_W, torch.cat(nats_W).numpy())
    return Scored(tuple(nats_D.tolist()), tuple(text.token_D.tolist()), tuple(pairs_L), routed)


def _nats_B(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Negative log-likelihood of each row, float64 (B,). One row at a time: float32 logits of a large vocabulary are
    the greatest tensor of all."""
    rows = [
        functional.cross_entropy(logits_SV[:-1].float(), labels_S[1:], ignore_index=-100, reduction="none")
        for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True)
    ]
    return torch.stack([row.double().sum() for row in rows])
