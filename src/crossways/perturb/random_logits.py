"""Random logits in place of the router's: level or lopsided loads at will, for measuring speed.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crossways.errors import UserError
from crossways.perturb.base import ModelPerturbation, Stage
from crossways.perturb.noise import seeded
from crossways.routing import Decide, Perturbation, Routing
from crossways.sites import Site


@dataclass(frozen=True)
class RandomLogits(ModelPerturbation):
    """Every logit is standard normal, whatever the router says, so that loads are level but for chance
    (`moe_router_force_load_balancing` of Megatron-core); plus a number for each expert, so that they are not
    (`moe_router_force_biased`).

    Gradients pass to the router's own logits as if nothing had been replaced, so a training step does all its work.
    The logits come from torch's generator: layers that gradient checkpointing computes again draw the same, if the
    backward pass is taken inside the context too. The numbers of the experts are drawn once, from the seed.
    """

    stage: ClassVar[Stage] = Stage.LOGITS

    bias: float = 0.0
    """Standard deviation of the experts' numbers, at least 0; 0 is level, 1 clearly lopsided, 3 extremely."""
    seed: int = 0
    """Seed of the experts' numbers."""

    def __post_init__(self) -> None:
        if not self.bias >= 0:
            raise UserError(f"RandomLogits: bias must be at least 0, got {self.bias}")

    def bind(self, sites: Sequence[Site]) -> list[Perturbation | None]:
        return [self._at(site) for site in sites]

    def _at(self, site: Site) -> Perturbation:
        bias_E = self.bias * torch.randn(site.router.num_experts, generator=seeded(self.seed, site.index))

        def replaced(logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
            random_BSE = torch.randn_like(logits_BSE) + bias_E.to(logits_BSE)
            return decide(logits_BSE + (random_BSE - logits_BSE).detach(), allowed_BSE)

        return replaced
