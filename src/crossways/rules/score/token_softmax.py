"""Softmax over the tokens: each expert shares one unit among the tokens that compete for it.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from crossways.errors import UserError
from crossways.rules.score.base import Score

Group = Literal["sequence", "batch"]


@dataclass(frozen=True)
class TokenSoftmax(Score):
    """v[t, e] = (n / E) exp(s[t, e]) / sum_t' exp(s[t', e]), over the n valid tokens of a group: the score of expert
    choice in USMoE's terms (arXiv 2503.22996v2, definition 3.2, f_t as a softmax over tokens; the authors' published
    code uses the sigmoid of `unified` and keeps variants of this only as comments).

    The factor n / E is ours: it makes v 1 / E at equal logits, the scale of a softmax over experts, whatever the
    length. Later tokens share the same unit, so the rule is not causal. Its twin replaces the sum by what it is in
    the mean, v = exp(s[t, e] - c[e]) / E with c[e] = log mean_t exp(s[t, e]), which the router estimates in training:
    the same function of the token's own logit, unlike a fallback to another score, and equal to it on a text long
    enough to show the mean. It is not bounded by n / E, as the sum no longer contains the token itself.
    """

    name: ClassVar[str] = "token_softmax"

    group: Group = "sequence"
    """The tokens that compete: those of one `sequence`, or of the whole `batch`."""

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise UserError(f"score {self.name!r}: group must be one of {get_args(Group)}, got {self.group!r}")

    @property
    def causal(self) -> bool:
        """Later tokens share an expert's unit."""
        return False

    @property
    def batch_invariant(self) -> bool:
        """Only the tokens of one row compete under group `sequence`."""
        return self.group == "sequence"

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        batch, _, num_experts = logits_BSE.shape
        groups = batch if self.group == "sequence" else 1
        mean_GE = log_mean_exp(logits_BSE, valid_BS, groups)
        logits_GNE = logits_BSE.reshape(groups, -1, num_experts)
        if valid_BS is not None:
            logits_GNE = logits_GNE.masked_fill(~valid_BS.reshape(groups, -1, 1), -torch.inf)
        return ((logits_GNE - mean_GE[:, None]).exp() / num_experts).view_as(logits_BSE)

    def decode_twin(self) -> Score:
        return RunningTokenSoftmax()

    def normaliser(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        mean_E = log_mean_exp(logits_BSE.detach(), valid_BS, groups=1)[0]
        return mean_E if valid_BS is None else torch.where(valid_BS.any(), mean_E, torch.nan)


@dataclass(frozen=True, eq=False)
class RunningTokenSoftmax(TokenSoftmax):
    """The decode twin of `TokenSoftmax`; see there."""

    causal = True
    batch_invariant = True

    value: Tensor | None = None
    """c, float32 (E,)."""

    def at(self, normaliser_E: Tensor) -> RunningTokenSoftmax:
        return replace(self, value=normaliser_E)

    def decode_twin(self) -> RunningTokenSoftmax:
        return self

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        if self.value is None:
            raise UserError("score 'token_softmax' has no running normaliser: train or calibrate the router first")
        return (logits_BSE - self.value).exp() / logits_BSE.shape[-1]


def log_mean_exp(logits_BSE: Tensor, valid_BS: Tensor | None, groups: int) -> Tensor:
    """log of the mean of exp(logits) over the valid tokens of each group, (G, E); zero for a group of padding."""
    logits_GNE = logits_BSE.reshape(groups, -1, logits_BSE.shape[-1])
    if valid_BS is None:
        return logits_GNE.logsumexp(1) - math.log(logits_GNE.shape[1])
    valid_GN1 = valid_BS.reshape(groups, -1, 1)
    count_G1 = valid_GN1.sum(1)
    # An empty group sums to log 0: keep it out of the gradient, where it would be NaN.
    usable_GN1 = valid_GN1 | (count_G1[:, None] == 0)
    sum_GE = torch.where(usable_GN1, logits_GNE, -torch.inf).logsumexp(1)
    return torch.where(count_G1 > 0, sum_GE - count_G1.clamp(min=1).log(), 0.0)
