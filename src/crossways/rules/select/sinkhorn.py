"""Sinkhorn: token choice on scores that were scaled so that all experts are in equal demand.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import budgeted, routing
from crossways.rules.select.base import Selection, check_budget, check_number, check_whole
from crossways.rules.select.top_k import TopK

Group = Literal["sequence", "batch"]


@dataclass(frozen=True)
class Sinkhorn(Selection):
    """S_t = the k best entries of row t of diag(a) exp(W x) diag(b), where a and b make every row sum to 1/n and
    every column to 1/E (Sinkhorn's iteration for entropic optimal transport; S-BASE, Clark et al. 2022, arXiv
    2202.01169; the stop when the mean change of b falls below 1e-4 is Megatron-LM's).

    Chooses by the logits; weights are the raw scores and carry all gradient (Megatron: `sigmoid` for k = 1, `softmax`
    otherwise). Loads are nearly, not exactly, equal. Every token of a group shifts b, so the decode twin is top-k,
    which Megatron uses outside training.
    """

    name: ClassVar[str] = "sinkhorn"
    chooses_by = "logits"
    causal = False
    exact_budget = True

    k: int = 1
    """Experts per token, 1 to E; usually 1 or 2."""
    group: Group = "sequence"
    """Tokens among which demand is equal: those of one `sequence`, or of the whole `batch` as in the sources."""
    tolerance: float = 1e-4
    """Stop when the mean change of the column scales falls below this, above 0; 1e-4 in Megatron."""
    max_iterations: int = 100
    """Stop in any case after this many iterations, at least 1; 3 to 100."""

    def __post_init__(self) -> None:
        for field in ("k", "max_iterations"):
            object.__setattr__(self, field, check_whole(self.name, field, getattr(self, field)))
        check_number(self.name, "tolerance", self.tolerance)
        if not self.tolerance > 0:
            raise UserError(f"selection 'sinkhorn': tolerance must be above 0, got {self.tolerance}")
        if self.group not in get_args(Group):
            raise UserError(f"selection 'sinkhorn': group must be one of {get_args(Group)}, got {self.group!r}")

    @property
    def batch_invariant(self) -> bool:
        """Only the tokens of one row share demand under group `sequence`."""
        return self.group == "sequence"

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)

    def decode_twin(self) -> TopK:
        return TopK(self.k)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        groups = choice_BSE.shape[0] if self.group == "sequence" else 1
        if allowed_BSE is not None:
            choice_BSE = choice_BSE.masked_fill(~allowed_BSE, -torch.inf)
        valid_GN = None if allowed_BSE is None else allowed_BSE.any(-1).reshape(groups, -1)
        choice_GNE = choice_BSE if self.group == "sequence" else choice_BSE.reshape(1, -1, choice_BSE.shape[-1])
        if routing.fits(choice_GNE, allowed_BSE):
            limits = self.max_iterations, self.tolerance
            return Assignment.from_bits(
                budgeted.of_sinkhorn(choice_GNE, self.k, *limits, valid_GN, allowed_BSE), scores_BSE
            )
        balanced_GNE = self.balance(choice_GNE.detach(), valid_GN)
        return TopK(self.k)(balanced_GNE.view_as(choice_BSE), scores_BSE, allowed_BSE)

    @torch.compiler.disable(reason="the selection sinkhorn stops when it has converged, which a graph cannot know")
    def balance(self, logits_GNE: Tensor, valid_GN: Tensor | None = None) -> Tensor:
        """The scaled matrix, as wide as the logits (G, N, E), less its row scales, which change no token's order.

        Each group stops by itself, so that what one group holds cannot change another's number of iterations. All
        sums are in float64, so that in float32 the order of summation changes nothing: the C++ parts find the same.
        """
        if routing.fits(logits_GNE, valid_GN):
            return budgeted.sinkhorn(logits_GNE, valid_GN, self.max_iterations, self.tolerance)
        odd_GNE = logits_GNE.isnan() | (logits_GNE == torch.inf)
        lowest = torch.finfo(logits_GNE.dtype).min / 2
        logits64_GNE = logits_GNE.masked_fill(odd_GNE, lowest).clamp(min=lowest).double()
        # Row scales are fitted first, so that any factor of a row will do: with this one nothing overflows.
        power_GNE = (logits64_GNE - logits64_GNE.amax(-1, keepdim=True)).exp().to(logits_GNE.dtype)
        if valid_GN is None:
            valid_GN = torch.ones_like(logits_GNE[..., 0], dtype=torch.bool)
        mass_GNE = (power_GNE * valid_GN[..., None]).double()
        scale_GE = self._column_scales(mass_GNE, valid_GN.sum(-1, keepdim=True).clamp(min=1))
        balanced_GNE = mass_GNE.to(logits_GNE.dtype) * scale_GE[:, None].to(logits_GNE.dtype)
        return balanced_GNE.masked_fill_(odd_GNE, torch.inf)

    def _column_scales(self, mass_GNE: Tensor, rows_G1: Tensor) -> Tensor:
        """Of groups with so many valid tokens, (G, E)."""
        columns, tiny = mass_GNE.shape[-1], 1e-8
        scale_GE = mass_GNE.new_ones(mass_GNE.shape[0], columns)
        done_G1 = torch.zeros_like(rows_G1, dtype=torch.bool)
        for _ in range(self.max_iterations):
            row_GN = 1 / (rows_G1 * ((mass_GNE @ scale_GE[..., None])[..., 0] + tiny))
            new_GE = 1 / (columns * ((row_GN[:, None] @ mass_GNE)[:, 0] + tiny))
            change_G1 = (new_GE - scale_GE).abs().mean(-1, keepdim=True)
            scale_GE = torch.where(done_G1, scale_GE, new_GE)
            done_G1 = done_G1 | (change_G1 < self.tolerance)
            if bool(done_G1.all()):
                break
        return scale_GE
