"""A handle for as long as somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from crossways.router import Router
from crossways.surgery.find import has_stacked_experts
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute


@contextmanager
def own_routing(model: nn.Module) -> Iterator[None]:
    """Attach the family's own rule to a routed model of transformers while the context lasts, so that it can be
    traced and perturbed. Nothing for models that have routers of ours, are rerouted, or are not routed at all.

    Raises:
        UnknownRoutingError: for a routed model that is not understood.
    """
    modules = list(model.modules())
    ours = handle_of(model) is not None or any(isinstance(module, Router) for module in modules)
    if ours or not any(has_stacked_experts(module) for module in modules):
        yield
        return
    with reroute(model, "own"):
        yield
