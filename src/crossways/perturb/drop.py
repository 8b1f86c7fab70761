"""Drop random experts, the same for all tokens: an expert, or the machine it lives on, is gone.

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
class DropExperts(ModelPerturbation):
    """A random share of each router's experts may not be chosen by anybody; the selection is made among the rest.

    Every router loses experts of its own, drawn from the seed. The number dropped is `share * E`, rounded to the
    nearest. Softmax scores are not rescaled: what the lost experts would have weighed is missing from the output.
    """

    stage: ClassVar[Stage] = Stage.EXPERTS

    share: float
    """Share of the experts that is lost, above 0 and below 1; at least one is lost and one is left."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"DropExperts: share must lie between 0 and 1, got {self.share}")

    def bind(self, sites: Sequence[Site]) -> list[Perturbation | None]:
        return [self._at(site) for site in sites]

    def _at(self, site: Site) -> Perturbation:
        kept_E = self.kept(site.index, site.router.num_experts)

        def without(logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
            kept_BSE = kept_E.to(logits_BSE.device).expand(logits_BSE.shape)
            return decide(logits_BSE, kept_BSE if allowed_BSE is None else kept_BSE & allowed_BSE)

        return without

    def kept(self, index: int, num_experts: int) -> Tensor:
        """Boolean (E,): the experts that router number `index` keeps.

        Raises:
            UserError: if the share comes to none or to all of the experts.
        """
        dropped = round(self.share * num_experts)
        if not 0 < dropped < num_experts:
            raise UserError(
                f"DropExperts: {self.share:g} of {num_experts} experts is {dropped}; drop at least one, not all"
            )
        kept_E = torch.ones(num_experts, dtype=torch.bool)
        kept_E[torch.randperm(num_experts, generator=seeded(self.seed, index))[:dropped]] = False
        return kept_E
