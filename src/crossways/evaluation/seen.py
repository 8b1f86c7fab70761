"""Make the routers of a model of transformers visible without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from torch import nn

from crossways.errors import UserError
from crossways.models import CrosswaysConfig
from crossways.sites import router_sites
from crossways.surgery.find import UnknownRoutingError
from crossways.surgery.handle import Handle
from crossways.surgery.reroute import reroute


def see_routing(model: nn.Module, *, needed: bool) -> Handle | None:
    """Make a model's routers visible: one of transformers that is not rerouted gets a handle with its own rule, which
    changes no output.

    Returns:
        That handle, None if nothing had to be attached.

    Raises:
        UserError: if routing is needed and the model has none, or none that is understood.
    """
    if router_sites(model):
        return None
    if not isinstance(getattr(model, "config", None), CrosswaysConfig):
        with ExitStack() as stack:
            if not needed:
                stack.enter_context(suppress(UnknownRoutingError))
            return reroute(model, "own")
    elif needed:
        raise UserError("this model has no routed layer, so it has no routing weights; use kind hs")
    return None


@contextmanager
def routing_seen(model: nn.Module) -> Iterator[None]:
    """See what can be seen of a model's routing while the context lasts, and leave the model as it was."""
    handle = see_routing(model, needed=False)
    try:
        yield
    finally:
        if handle is not None:
            handle.undo()
