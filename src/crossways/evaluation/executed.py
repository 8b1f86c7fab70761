"""What routing a figure was measured under: the rule, who decided, and what was executed while it was measured.

Legend: B batch, S sequence, T tokens, E experts, R routers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from crossways.errors import UserError
from crossways.evaluation.evaluate import leak_reason_of, rule_of
from crossways.router import Router
from crossways.routing import Routing
from crossways.rules.registry import describe
from crossways.rules.score import Score
from crossways.rules.select import Selection
from crossways.settings import Settings
from crossways.sites import router_sites
from crossways.surgery.handle import handle_of

ESTIMATES = ("cutoff", "normaliser")
"""Buffers that decode twins decide by."""


class RouterExecution(Settings):
    """One router."""

    router: str
    """Its name: the path of its block, or layer and factor."""
    budget: float | None
    """Experts per token that its selection is asked to spend, k; None for a selection without one."""
    experts_per_token: float | None
    """Pairs executed over tokens routed, padding left out; None if nothing ran."""


class RoutingRecord(Settings):
    """The routing under which figures were measured."""

    rule: str
    """The rule of the first router on one line; `dense...` without routers."""
    spec: dict[str, Any]
    """What the rule is built from again: a rerouted model's rule, or the configuration fields of one of our own."""
    causal: bool
    """Whether every token's experts were decided by its past alone: by the rule's decode twin, where it has one."""
    twin: str | None
    """The decode twin that decided in the rule's place, of the first router; None if the rule itself did."""
    leaky: bool
    """Whether a token's experts depended on later tokens or on other rows."""
    leak_reason: str
    """On which, in words; empty if on neither."""
    experts_per_token: float | None
    """Mean over routers of the executed experts per token; None for a model whose routing is not seen."""
    tokens: int
    """Tokens routed, padding left out: the first router's."""
    cutoffs_sha256: str | None
    """Digest of all cutoffs and normalisers of decode twins, as float32 bytes; None if there are none. Equal digests,
    equal twins."""
    routers: tuple[RouterExecution, ...]
    """Each router, in the order of a forward pass."""


class Executed:
    """Counts what routers execute while hooks of `counting` are on them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.routers = [site.router for site in router_sites(model)]
        self.pairs = [0] * len(self.routers)
        self.tokens = [0] * len(self.routers)

    @contextmanager
    def counting(self) -> Iterator[Executed]:
        """Count every decision, those of generation included, while the context lasts."""
        with ExitStack() as stack:
            for index, router in enumerate(self.routers):
                stack.callback(router.register_forward_hook(self._hook(index)).remove)
            yield self

    def _hook(self, index: int) -> Any:
        def count(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
            self.pairs[index] += int(routing.assignment.load_E().sum())
            valid_T = routing.valid_T
            self.tokens[index] += len(routing.scores_TE) if valid_T is None else int(valid_T.sum())

        return count

    def record(self, *, causal: bool) -> RoutingRecord:
        """What was counted, with the rule; `causal` says whether the decode twins decided."""
        rates = [pairs / tokens if tokens else None for pairs, tokens in zip(self.pairs, self.tokens, strict=True)]
        known = [rate for rate in rates if rate is not None]
        reason = "" if causal else leak_reason_of(self.model)
        return RoutingRecord(
            rule=rule_of(self.model),
            spec=spec_of(self.model),
            causal=causal,
            twin=twin_of(self.routers) if causal else None,
            leaky=bool(reason),
            leak_reason=reason,
            experts_per_token=sum(known) / len(known) if known else None,
            tokens=self.tokens[0] if self.tokens else 0,
            cutoffs_sha256=estimates_digest(self.routers),
            routers=tuple(
                RouterExecution(router=name, budget=getattr(router.select, "k", None), experts_per_token=rate)
                for name, router, rate in zip(_names(self.model, len(rates)), self.routers, rates, strict=True)
            ),
        )


@contextmanager
def decided_by(model: Any, *, causal: bool) -> Iterator[bool]:
    """Let the decode twins decide in every pass while the context lasts, or with `causal` false the rules themselves.

    Yields whether the twins decide: they do in any case where the model was set to route by them always. A model
    without routing does not mind.

    Raises:
        UserError: if the twins are to decide and have nothing to go by yet.
    """
    handle = handle_of(model)
    config = getattr(model, "config", None)
    own = hasattr(config, "causal_routing")
    causal = causal or (handle is not None and handle.always_causal) or bool(getattr(config, "causal_routing", False))
    if causal:
        _require_estimates([site.router for site in router_sites(model)])
    before = config.causal_routing if own and config is not None else None
    with ExitStack() as stack:
        if handle is not None:
            stack.enter_context(handle.causal(on=causal))
        if own and config is not None:
            stack.callback(setattr, config, "causal_routing", before)
            config.causal_routing = causal
        yield causal


def rules_of(model: nn.Module) -> list[Selection | Score]:
    """Selections and scores of all routers."""
    return [rule for site in router_sites(model) for rule in (site.router.select, site.router.score)]


def twin_of(routers: Sequence[Router]) -> str | None:
    """What stands in for the first router's rule in generation; None if the rule needs no stand-in."""
    for router in routers[:1]:
        select, score = router.select.decode_twin(), router.score.decode_twin()
        if (select, score) != (router.select, router.score):
            return f"{describe(select)} of {describe(score)}"
    return None


def spec_of(model: Any) -> dict[str, Any]:
    """What the model's routing is built from, as plain JSON; empty without routers."""
    handle = handle_of(model)
    if handle is not None:
        return handle.rule.to_json()
    config = getattr(model, "config", None)
    names = ("select", "score", "gate", "sharing", "layer") if router_sites(model) else ()
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}


def estimates_digest(routers: list[Router]) -> str | None:
    """SHA-256 of all estimates that decode twins decide by, in order; None if there are none, or none known."""
    digest, seen = hashlib.sha256(), False
    for router in routers:
        for name in ESTIMATES:
            buffer = router.snapshot(name)
            if buffer is not None and not buffer.isnan().any():
                digest.update(buffer.float().cpu().numpy().tobytes())
                seen = True
    return digest.hexdigest() if seen else None


def _require_estimates(routers: list[Router]) -> None:
    for router in routers:
        for name in ESTIMATES:
            buffer = router.snapshot(name)
            if buffer is not None and buffer.isnan().any():
                raise UserError(
                    f"the decode twin of {router.select.name!r} has no {name} yet: calibrate on text first "
                    "(--calibrate-on, or crossways calibrate), or measure the rule itself, marked as leaky (--leaky)"
                )


def _names(model: nn.Module, count: int) -> list[str]:
    handle = handle_of(model)
    names = (
        list(handle.routers) if handle is not None else getattr(getattr(model, "config", None), "router_names", ())
    )
    return list(names) if len(names) == count else [str(index) for index in range(count)]
