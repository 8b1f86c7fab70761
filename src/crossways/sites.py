"""Where a model's routers are: which layer and which factor each belongs to.

Legend: R routers, L routed layers, A factors (routers of one layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from crossways.layers import CartesianMoE
from crossways.models.repeated import RepeatedRouter
from crossways.router import Router
from crossways.sharing import Sharing
from crossways.surgery.handle import handle_of


@dataclass(frozen=True, eq=False)
class Site:
    """One router and its place in the model."""

    router: Router
    index: int
    """Position among all routers, in the order of a forward pass, 0 to R - 1."""
    layer: int
    """Position of its layer among the routed layers, 0 to L - 1."""
    factor: int = 0
    """Position in its layer, 0 to A - 1; always 0 in a plain MoE layer."""
    reuses: bool = False
    """Whether it executes the decision of the layer before instead of deciding."""


def router_sites(model: nn.Module) -> list[Site]:
    """The sites of all routers in a model, in the order in which modules are registered, which is that of a forward
    pass in every model of this package; those of a rerouted model of transformers; empty for a model without
    routers."""
    handle = handle_of(model)
    if handle is not None:
        return [Site(router, index, index) for index, router in enumerate(handle.routers.values())]
    factor_of: dict[Router, int] = {}
    for module in model.modules():
        if isinstance(module, CartesianMoE):
            factor_of |= {router: factor for factor, router in enumerate(module.routers)}
        elif isinstance(module, RepeatedRouter):
            factor_of[module.router] = module.factor
    sites: list[Site] = []
    layer = -1
    for index, router in enumerate(module for module in model.modules() if isinstance(module, Router)):
        factor = factor_of.get(router, 0)
        layer += factor == 0
        sites.append(Site(router, index, layer, factor, _reuses(model, layer)))
    return sites


def routers_per_layer(sites: list[Site]) -> int:
    """A, the same for every layer of a model."""
    return max((site.factor for site in sites), default=0) + 1


def _reuses(model: nn.Module, layer: int) -> bool:
    plan = getattr(getattr(model, "config", None), "sharing_plan", None)
    return isinstance(plan, Sharing) and plan.reuses_decision(layer)
