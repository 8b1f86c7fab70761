"""Record what a model executes, by hooks on its routers.

Legend: R routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from crossways.errors import UserError
from crossways.router import Router
from crossways.routing import Context, Routing
from crossways.sites import Site, router_sites, routers_per_layer
from crossways.surgery.attach import own_routing
from crossways.trace.sums import Trace, TraceSettings


@contextmanager
def traced(model: nn.Module, settings: TraceSettings | None = None, into: Trace | None = None) -> Iterator[Trace]:
    """Record every forward pass of a model while the context lasts: the assignments that were executed, perturbations
    and decode twins included. Nothing is derived again from logits.

    A routed model of transformers needs no preparation: it is recorded under its own routing and put back after.
    Routed attention (`attention_experts`) is left out: a head's choice among matrices of its own is no expert path.
    The given module itself must be called (`generate` does). Decisions that gradient checkpointing repeats in the
    backward pass are not counted twice.

    Args:
        model: any module with routers.
        settings: how much to keep.
        into: a trace to go on with, instead of a new one.

    Raises:
        ValueError: if the model has no router, or nothing was received before the context ended.
    """
    with own_routing(model), _traced(model, settings, into) as trace:
        yield trace


@contextmanager
def _traced(model: nn.Module, settings: TraceSettings | None, into: Trace | None) -> Iterator[Trace]:
    sites = _sites(model)
    experts = {site.router.num_experts for site in sites}
    if len(experts) > 1:
        raise UserError(f"cannot trace routers of different numbers of experts: {sorted(experts)}")
    trace = into or Trace(experts.pop(), len(sites), routers_per_layer(sites), settings)
    before = trace.num_tokens
    with each_pass(model, trace.record):
        yield trace
    if trace.num_tokens == before:
        raise ValueError(f"the trace received nothing: {type(model).__name__} was not called, or with padding alone")


Record = Callable[[list[Routing], Tensor | None], None]
"""Gets the routings of a forward pass, and its token ids (T,) if routers knew them."""


@contextmanager
def each_pass(model: nn.Module, record: Record) -> Iterator[None]:
    """Hand over what the routers executed in every forward pass of `model` itself while the context lasts. What
    gradient checkpointing repeats is left out.

    Raises:
        ValueError: if the model has no router.
    """
    sites = _sites(model)
    recorder = _Recorder(record)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(recorder.begin, with_kwargs=True).remove)
        for site in sites:
            stack.callback(site.router.register_forward_hook(recorder.receive, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(recorder.end).remove)
        yield


def _sites(model: nn.Module) -> list[Site]:
    sites = router_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no router to trace")
    return sites


class _Recorder:
    """Collects the routings of one forward pass, and hands them over at its end."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.active = False
        self.routings: list[Routing] = []
        self.token_ids_BS: Tensor | None = None

    def begin(self, *_: Any) -> None:
        self.active, self.routings, self.token_ids_BS = True, [], None

    def receive(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
        if not self.active:
            return
        assert isinstance(router, Router)
        context = args[1] if len(args) > 1 else kwargs.get("context")
        if isinstance(context, Context):
            self.token_ids_BS = context.token_ids_BS
        self.routings.append(routing)

    def end(self, *_: Any) -> None:
        ids_BS = self.token_ids_BS
        self.active = False
        self.record(self.routings, None if ids_BS is None else ids_BS.flatten())
        self.routings = []
