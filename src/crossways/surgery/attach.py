"""A handle for as long as somebody looks: the routers of a model of transformers made visible, without changing what
it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import nn

from crossways.models import CrosswaysConfig
from crossways.sites import router_sites
from crossways.surgery.find import UnknownRoutingError, has_stacked_experts
from crossways.surgery.handle import Handle
from crossways.surgery.reroute import reroute


def attach_own(model: nn.Module, *, needed: bool = True) -> Handle | None:
    """Attach the family's own rule to a model of transformers that is not rerouted, which changes no output.

    Args:
        model: any; of ours, or rerouted already, it is left as it is.
        needed: whether somebody cannot do without.

    Returns:
        The handle, None if nothing was attached.

    Raises:
        UnknownRoutingError: if it is needed, and the model is not routed or not understood.
    """
    if router_sites(model) or isinstance(getattr(model, "config", None), CrosswaysConfig):
        return None
    if needed:
        return reroute(model, "own")
    with suppress(UnknownRoutingError):
        return reroute(model, "own")
    return None


@contextmanager
def own_routing(model: nn.Module, *, needed: bool | None = None) -> Iterator[None]:
    """The same while the context lasts, so that a model can be traced, perturbed and measured; afterwards it is what
    it was. By default the rule is needed if the model has experts: one that has none is somebody else's to refuse."""
    if needed is None:
        needed = any(has_stacked_experts(module) for module in model.modules())
    handle = attach_own(model, needed=needed)
    try:
        yield
    finally:
        if handle is not None:
            handle.undo()
