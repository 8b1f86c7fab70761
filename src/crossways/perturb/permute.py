"""Permute the expert indices that routers emit, while the experts stay where they are.

Legend: E experts, L routed layers, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.perturb.base import ModelPerturbation, Stage
from crossways.perturb.noise import seeded
from crossways.routing import Decide, Perturbation, Routing
from crossways.sites import Site


@dataclass(frozen=True)
class PermuteExperts(ModelPerturbation):
    """In `layers` random layers, expert e's tokens and weights go to expert permutation[e] (PathMoE, arXiv
    2603.18297, index shuffling; its scope is not published: independent permutations in a random subset of m of the
    L layers is our reading).

    Every router of a chosen layer gets a random permutation of its own, never the identity. Layers that reuse the
    decision of the layer before reuse its permutation too and are not drawn.
    """

    stage: ClassVar[Stage] = Stage.RELABEL

    layers: int | None = None
    """m, how many layers are permuted, 1 to L; None is all."""
    common: bool = False
    """One permutation for all chosen layers instead of one each."""
    seed: int = 0
    """Seed of both draws."""

    def bind(self, sites: Sequence[Site]) -> list[Perturbation | None]:
        chosen = self.chosen_layers(sites)
        return [self._at(site) if site.layer in chosen else None for site in sites]

    def chosen_layers(self, sites: Sequence[Site]) -> set[int]:
        """Positions of the layers that are permuted.

        Raises:
            UserError: if there are not that many layers that decide.
        """
        deciding = sorted({site.layer for site in sites if not site.reuses})
        count = len(deciding) if self.layers is None else self.layers
        if not 1 <= count <= len(deciding):
            raise UserError(
                f"PermuteExperts: layers must be 1 to {len(deciding)}, the layers that decide; got {count}"
            )
        order = torch.randperm(len(deciding), generator=seeded(self.seed, -1)).tolist()
        return {deciding[position] for position in order[:count]}

    def _at(self, site: Site) -> Perturbation:
        draw = site.factor if self.common else site.index
        permutation_E = random_permutation(site.router.num_experts, seeded(self.seed, draw))

        def permuted(logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
            routing = decide(logits_BSE, allowed_BSE)
            return replace(routing, assignment=relabelled(routing.assignment, permutation_E))

        return permuted


def random_permutation(num_experts: int, generator: torch.Generator) -> Tensor:
    """A random permutation int64 (E,) other than the identity; raises `UserError` for fewer than two experts."""
    if num_experts < 2:
        raise UserError(f"{num_experts} expert cannot be permuted")
    identity_E = torch.arange(num_experts)
    permutation_E = identity_E
    while torch.equal(permutation_E, identity_E):
        permutation_E = torch.randperm(num_experts, generator=generator)
    return permutation_E


def relabelled(assignment: Assignment, permutation_E: Tensor) -> Assignment:
    """The same tokens and weights at other experts: expert e's pairs become those of permutation_E[e]."""
    assignment = assignment.compact()
    return Assignment.from_pairs(
        assignment.token_P,
        permutation_E.to(assignment.expert_P.device)[assignment.expert_P],
        assignment.weight_P,
        assignment.num_tokens,
        assignment.num_experts,
    )
