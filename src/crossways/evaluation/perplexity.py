"""Negative log-likelihood of windows under a model, with what was executed while scoring them.

Legend: B batch, S sequence, V vocabulary, R routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crossways.evaluation.subject import subject_of


@dataclass(frozen=True)
class Likelihood:
    """What scoring a set of windows gave."""

    nats: float
    """Total negative log-likelihood of the scored tokens."""
    tokens: int
    """Scored tokens."""
    routed_tokens: int
    """Tokens that went through the model, context included, padding not."""
    expert_load: tuple[Tensor, ...]
    """Executed pairs per expert, int64 (E,), for each of the R routers."""

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinity where that overflows."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Total bits over the UTF-8 bytes of the scored text: comparable across tokenizers."""
        return self.nats / math.log(2) / num_bytes

    @property
    def budget(self) -> float | None:
        """Mean experts executed per token and router; None for a dense model."""
        if not self.expert_load:
            return None
        pairs = sum(int(load_E.sum()) for load_E in self.expert_load)
        return pairs / (len(self.expert_load) * self.routed_tokens)


@torch.inference_mode()
def score_batches(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Likelihood:
    """Score batches of windows.

    Args:
        model: a causal language model of crossways or of transformers, rerouted or not; put in evaluation mode for
            the duration.
        batches: `input_ids`, `attention_mask` and `labels` (-100 where not scored), each int64 (B, S), as
            `crossways.training.windows.batch_windows` makes them.
        causal: route by the decode twins.
        dtype: float32, or a 16-bit type to compute under autocast. Log-probabilities are float32 in any case.
    """
    subject = subject_of(model)
    device, was_training = model.device, model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = routed = 0
    loads: list[Tensor] = []
    try:
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits_BSV, loads_R = subject.run(batch, causal=causal)
            nats += _nats(logits_BSV, batch["labels"])
            tokens += int((batch["labels"][:, 1:] != -100).sum())
            routed += int(batch["attention_mask"].sum())
            loads = [a + b for a, b in zip(loads, loads_R, strict=True)] if loads else loads_R
    finally:
        model.train(was_training)
    return Likelihood(float(nats), tokens, routed, tuple(load_E.cpu() for load_E in loads))


def _nats(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    loss_N = functional.cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1).float(), labels_BS[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return loss_N.double().sum()
