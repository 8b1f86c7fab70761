"""When an upcycled model is the same function as the dense one, by construction, and how its weights must be scaled.

A feed-forward network is the sum of its G shards, so the function is kept when every shard is weighed one in total:

- copies (G = 1): a token's weights sum to one, whoever is chosen: renormalised token choice;
- shards (G > 1): a token chooses whole copies, all shards of one with the same weight: renormalised top-k with k a
  multiple of G, gates that start in groups, and weights that sum to G ("virtual groups" of He et al. 2024, arXiv
  2410.07524, section 3.2). All experts at weight one (k = E = G) is the case of one copy;
- the shared expert as carrier: always, the routed experts say nothing yet.

Without renormalising, a token's softmax weights sum to about k / E, and to another number for every token: the
scale below undoes the factor at equal logits, not the differences. (He et al., section 3.3, put the same factor into
the experts' matrices; here it is `weight_scale`, and `crossways export` puts it into the second matrix.)
"""

from __future__ import annotations

import torch

from crossways.errors import UserError
from crossways.evaluation.cost import mean_budget
from crossways.gates import Linear, build_gate
from crossways.models.configuration import CrosswaysConfig
from crossways.rules.score import Sigmoid, Softmax, SqrtSoftplus, TokenSoftmax, Unified, build_score
from crossways.rules.select import TopK, build_selection
from crossways.surgery.upcycle.settings import UpcycleSettings

POSITIVE = (Softmax, Sigmoid, Unified, TokenSoftmax, SqrtSoftplus)
"""Scores that are above zero for every expert."""
ALWAYS_SOMEBODY = ("top_k", "scheduled_top_k", "top_p", "group_limited", "sinkhorn", "base")
"""Selections under which no token goes without an expert."""


def restoring_scale(config: CrosswaysConfig, granularity: int) -> float:
    """The `weight_scale` under which a token's weights sum to one full feed-forward network.

    That is G, or k where fewer experts than shards are chosen, so that each chosen shard counts as it did before;
    without renormalising, also divided by what k weights sum to at equal logits. A selection without a fixed budget
    counts as one that chooses everything it should.
    """
    try:
        k = mean_budget(config)
    except UserError:
        k = float(granularity)
    total = min(max(k, 1.0), float(granularity))
    if config.renormalize:
        return total
    score = float(build_score(config.score)(torch.zeros(1, 1, config.router_size))[0, 0, 0])
    if score == 0:
        return total
    return total / (k * score)


def differences(config: CrosswaysConfig, settings: UpcycleSettings, grouped: bool) -> tuple[str, ...]:
    """Why the upcycled model is not the dense function at the start; empty when it is, by construction.

    Args:
        config: of the upcycled model.
        settings: of the upcycling.
        grouped: whether the shards of a copy start with the same row of the gate.
    """
    found = []
    if config.layer == "cartesian" and config.cartesian_skip == "input" and config.factors > 1:
        found.append("cartesian_skip 'input' drops what the first factor computed")
    if config.renormalize and not isinstance(score := build_score(config.score), POSITIVE):
        found.append(f"with score {score.name!r} a token may have no positive weight to renormalise")
    if settings.carrier == "experts":
        found += _of_experts(config, settings.granularity, grouped)
        found += [f"{name} changes the experts" for name in ("noise", "redraw") if getattr(settings, name)]
        if config.zero_computation_experts:
            found.append("zero-computation experts take weight from the others")
    elif config.copy_experts or config.constant_experts:
        found.append("copy and constant experts add to the dense function")
    return tuple(found)


def _of_experts(config: CrosswaysConfig, granularity: int, grouped: bool) -> list[str]:
    select = build_selection(config.select or "top_k")
    found = []
    if config.negated_experts:
        found.append("experts may also be subtracted")
    if not config.renormalize:
        found.append("weights are not renormalised: their sum differs from token to token")
    if select.name not in ALWAYS_SOMEBODY:
        found.append(f"under selection {select.name!r} a token may go without an expert")
    if granularity > 1:
        if not isinstance(select, TopK):
            found.append(f"selection {select.name!r} does not choose whole copies of {granularity} shards")
        elif select.k % granularity:
            found.append(f"k = {select.k} experts are not whole copies of {granularity} shards")
        elif not grouped:
            why = "" if isinstance(build_gate(config.gate), Linear) else f" (gate {build_gate(config.gate).name!r})"
            found.append(f"the shards of a copy have different rows of the gate{why}")
    if config.weights_on == "input" and not (config.renormalize and getattr(select, "k", None) in (1, granularity)):
        found.append("weights on what experts read, other than one, change what they compute")
    wanted = restoring_scale(config, granularity)
    if config.weight_scale != wanted:
        found.append(f"weight_scale is {config.weight_scale:g}, not {wanted:g}")
    return found
