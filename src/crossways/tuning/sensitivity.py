"""How much each layer minds a smaller budget: the loss when only that layer's is cut.

Legend: L layers, N levels of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crossways.calibrate import choice_of
from crossways.evaluation.subject import subject_of
from crossways.rank_sketch import RankSketch
from crossways.router import Router
from crossways.routing import Routing
from crossways.rules.select.base import whole
from crossways.surgery.rule import Rule
from crossways.tuning.bench import Bench, Estimates, with_cutoffs
from crossways.tuning.families import Family, OwnRouting, family_rule
from crossways.tuning.texts import Text


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's budget costs in quality, all others left at the model's own."""

    layer: str
    budget_N: tuple[float, ...]
    """Experts per token, ascending; the last is the model's own."""
    loss_N: tuple[float, ...]
    """Nats per token more than at the layer's own budget; 0 for the last. Negative where less is better."""


def measure_sensitivities(
    bench: Bench, family: Family, own: OwnRouting, levels: Sequence[float], text: Text
) -> tuple[Sensitivity, ...]:
    """One for each layer.

    Args:
        bench: the model.
        family: what routes.
        own: the model's own routing, whose budgets are cut.
        levels: shares of its own budget that a layer is cut to, each in (0, 1).
        text: what the losses are measured on.
    """
    budgets_L = [level_budgets(family, k, levels) for k in own.k_L]
    rule = family_rule(family, own, own.k_L)
    estimates = bench.calibrated(rule) if family.calibrated else None
    cutoffs_L = _cutoffs(bench, rule, estimates, budgets_L) if estimates is not None else None
    reference = bench.score(rule, estimates, text).nats
    found = []
    for layer, name in enumerate(own.layers):
        losses = []
        for level, budget in enumerate(budgets_L[layer]):
            if cutoffs_L is not None and estimates is not None:
                cut, known = rule, with_cutoffs(estimates, layer, [cutoffs_L[layer][level]])
            else:
                k_L = [budget if index == layer else k for index, k in enumerate(own.k_L)]
                cut, known = family_rule(family, own, k_L), None
            losses.append(bench.score(cut, known, text).nats - reference)
        found.append(Sensitivity(name, (*budgets_L[layer], float(own.k_L[layer])), (*losses, 0.0)))
    return tuple(found)


def level_budgets(family: Family, k: int, levels: Sequence[float]) -> tuple[float, ...]:
    """The budgets below k to which a layer is cut, ascending; whole ones, at least 1, where they must be."""
    budgets = {float(max(whole(level * k), 1)) if family.integral else level * k for level in levels}
    return tuple(sorted(budget for budget in budgets if budget < k))


def _cutoffs(
    bench: Bench, rule: Rule, estimates: Estimates, budgets_L: Sequence[Sequence[float]]
) -> list[list[float]]:
    """The cutoff of each layer at each of its budgets, by the scores it sees while no layer is cut; those are also
    what it sees when it alone is."""

    def measure() -> list[list[float]]:
        with bench.routed(rule, estimates) as handle:
            sketch_L = [RankSketch() for _ in handle.blocks]
            tokens_L = [0] * len(sketch_L)
            with ExitStack() as stack:
                for layer, block in enumerate(handle.blocks):
                    hook = _Listener(layer, sketch_L, tokens_L)
                    stack.callback(block.router.register_forward_hook(hook).remove)
                _run(bench)
        return [
            [sketch.cutoff(min(whole(budget * tokens), sketch.total)).value for budget in budgets]
            for sketch, tokens, budgets in zip(sketch_L, tokens_L, budgets_L, strict=True)
        ]

    key: dict[str, Any] = {"what": "level cutoffs", "rule": rule.to_json(), "estimates": estimates}
    key |= {"budgets": [list(budgets) for budgets in budgets_L], "text": bench.calibration.digest}
    return bench.store.get(key, measure)


@torch.inference_mode()
def _run(bench: Bench) -> None:
    subject = subject_of(bench.model)
    for batch in bench.calibration.batches():
        subject.run({name: tensor.to(bench.model.device) for name, tensor in batch.items()}, causal=True)


class _Listener:
    """A forward hook on a router that keeps the scores its threshold compares."""

    def __init__(self, layer: int, sketch_L: list[RankSketch], tokens_L: list[int]) -> None:
        self.layer, self.sketch_L, self.tokens_L = layer, sketch_L, tokens_L

    def __call__(self, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        assert isinstance(router, Router)
        choice_TE = choice_of(router, routing, causal=True)
        self.sketch_L[self.layer].add(choice_TE)
        self.tokens_L[self.layer] += len(choice_TE)
