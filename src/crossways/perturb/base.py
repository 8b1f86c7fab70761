"""The contract of a perturbation, and the context manager that puts perturbations on and takes them off.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from crossways.router import Router
from crossways.routing import Decide, Perturbation, Routing
from crossways.sites import Site, router_sites
from crossways.surgery.attach import own_routing


class Stage(IntEnum):
    """In which order composed perturbations act, whatever the order they are given in: the first wraps all others."""

    RELABEL = 0
    """Renames the executed experts; must see the finished decision of all others."""
    LOGITS = 1
    """Changes logits, once for each decision."""
    EXPERTS = 2
    """Takes experts away, from all tokens alike."""
    TOKENS = 3
    """Takes pairs away, from each token after a look at its decision. Plain callables act here."""
    PATHS = 4
    """Replaces the rule's decision."""


@dataclass(frozen=True)
class ModelPerturbation:
    """A perturbation that differs from router to router. One that treats all alike may be any
    `crossways.routing.Perturbation`, such as `DisableTop`."""

    stage: ClassVar[Stage]

    def bind(self, sites: Sequence[Site]) -> list[Perturbation | None]:
        """What to do at each router of a model, None for nothing. Called whenever a context is entered, so that
        random numbers start afresh."""
        raise NotImplementedError

    def installed(self, model: nn.Module, sites: Sequence[Site]) -> AbstractContextManager[list[Perturbation | None]]:
        """`bind`, and whatever must be put on the model for as long as the context lasts."""
        return nullcontext(self.bind(sites))


@dataclass(eq=False)
class _Link:
    """One perturbation at one router."""

    stage: Stage
    apply: Perturbation
    calls: int = 0

    def __call__(self, logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
        self.calls += 1
        return self.apply(logits_BSE, allowed_BSE, decide)


@dataclass(frozen=True, eq=False)
class _Chain:
    """All perturbations at one router, sorted by stage."""

    links: tuple[_Link, ...] = field(default=())

    def and_also(self, link: _Link) -> _Chain:
        return _Chain(tuple(sorted((*self.links, link), key=lambda link: link.stage)))

    def __call__(self, logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
        for link in reversed(self.links):
            decide = partial(link, decide=decide)
        return decide(logits_BSE, allowed_BSE)


@contextmanager
def perturbed(model: nn.Module, *perturbations: ModelPerturbation | Perturbation) -> Iterator[list[Router]]:
    """Apply perturbations to the routers of a model while the context lasts; yields the routers.

    A routed model of transformers needs no preparation: it is routed by its family's rule, and put back afterwards.
    Several at once, and nested contexts, act together in the order of `Stage`. The routers are restored exactly.

    Raises:
        ValueError: if the model has no router, or if the context ends without one of the perturbations having been
            called, since a measurement would then silently have measured nothing.
    """
    if not perturbations:
        raise ValueError("perturbed() was given no perturbation")
    with own_routing(model), _perturbed(model, perturbations) as routers:
        yield routers


@contextmanager
def _perturbed(model: nn.Module, perturbations: Sequence[ModelPerturbation | Perturbation]) -> Iterator[list[Router]]:
    sites = router_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no router to perturb")
    before = [site.router.perturbation for site in sites]
    with ExitStack() as stack:
        links = [_install(perturbation, model, sites, stack) for perturbation in perturbations]
        try:
            for site, links_here in zip(sites, zip(*links, strict=True), strict=True):
                site.router.perturbation = _chain(site.router.perturbation, links_here)
            yield [site.router for site in sites]
        finally:
            for site, old in zip(sites, before, strict=True):
                site.router.perturbation = old
    for perturbation, links_R in zip(perturbations, links, strict=True):
        if not any(link.calls for link in links_R if link):
            raise ValueError(f"{perturbation} changed nothing: no router it applies to decided inside the context")


def _install(
    perturbation: ModelPerturbation | Perturbation, model: nn.Module, sites: Sequence[Site], stack: ExitStack
) -> list[_Link | None]:
    """One perturbation's link at every router."""
    if not isinstance(perturbation, ModelPerturbation):
        return [_Link(Stage.TOKENS, perturbation) for _ in sites]
    bound = stack.enter_context(perturbation.installed(model, sites))
    return [_Link(perturbation.stage, apply) if apply else None for apply in bound]


def _chain(old: Perturbation | None, links: Sequence[_Link | None]) -> Perturbation | None:
    present = [link for link in links if link]
    if not present:
        return old
    chain = old if isinstance(old, _Chain) else _Chain((_Link(Stage.TOKENS, old),) if old else ())
    for link in present:
        chain = chain.and_also(link)
    return chain
