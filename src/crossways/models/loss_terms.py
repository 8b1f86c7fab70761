"""The auxiliary losses with a coefficient in the configuration: what each is of one routing.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from crossways.models.configuration import CrosswaysConfig
from crossways.routing import Routing
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
    zero_reward,
)
from crossways.rules.select import GroupLimited, build_selection


@dataclass(frozen=True)
class Term:
    """One loss of one routing, a scalar, or None where a router has none."""

    coef: str
    """The field of the configuration that holds its coefficient."""
    loss: Callable[[Routing, CrosswaysConfig], Tensor | None]
    also_of_fixed: bool = False
    """Whether a router whose choice is fixed has it too."""

    def __call__(self, routing: Routing, config: CrosswaysConfig) -> Tensor | None:
        """The loss, in float32."""
        return None if routing.fixed and not self.also_of_fixed else self.loss(routing, config)


def _load_balance(r: Routing, config: CrosswaysConfig) -> Tensor | None:
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


def _communication_balance(r: Routing, config: CrosswaysConfig) -> Tensor:
    select = cast(GroupLimited, build_selection(config.select or "top_k"))
    groups = select.n_group, select.topk_group
    return communication_balance_loss(r.logits_TE, r.assignment, *groups, r.valid_T, r.num_rows)


def _load(r: Routing, config: CrosswaysConfig) -> Tensor | None:
    if r.noise is None:  # outside training
        return None
    return load_loss(r.logits_TE, r.noise.clean, r.noise.scale, r.assignment, r.valid_T)


def _sequence_balance(r: Routing, config: CrosswaysConfig) -> Tensor:
    return sequence_balance_loss(r.scores_TE, r.assignment, r.num_rows, r.valid_T)


def _device_balance(r: Routing, config: CrosswaysConfig) -> Tensor:
    return device_balance_loss(r.logits_TE, r.assignment, config.num_groups, r.valid_T, r.num_rows)


def _excess_load(r: Routing, config: CrosswaysConfig) -> Tensor:
    return excess_load_loss(r.logits_TE, r.asked or r.assignment, r.valid_T)


def _zero_reward(r: Routing, config: CrosswaysConfig) -> Tensor:
    return zero_reward(r.scores_TE, config.zero_slots, r.valid_T)


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


TERMS: dict[str, Term] = {
    "load_balance": Term("load_balance_coef", _load_balance),
    "sequence_balance": Term("sequence_balance_coef", _sequence_balance),
    "device_balance": Term("device_balance_coef", _device_balance),
    "communication_balance": Term("communication_balance_coef", _communication_balance),
    "importance": Term("importance_coef", lambda r, _: importance_loss(r.assignment)),
    "load": Term("load_coef", _load),
    "excess_load": Term("excess_load_coef", _excess_load),
    "entropy": Term("entropy_coef", lambda r, _: entropy_loss(r.logits_TE, r.valid_T)),
    "sequence_entropy": Term(
        "sequence_entropy_coef", lambda r, _: sequence_entropy_loss(r.logits_TE, r.num_rows, r.valid_T)
    ),
    "mutual_information": Term(
        "mutual_information_coef", lambda r, _: mutual_information_loss(r.logits_TE, r.valid_T)
    ),
    "router_z": Term("router_z_loss_coef", lambda r, _: router_z_loss(r.logits_TE, r.valid_T), also_of_fixed=True),
    "zero_reward": Term("zero_reward_coef", _zero_reward),
    "gate": Term("gate_loss_coef", lambda r, _: r.gate_loss, also_of_fixed=True),
}
"""By name, in the order in which they are reported."""
