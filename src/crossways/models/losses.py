"""The auxiliary losses of a whole model, computed from what was executed and returned, never stored.

Legend: R routers, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from crossways.models.configuration import CrosswaysConfig
from crossways.routing import GateNoise, Routing
from crossways.rules.balance import (
    balance_product,
    communication_balance_loss,
    device_balance_loss,
    entropy_loss,
    excess_load_loss,
    importance_loss,
    load_loss,
    mutual_information_loss,
    normalised,
    over_experts,
    router_z_loss,
    sequence_balance_loss,
    sequence_entropy_loss,
    sparsity_loss,
    zero_reward,
)
from crossways.rules.select import GroupLimited, build_selection

AUXILIARY_LOSSES = (
    "load_balance",
    "sequence_balance",
    "device_balance",
    "communication_balance",
    "importance",
    "load",
    "excess_load",
    "entropy",
    "sequence_entropy",
    "mutual_information",
    "router_z",
    "zero_reward",
    "gate",
    "sparsity",
)
"""Every name that `auxiliary_losses` may give."""


def auxiliary_losses(
    routings: Sequence[Routing], config: CrosswaysConfig
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Losses per router, and their weighted sum over routers.

    Summing over routers, not averaging, is Switch Transformers' form (arXiv 2101.03961, section 2.2: the loss is
    added for each layer); a Cartesian layer therefore adds one term per factor.

    The sparsity loss of ReMoE has no fixed weight but the routers' own, and is averaged over routers as in its paper.

    Returns:
        Name to (R,), unweighted, only those in use and only the routers that have one, and a scalar. Routers that
        repeat another's decision have none, those whose choice is fixed no balance loss, gates without noise (and
        none has any outside training) no load loss, and most gates no loss of their own.
    """
    routings = [_in_float32(routing) for routing in routings if not routing.reused]
    losses: dict[str, Tensor] = {}
    total: Tensor | float = 0.0
    for name, (coef, loss) in _terms(config).items():
        having = [value for routing in routings if (value := loss(routing)) is not None] if coef else []
        if having:
            losses[name] = torch.stack(having)
            total = total + coef * losses[name].sum()
    if config.sparsity_budget and routings:
        losses["sparsity"] = torch.stack(
            [sparsity_loss(r.scores_TE, r.assignment, config.sparsity_budget, r.valid_T) for r in routings]
        )
        coef_R = torch.stack([cast(Tensor, r.sparsity_coef) for r in routings])
        total = total + (coef_R * losses["sparsity"]).mean()
    return losses, total


def _terms(config: CrosswaysConfig) -> dict[str, tuple[float, Callable[[Routing], Tensor | None]]]:
    """Coefficient and function of each loss with a fixed coefficient, by name."""

    def load_balance(r: Routing) -> Tensor | None:
        if config.load_balance_probs == "cosine" and r.cosine_TE is None:  # outside training
            return None
        load_E = _counted(r, config)
        pairs = load_E.sum()
        if config.zero_computation_experts:
            share_E = torch.ones_like(load_E)
            share_E[config.num_experts :] = config.zero_computation_balance
            load_E = load_E * share_E
        probs_TE = _probs(r, config)
        if config.load_balance_over == "experts":
            load_E, probs_TE = over_experts(load_E, probs_TE, config.num_experts, config.negated_experts)
            pairs = load_E.sum()
        return balance_product(load_E, pairs, probs_TE, r.valid_T)

    def sequence_balance(r: Routing) -> Tensor:
        return sequence_balance_loss(r.scores_TE, r.assignment, r.num_rows, r.valid_T)

    def device_balance(r: Routing) -> Tensor:
        return device_balance_loss(r.logits_TE, r.assignment, config.num_groups, r.valid_T, r.num_rows)

    def communication_balance(r: Routing) -> Tensor:
        select = cast(GroupLimited, build_selection(config.select or "top_k"))
        return communication_balance_loss(
            r.logits_TE, r.assignment, select.n_group, select.topk_group, r.valid_T, r.num_rows
        )

    def load(r: Routing) -> Tensor | None:
        if r.noise is None:  # outside training
            return None
        return load_loss(r.logits_TE, r.noise.clean, r.noise.scale, r.assignment, r.valid_T)

    def learning(loss: Callable[[Routing], Tensor | None]) -> Callable[[Routing], Tensor | None]:
        return lambda r: None if r.fixed else loss(r)

    return {
        "load_balance": (config.load_balance_coef, learning(load_balance)),
        "sequence_balance": (config.sequence_balance_coef, learning(sequence_balance)),
        "device_balance": (config.device_balance_coef, learning(device_balance)),
        "communication_balance": (config.communication_balance_coef, learning(communication_balance)),
        "importance": (config.importance_coef, learning(lambda r: importance_loss(r.assignment))),
        "load": (config.load_coef, learning(load)),
        "excess_load": (
            config.excess_load_coef,
            learning(lambda r: excess_load_loss(r.logits_TE, r.asked or r.assignment, r.valid_T)),
        ),
        "entropy": (config.entropy_coef, learning(lambda r: entropy_loss(r.logits_TE, r.valid_T))),
        "sequence_entropy": (
            config.sequence_entropy_coef,
            learning(lambda r: sequence_entropy_loss(r.logits_TE, r.num_rows, r.valid_T)),
        ),
        "mutual_information": (
            config.mutual_information_coef,
            learning(lambda r: mutual_information_loss(r.logits_TE, r.valid_T)),
        ),
        "router_z": (config.router_z_loss_coef, lambda r: router_z_loss(r.logits_TE, r.valid_T)),
        "zero_reward": (
            config.zero_reward_coef,
            learning(lambda r: zero_reward(r.scores_TE, config.zero_slots, r.valid_T)),
        ),
        "gate": (config.gate_loss_coef, lambda r: r.gate_loss),
    }


def _probs(r: Routing, config: CrosswaysConfig) -> Tensor:
    """The probabilities of the load-balance loss, float32 (T, E)."""
    if config.load_balance_probs == "scores":
        return normalised(r.scores_TE)
    if config.load_balance_probs == "cosine":
        return (cast(Tensor, r.cosine_TE).float() / config.load_balance_temperature).softmax(-1)
    return (r.logits_TE.float() / config.load_balance_temperature).softmax(-1)


def _counted(r: Routing, config: CrosswaysConfig) -> Tensor:
    """What the load-balance loss counts, float32 (E,)."""
    if r.gathered_load_E is not None:
        return r.gathered_load_E
    if config.load_balance_scope != "batch" and r.earlier_load_E is not None:
        return r.earlier_load_E + r.assignment.load_E()
    asked = r.asked or r.assignment
    if config.load_balance_pairs == "first":
        first_T = asked.top_expert_T()
        return first_T[first_T >= 0].bincount(minlength=asked.num_experts).float()
    return (asked if config.load_balance_pairs == "asked" else r.assignment).load_E().float()


def _in_float32(r: Routing) -> Routing:
    """What a router in float64 said; losses are float32 like the language model's."""
    if r.logits_TE.dtype == torch.float32:
        return r
    noise = None if r.noise is None else GateNoise(r.noise.clean.float(), r.noise.scale.float())
    gate_loss = None if r.gate_loss is None else r.gate_loss.float()
    return replace(r, logits_TE=r.logits_TE.float(), scores_TE=r.scores_TE.float(), noise=noise, gate_loss=gate_loss)


def share_of_step(labels_BS: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This batch's share of the labels of an optimizer step: 1 unless gradients are accumulated.

    The language-model loss is then a sum over the batch divided by the step's labels; auxiliary losses are means and
    need the same share, or accumulation would multiply them.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels_BS[:, 1:] != -100).sum() / num_items_in_batch
