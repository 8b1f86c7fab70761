"""How the gates of an upcycled model start.

Legend: E experts, D model width, G shards, C = E / G copies.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from crossways.errors import UserError
from crossways.gates import Linear, LinearGate, build_gate
from crossways.models.configuration import CrosswaysConfig
from crossways.models.modeling import CrosswaysForCausalLM
from crossways.rules.select import TopK, build_selection
from crossways.surgery.upcycle.settings import UpcycleSettings

Start = Literal["random", "groups", "centres"]


def choose_start(config: CrosswaysConfig, settings: UpcycleSettings) -> Start:
    """What `auto` means here; raises `UserError` for a start that is asked for and cannot be.

    Groups where top-k can choose whole copies; centres where it chooses some shards of a single copy; else random.
    """
    linear, copies = isinstance(build_gate(config.gate), Linear), config.num_experts // settings.granularity
    own_gates = (
        len({gate for gates in config.gate_plan for gate in gates}) == len(config.routed_layers) * config.factors
    )
    asked = settings.gate_start
    if asked in ("groups", "centres") and not linear:
        raise UserError(
            f"gate_start {asked!r} sets rows of a linear gate; this one is {build_gate(config.gate).name!r}"
        )
    if asked == "centres" and not (copies == 1 and own_gates):
        raise UserError(
            f"gate_start 'centres' needs one expert per shard and a gate per layer; there are {copies} copies, "
            f"{len(config.routed_layers)} layers and sharing {config.sharing}"
        )
    if asked != "auto":
        return asked
    if not linear or settings.granularity == 1 or settings.carrier == "shared":
        return "random"
    select = build_selection(config.select or "top_k")
    if isinstance(select, TopK) and select.k % settings.granularity == 0:
        return "groups"
    return "centres" if copies == 1 and own_gates else "random"


def start_in_groups(model: CrosswaysForCausalLM, granularity: int) -> None:
    """Give the G shards of each copy the row of its first, in the first factor's gates, in place."""
    config = model.config
    for gate in {gates[0] for gates in config.gate_plan}:
        linear = cast(LinearGate, model.model.gates[gate])
        for parameter in linear.parameters():
            rows = parameter.data[: config.num_experts]
            rows.copy_(rows[::granularity].repeat_interleave(granularity, dim=0))


CENTRE_LENGTH = 0.1
"""Length of a row that points to a centre, relative to a random one: inputs lie along the centres, and weights must
start nearly equal, as they are exactly in MoEfication."""


def start_at_centres(gate: LinearGate, centre_ED: Tensor) -> None:
    """Point each row to its shard's mean input weights, in place (MoEfication's "parameter centre" selection, arXiv
    2110.01786, section 3.3)."""
    with torch.no_grad():
        rows_ED = gate.weight[: len(centre_ED)]
        length = rows_ED.norm(dim=1).mean()
        rows_ED.copy_(torch.nn.functional.normalize(centre_ED.to(rows_ED), dim=1) * CENTRE_LENGTH * length)
