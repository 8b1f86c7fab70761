"""Set the estimates that decode twins need on text, and say how close the twins come to the rules they stand for.

Legend: B batch, S sequence, T tokens, R routers, E experts, C cutoffs of a router (1 or E).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.evaluation.perplexity import Likelihood, score_batches
from crossways.evaluation.subject import Subject, subject_of
from crossways.rank_sketch import RankSketch
from crossways.router import Router
from crossways.routing import Routing
from crossways.rules.select import Threshold
from crossways.rules.select.base import whole

BUFFERS = ("cutoff", "normaliser")
"""The estimates that are set."""

Batches = Sequence[dict[str, Tensor]]
"""Batches that can be read several times, as `crossways.training.windows.batch_windows` makes them."""


@dataclass(frozen=True)
class RouterCalibration:
    """One router's budgets, in experts per token."""

    router: str
    """Its name."""
    target: float
    """What the rule spends by definition, k; for a twin without a cutoff, what it spent."""
    original: float
    """What the original rule spent on the text that was checked."""
    twin: float
    """What the decode twin spent there."""
    rounding: float
    """How far the cutoff misses the target on the calibration text because of ties and of bounded memory; 0 if
    exact."""


@dataclass(frozen=True)
class CalibrationReport:
    """How close the decode twins come, all routers together and each."""

    tokens: int
    """Tokens that set the cutoffs, padding excluded."""
    checked_tokens: int
    """Tokens scored for the two perplexities."""
    passes: int
    """Passes under the twins, after the one under the original rules."""
    original_perplexity: float
    """Per token, under the original rules: may flatter, since they look at later tokens or other rows."""
    twin_perplexity: float
    """Per token, under the decode twins: what generation gets."""
    routers: tuple[RouterCalibration, ...]
    """Each calibrated router."""

    def table(self) -> Table:
        """For a terminal."""
        caption = (
            f"perplexity {self.original_perplexity:.4g} under the original rule, {self.twin_perplexity:.4g} under "
            f"its decode twin ({self.checked_tokens} tokens); cutoffs from {self.tokens} tokens"
        )
        table = Table(title="experts per token", caption=caption, caption_justify="left")
        for name in ("router", "target", "original", "twin", "twin / original"):
            table.add_column(name, justify="left" if name == "router" else "right")
        for router in self.routers:
            ratio = router.twin / router.original if router.original else float("nan")
            figures = (router.target, router.original, router.twin, ratio)
            table.add_row(router.router, *(f"{figure:.4f}" for figure in figures))
        return table


def calibrate(
    model: Any,
    batches: Batches,
    *,
    passes: int = 1,
    check: Batches | None = None,
    limit: int = 2**16,
) -> CalibrationReport:
    """Set the cutoff of every router whose decode twin needs one, so that the twins spend k on average over the text.

    A cutoff is the (k T)-th greatest of the scores of all T tokens and E experts, for expert choice that of each
    expert by itself among its T scores, k T / E-th. The first pass runs under the original rules, as training does.
    But the hidden states that a later router sees when generating are those that earlier twins made, so each further
    pass runs under the twins and sets all cutoffs anew. After i such passes the first i + 1 routers are exactly
    consistent: R - 1 passes are a calibration router by router; one or two come near. Scores that are normalised over
    tokens have a normaliser for each expert to set as well, in the same passes; cutoffs are then taken from scores
    under the normaliser of the pass before (in the first pass, of their batch), which takes one pass more.

    Args:
        model: of crossways, or of transformers and rerouted; put in evaluation mode for the duration; only the
            routers' `cutoff` and `normaliser` change, and none if an error is raised.
        batches: text to calibrate on; ten thousand tokens settle a cutoff to about one per cent.
        passes: passes under the twins, 0 or more.
        check: other text to compare rule and twin on; default the same.
        limit: buckets of the histogram behind each cutoff, see `RankSketch`; memory is at most 16 bytes each.

    Raises:
        UserError: if no router has a cutoff, or there is no text.
    """
    subject = subject_of(model)
    routers = {
        index: router
        for index, router in enumerate(subject.routers.values())
        if router.has_cutoff or router.has_normaliser
    }
    if not routers:
        raise UserError("nothing to calibrate: no routing rule of this model needs an estimate to generate")
    if passes < 0:
        raise UserError(f"passes must be 0 or more, got {passes}")
    before = {(index, name): router.snapshot(name) for index, router in routers.items() for name in BUFFERS}
    try:
        for number in range(passes + 1):
            observed = _pass(subject, routers, batches, causal=number > 0, limit=limit)
            for index, router in routers.items():
                observed[index].set(router)
        subject.calibrated()
        return _report(subject, observed, check if check is not None else batches, passes)
    except BaseException:
        for (index, name), value in before.items():
            if value is not None:
                getattr(routers[index], name).copy_(value)
        raise


class _Observed:
    """The scores of one router, in histograms: one, or one for each expert; and the sums behind its normaliser."""

    def __init__(self, router: Router, limit: int, *, causal: bool) -> None:
        self.causal = causal
        twin = router.select.decode_twin()
        self.twin = twin if isinstance(twin, Threshold) and router.has_cutoff else None
        cutoffs = 0 if self.twin is None else router.num_experts if self.twin.per_expert else 1
        self.sketch_C = [RankSketch(limit) for _ in range(cutoffs)]
        self.log_sum_E = torch.full((router.num_experts,), -torch.inf, dtype=torch.float64)
        self.tokens = 0

    def receive(self, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        """A forward hook."""
        assert isinstance(router, Router)
        rows = slice(None) if routing.valid_T is None else routing.valid_T
        logits_TE = routing.logits_TE.detach()[rows]
        self.tokens += len(logits_TE)
        if router.has_normaliser:
            seen_E = logits_TE.double().logsumexp(0).cpu()
            self.log_sum_E = torch.logaddexp(self.log_sum_E, seen_E)
        choice_TE = choice_of(router, routing, causal=self.causal)
        pools = choice_TE.t() if len(self.sketch_C) > 1 else [choice_TE] * len(self.sketch_C)
        for sketch, choice_N in zip(self.sketch_C, pools, strict=True):
            sketch.add(choice_N)

    @property
    def wanted(self) -> int:
        """Pairs that each cutoff may let pass."""
        assert self.twin is not None
        return min(whole(self.twin.k * self.tokens / len(self.sketch_C)), self.sketch_C[0].total)

    def set(self, router: Router) -> None:
        """Hand the router its cutoffs, float32 (C,), and its normaliser, float32 (E,)."""
        if self.sketch_C:
            router.cutoff.copy_(torch.tensor([sketch.cutoff(self.wanted).value for sketch in self.sketch_C]))
        if router.has_normaliser:
            router.normaliser.copy_(self.log_sum_E - math.log(self.tokens))

    def rounding(self) -> float:
        """By how many experts per token the cutoffs miss the target."""
        missed = sum(abs(sketch.cutoff(self.wanted).reached - self.wanted) for sketch in self.sketch_C)
        return missed / self.tokens


def choice_of(router: Router, routing: Routing, *, causal: bool) -> Tensor:
    """What the router's decode twin compares, float32 (valid tokens, E). That is what was compared, but under an
    original score that is normalised over the tokens of its group: then the twin's, normalised over the batch."""
    rows = slice(None) if routing.valid_T is None else routing.valid_T
    assert routing.choice_TE is not None
    if causal or not router.has_normaliser or router.select.chooses_by == "logits":
        return routing.choice_TE[rows]
    logits_BSE = routing.logits_TE.detach()[rows][None]
    normaliser_E = router.score.normaliser(logits_BSE)
    assert normaliser_E is not None
    twin_TE = router.score.decode_twin().at(normaliser_E)(logits_BSE)[0]
    return twin_TE + (routing.choice_TE - routing.scores_TE.detach())[rows]  # the balancing bias, if any


def _pass(
    subject: Subject, routers: dict[int, Router], batches: Batches, *, causal: bool, limit: int
) -> dict[int, _Observed]:
    observed = {index: _Observed(router, limit, causal=causal) for index, router in routers.items()}
    with ExitStack() as stack:
        stack.enter_context(_self_sufficient(subject.model, routers.values()))
        for index, router in routers.items():
            stack.callback(router.register_forward_hook(observed[index].receive).remove)
        score_batches(subject.model, batches, causal=causal)
    if not min(seen.tokens for seen in observed.values()):
        raise UserError("nothing to calibrate on: the text has no tokens")
    return observed


@contextmanager
def _self_sufficient(model: nn.Module, routers: Iterable[Router]) -> Iterator[None]:
    """Routers that are thresholds from the start, and have no cutoff yet, take that of each batch, as they do in the
    first step of training."""
    blank = [r for r in routers if r.has_cutoff and isinstance(r.select, Threshold) and r.cutoff.isnan().any()]

    def train(router: nn.Module, args: tuple[Any, ...]) -> None:
        router.training = True  # the forward pass of the whole model is in evaluation mode

    handles = [router.register_forward_pre_hook(train) for router in blank]
    try:
        yield
    finally:
        for handle, router in zip(handles, blank, strict=True):
            handle.remove()
            router.training = model.training


def _report(subject: Subject, observed: dict[int, _Observed], check: Batches, passes: int) -> CalibrationReport:
    original, twin = (score_batches(subject.model, check, causal=causal) for causal in (False, True))
    names = list(subject.routers)
    rows = [
        RouterCalibration(
            router=names[index],
            target=seen.twin.k if seen.twin else _budget(original, index),
            original=_budget(original, index),
            twin=_budget(twin, index),
            rounding=seen.rounding(),
        )
        for index, seen in observed.items()
    ]
    return CalibrationReport(
        tokens=next(iter(observed.values())).tokens,
        checked_tokens=twin.tokens,
        passes=passes,
        original_perplexity=original.perplexity,
        twin_perplexity=twin.perplexity,
        routers=tuple(rows),
    )


def _budget(likelihood: Likelihood, router: int) -> float:
    return float(likelihood.expert_load[router].sum()) / likelihood.routed_tokens
