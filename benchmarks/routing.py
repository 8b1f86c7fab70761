"""Rows of routing: every selection rule, from scores to assignment, beside the experts that it feeds.

A cell is the rule's time over the time of the layer's experts under the assignment that the rule made, forward and
forward+backward; the latter has the gradient from the pairs' weights back to the scores and, as in training, the
estimate of the decode twin's cutoff. The rule's fast path is first held to its plain PyTorch path: the same pairs and
gradients. BASE, which is solved another way, is held to scipy's optimum by its own tests.

Legend: B rows, S tokens of a row, E experts, D model width, F expert width, P pairs.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts, resolve_backend
from crossways.native import routing as native
from crossways.rules.select import (
    Base,
    Capacity,
    ExpertChoice,
    GroupLimited,
    Positive,
    SampledTopK,
    Selection,
    Sinkhorn,
    Threshold,
    TopC,
    TopK,
    TopP,
)
from measure import clock_of, in_turn, ratio
from problems import Case
from table import Job, Row


def rules(k: int, experts: int) -> dict[str, Selection]:
    """Every rule that can spend about k experts a token, by a short name."""
    found: dict[str, Selection] = {
        "top-k": TopK(k=k),
        "top-k, k = 1": TopK(k=1),  # the least that a rule with one expert a token can take
        "sampled top-k": SampledTopK(k=k),
        "top-c": TopC(k=k),
        "top-c, batch": TopC(k=k, group="batch"),
        "top-c, position": TopC(k=k, group="position"),
        "expert choice": ExpertChoice(k=k),
        "expert choice, batch": ExpertChoice(k=k, group="batch"),
        "top-p": TopP(p=0.5, cap=min(2 * k, experts)),
        "capacity": Capacity(k=k),
        "capacity, score": Capacity(k=k, order="score"),
        "positive": Positive(),
        "threshold": Threshold(value=1.5 / experts),
        "sinkhorn": Sinkhorn(k=k),
        "sinkhorn, k = 1": Sinkhorn(k=1),
        "base": Base(),
    }
    if experts % 8 == 0 and k <= experts // 2:
        found["group-limited"] = GroupLimited(k=k)
    return found


def scores_for(rule: Selection, case: Case, device: str) -> tuple[Tensor, Tensor]:
    """What the rule chooses by and weighs by, (B, S, E), of four rows of random logits."""
    generator = torch.Generator(device).manual_seed(0)
    logits_BSE = torch.randn(4, case.tokens // 4, case.experts, generator=generator, device=device)
    if isinstance(rule, Positive):  # three quarters of k in E positive, as ReMoE's penalty would have it
        cut = logits_BSE.flatten()[:65536].quantile(1 - case.k / case.experts)
        logits_BSE = (logits_BSE - cut).clamp_min(0)
        return logits_BSE, logits_BSE
    scores_BSE = logits_BSE.softmax(-1)
    return (logits_BSE if rule.chooses_by == "logits" else scores_BSE), scores_BSE


def wrong(rule: Selection, choice_BSE: Tensor, scores_BSE: Tensor) -> str:
    """What differs between the rule's fast and its plain path; empty if nothing does."""
    results = []
    for plain in (False, True):
        leaf_BSE = scores_BSE.clone().requires_grad_()
        off = mock.patch.object(native, "fits", return_value=False) if plain else contextlib.nullcontext()
        torch.manual_seed(0)
        with off:
            made = rule(choice_BSE, leaf_BSE).compact()
        (grad_BSE,) = torch.autograd.grad(made.weight_P.square().sum(), leaf_BSE)
        results.append((made.token_P, made.expert_P, made.offsets_E1, made.weight_P.detach(), grad_BSE))
    names = ("tokens", "experts", "offsets", "weights", "gradients")
    pairs = zip(names, *results, strict=True)
    return ", ".join(name for name, fast, slow in pairs if fast.shape != slow.shape or not torch.equal(fast, slow))


def share(name: str, rule: Selection, case: Case, dtypes: Sequence[str], device: str, seconds: float) -> list[Row]:
    """A row for each pass and dtype of the experts; the rule, whose scores are float32 in any case, is timed once."""
    choice_BSE, scores_BSE = scores_for(rule, case, device)
    label = f"{name}: {case}"
    if not isinstance(rule, Base) and (difference := wrong(rule, choice_BSE, scores_BSE)):
        notes = {name: f"WRONG: its fast and its plain path differ in {difference}"}
        return [Row("routing", label, "any", {}, notes)]
    leaf_BSE = scores_BSE.clone().requires_grad_()
    assignment = rule(choice_BSE, scores_BSE)
    pairs = int(assignment.offsets_E1[-1]) / assignment.num_tokens
    experts = {dtype: _experts(assignment, case, dtype, device) for dtype in dtypes}

    def train() -> None:
        made = rule(choice_BSE, leaf_BSE)
        rule.cutoff(choice_BSE)
        torch.autograd.grad(made.weight_P, leaf_BSE, torch.ones_like(made.weight_P))

    rows = []
    decisions = (("routing forward", lambda: rule(choice_BSE, scores_BSE)), ("routing forward+backward", train))
    for backward, (what, decide) in enumerate(decisions):
        runs = {dtype: passes[backward] for dtype, passes in experts.items()} | {"rule": decide}
        times = in_turn(runs, seconds / 2, least=5, warm=1, slow=float("inf"), clock=clock_of(device))
        for dtype in dtypes:
            mine = resolve_backend("auto", device, getattr(torch, dtype))
            cells = {"bound": f"{1e3 * statistics.median(times[dtype]):.1f} ms of experts, {pairs:.1f} a token"}
            rows.append(Row(what, label, dtype, cells | {mine: ratio(times["rule"], times[dtype])}))
    return rows


def _experts(assignment: Assignment, case: Case, dtype_name: str, device: str) -> tuple:
    """Forward, and forward+backward, of the experts that an assignment feeds."""
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    x_TD = random(assignment.num_tokens, case.width)
    up_EHD = random(case.experts, 2 * case.expert_width, case.width, scale=case.width**-0.5)
    down_EDF = random(case.experts, case.width, case.expert_width, scale=case.expert_width**-0.5)
    weighted = assignment.with_weights(assignment.weight_P.detach().requires_grad_())
    leaves, grad_TD = (x_TD, weighted.weight_P, up_EHD, down_EDF), torch.ones_like(x_TD)

    def forward() -> Tensor:
        with torch.no_grad():
            return compute_experts(x_TD, weighted, up_EHD, down_EDF, Activation("swiglu"))

    def both() -> None:
        y_TD = compute_experts(x_TD, weighted, up_EHD, down_EDF, Activation("swiglu"))
        torch.autograd.grad(y_TD, leaves, grad_TD)

    return forward, both


def growth(cases: Sequence[Case], name: str, device: str, seconds: float) -> list[Row]:
    """A row for each number of tokens: the rule's time per token over that at the number before."""
    rule = rules(cases[0].k, cases[0].experts)[name]
    runs = {}
    for case in cases:
        choice_BSE, scores_BSE = scores_for(rule, case, device)
        if difference := wrong(rule, choice_BSE, scores_BSE):
            notes = {name: f"WRONG: its fast and its plain path differ in {difference}"}
            return [Row("growth per token", f"{name}: {case}", "float32", {}, notes)]
        runs[str(case.tokens)] = lambda c=choice_BSE, s=scores_BSE: rule(c, s)
    mine = resolve_backend("auto", device, torch.float32)
    times = in_turn(runs, seconds, least=7, warm=1, slow=float("inf"), clock=clock_of(device))
    rows = []
    for before, after in itertools.pairwise(cases):
        scaled = [one * before.tokens / after.tokens for one in times[str(after.tokens)]]
        cells = {"bound": f"{1e3 * statistics.median(times[str(after.tokens)]):.2f} ms"}
        cells[mine] = ratio(scaled, times[str(before.tokens)])
        rows.append(Row("growth per token", f"{name}: {after} / {before.tokens}", "float32", cells))
    return rows


def jobs(case: Case, dtypes: Sequence[str], device: str, seconds: float) -> Iterator[Job]:
    """One for each rule."""
    for name, rule in rules(case.k, case.experts).items():
        run = partial(share, name, rule, case, dtypes, device, seconds)
        yield Job("routing", f"{name}: {case}", ", ".join(dtypes), run)


def growth_jobs(cases: Sequence[Case], device: str, seconds: float) -> Iterator[Job]:
    """Of the rules that look at all tokens at once."""
    for name in ("top-k", "top-c, batch", "expert choice, batch"):
        named = f"{name}: {cases[0]} to {cases[-1].tokens}"
        yield Job("growth", named, "float32", partial(growth, cases, name, device, seconds))
