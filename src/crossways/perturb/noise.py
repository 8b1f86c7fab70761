"""Noise on router logits.

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
from crossways.routing import Decide, Perturbation, Routing
from crossways.sites import Site


@dataclass(frozen=True)
class LogitNoise(ModelPerturbation):
    """Independent normal noise is added to every logit, of every router.

    The noise depends on the seed, the router and how often the router was called before in the context, so two
    models scored on the same batches meet the same noise. Decisions and weights both follow the noisy logits.
    """

    stage: ClassVar[Stage] = Stage.LOGITS

    scale: float
    """Standard deviation, above 0: in units of logits, or of their spread if `relative`. 0.1 to 2 is telling."""
    relative: bool = False
    """Multiply by the standard deviation of the token's own logits over experts, so that models whose logits differ
    in size can be compared."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"LogitNoise: scale must be above 0, got {self.scale}; without noise, perturb nothing")

    def bind(self, sites: Sequence[Site]) -> list[Perturbation | None]:
        return [self._at(site) for site in sites]

    def _at(self, site: Site) -> Perturbation:
        generator = seeded(self.seed, site.index)  # on the CPU, so that every device sees the same noise

        def noisy(logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
            noise_BSE = torch.randn(logits_BSE.shape, generator=generator).to(logits_BSE)
            if self.relative:
                noise_BSE = noise_BSE * logits_BSE.std(-1, correction=0, keepdim=True)
            return decide(logits_BSE + self.scale * noise_BSE, allowed_BSE)

        return noisy


def seeded(seed: int, index: int) -> torch.Generator:
    """A generator on the CPU that is independent for each pair of seed and router."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index * 7919 + 1) % 2**63)
