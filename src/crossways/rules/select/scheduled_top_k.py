"""Token choice with a number of experts that grows (or shrinks) in the course of training.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rules.select.base import Selection, check_budget, check_number
from crossways.rules.select.top_k import TopK


@dataclass(frozen=True)
class ScheduledTopK(Selection):
    """Top-k with k going linearly from `k` to `k_end` over `steps` optimizer steps, rounded, and staying there
    (SMoE-Dropout, Chen et al. 2023, arXiv 2303.01610: a frozen random router, and k from few experts to all; the
    straight line is the default of the authors' code).

    Evaluation uses the k that training has reached, which is part of the checkpoint. Called by itself, without a
    model that counts, it is at the start.
    """

    name: ClassVar[str] = "scheduled_top_k"
    scheduled: ClassVar[bool] = True
    causal = True
    batch_invariant = True
    exact_budget = True

    k: int
    """Experts per token in the first step, 1 to E."""
    k_end: int
    """Experts per token after the schedule, 1 to E; all E in SMoE-Dropout."""
    steps: int
    """Optimizer steps from one to the other, at least 1 (training passes where neither our trainer nor its
    `OptimizerSteps` is used)."""

    def __post_init__(self) -> None:
        for field in ("k", "k_end", "steps"):
            value = getattr(self, field)
            check_number(self.name, field, value)
            if value < 1 or value % 1 != 0:
                raise UserError(f"selection {self.name!r}: {field} must be a whole number of at least 1, got {value}")
            object.__setattr__(self, field, int(value))

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)
        check_budget(self.name, self.k_end, num_experts)

    def at_step(self, step: int) -> TopK:
        done = min(step / self.steps, 1.0)
        return TopK(round(self.k + (self.k_end - self.k) * done))

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        return self.at_step(0)(choice_BSE, scores_BSE, allowed_BSE)
