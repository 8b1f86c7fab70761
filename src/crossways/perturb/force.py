"""Force the path: the top expert of each token at each router is given.

Legend: B batch, S sequence, R routers, T = B * S tokens, E experts, F forced tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.perturb.base import ModelPerturbation, Stage
from crossways.routing import Decide, Perturbation, Routing
from crossways.sites import Site


@dataclass(frozen=True, eq=False)
class ForcePaths(ModelPerturbation):
    """Each token's executed top-1 expert is the given one, for one forward pass of the given shape.

    With more than one expert per token only the top one is forced: it takes the place and the weight of the rule's
    top expert, and where it was chosen already the two exchange weights. So the number of experts per token and their
    weights stay as the rule decided, and only the names change. With `alone` the forced expert is executed by itself,
    with its own score. A token for which the rule chose nobody gets the forced expert with its own score in both.
    Padding, and pairs that another perturbation forbids, are not forced.
    """

    stage: ClassVar[Stage] = Stage.PATHS

    expert_BSR: Tensor
    """Expert indices, int64 (B, S, R), routers in the order of a forward pass; -1 leaves the token to the rule."""
    alone: bool = False
    """Execute nothing but the forced expert."""

    def bind(self, sites: Sequence[Site]) -> list[Perturbation | None]:
        if self.expert_BSR.shape[-1] != len(sites):
            raise ValueError(f"paths of {self.expert_BSR.shape[-1]} routers given to a model with {len(sites)}")
        most = min(site.router.num_experts for site in sites)
        if self.expert_BSR.numel() and not -1 <= int(self.expert_BSR.min()) <= int(self.expert_BSR.max()) < most:
            raise ValueError(f"expert indices must lie between -1 and {most - 1}")
        return [self._at(site) for site in sites]

    def _at(self, site: Site) -> Perturbation:
        expert_BS = self.expert_BSR[..., site.index]

        def forced(logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
            if logits_BSE.shape[:2] != expert_BS.shape:
                raise ValueError(
                    f"paths are given for a batch of shape {tuple(expert_BS.shape)}, this one is "
                    f"{tuple(logits_BSE.shape[:2])}"
                )
            routing = decide(logits_BSE, allowed_BSE)
            return force_top(
                routing,
                expert_BS.flatten(),
                allowed_BSE,
                site.router.renormalize in (True, "softmax"),
                alone=self.alone,
            )

        return forced


def force_top(
    routing: Routing, expert_T: Tensor, allowed_BSE: Tensor | None, renormalize: bool, *, alone: bool
) -> Routing:
    """`routing` with the top experts replaced by `expert_T`, int64 (T,), where that is not -1; see `ForcePaths`."""
    mask_TE, weight_TE = routing.assignment.to_mask(), routing.assignment.to_dense().clone()
    expert_T = expert_T.to(mask_TE.device)
    forced_T = expert_T >= 0
    if allowed_BSE is not None:
        may_T = allowed_BSE.flatten(0, 1).gather(1, expert_T.clamp(min=0)[:, None])[:, 0]
        forced_T = forced_T & may_T
    row_F = forced_T.nonzero()[:, 0]
    new_F, old_F = expert_T[row_F], routing.assignment.top_expert_T()[row_F]
    own_F = routing.scores_TE[row_F, new_F].to(weight_TE.dtype)
    if renormalize:
        own_F = torch.ones_like(own_F)
    top_F = torch.where(old_F >= 0, weight_TE[row_F, old_F], own_F)
    if alone:
        mask_TE[row_F], weight_TE[row_F] = False, 0.0
        top_F = own_F
    else:
        has_F = old_F >= 0
        row_H, new_H, old_H = row_F[has_F], new_F[has_F], old_F[has_F]
        weight_TE[row_H, old_H] = weight_TE[row_H, new_H]
        mask_TE[row_H, old_H] = mask_TE[row_H, new_H]
    mask_TE[row_F, new_F], weight_TE[row_F, new_F] = True, top_F
    return replace(routing, assignment=Assignment.from_mask(mask_TE, weight_TE))
