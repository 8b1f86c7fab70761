"""Our expert compute inside transformers' models: `experts_implementation="crossways"`.

Transformers hands an implementation the experts module and each token's K experts. What we need of the module is its
layout: two stacked tensors and an activation between them, as `ExpertsInterface` describes it. A module that has more
(biases, a gate of its own, a norm after each expert) runs in transformers' own implementation, with a warning that
says why; `experts_report` lists what runs where.

Legend: T tokens, E experts, K experts per token, D model width, F expert width, H rows of the first matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.compute import compute_experts, resolve_backend
from crossways.rectangle import from_rectangle

NAME = "crossways"
_PROBE = (-6.0, -2.5, -1.0, -0.3, 0.0, 0.4, 1.0, 2.0, 5.0)
_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}


class ExpertsFallbackWarning(UserWarning):
    """An experts module runs in another implementation than the one that was asked for; the message says why."""


@dataclass(frozen=True)
class Plan:
    """How one experts module is run."""

    backend: str
    """One of `crossways.experts.backends()`, or `eager` for the module's own loop."""
    reason: str | None
    """Why it is not one of ours; None where it is."""
    activation: Activation | None = None
    """What stands between its matrices, where that is one of ours."""


def register_experts() -> None:
    """Make `experts_implementation="crossways"` known to transformers. Idempotent.

    Afterwards `from_pretrained(..., experts_implementation="crossways")` or `model.set_experts_implementation(
    "crossways")` runs the experts of any transformers MoE here.
    """
    ExpertsInterface.register(NAME, experts_forward)


def experts_report(model: nn.Module) -> dict[str, Plan]:
    """Which backend runs each experts module of a transformers model, by module name, and why if it is not ours.

    It judges the weights as they are now; tensors of another device or dtype at run time may be treated differently.
    """
    return {name: plan_experts(module) for name, module in model.named_modules() if _is_experts(module)}


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of the module's `forward`.

    Args:
        self: the experts module.
        hidden_states: (T, D).
        top_k_index: int64 (T, K); E or more marks a pair that belongs to no expert of this process.
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of `hidden_states`.
    """
    plan = plan_experts(self)
    if plan.activation is None:
        warnings.warn(
            f"{type(self).__name__} runs in transformers' {plan.backend!r} instead of crossways: {plan.reason}",
            ExpertsFallbackWarning,
            stacklevel=2,
        )
        short = plan.backend.removeprefix("transformers:")
        forward = ALL_EXPERTS_FUNCTIONS.get(short, getattr(type(self).forward, "__wrapped__", None))
        return forward(self, hidden_states, top_k_index, top_k_weights)
    module: Any = self
    assignment = _assignment(module, top_k_index, top_k_weights, module.down_proj.shape[0])
    return compute_module(self, hidden_states, assignment, plan.activation, plan.backend)


def _assignment(module: Any, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Assignment:
    # Looking for sentinels would make a GPU wait, so there we trust the module to say whether there are any.
    if index_TK.is_cpu or may_hold_a_part(module):
        return from_rectangle(index_TK, weight_TK, num_experts)
    return Assignment.from_topk(index_TK, weight_TK, num_experts)


def may_hold_a_part(module: Any) -> bool:
    """Whether some of its experts may be on other devices. Where transformers does not say, as 5.17 does not, a
    `forward` of the module's own may be what brings tokens there."""
    return getattr(module, "_is_expert_parallel", "forward" in vars(module))


def _matrices(module: Any) -> tuple[Tensor, Tensor]:
    """(E, H, D) and (E, D, F)."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    return (up.mT, down.mT) if module.is_transposed else (up, down)


def _is_experts(module: Any) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def plan_experts(module: nn.Module) -> Plan:
    """How `module` would be run: in ours where its layout is the plain one, else in transformers'."""
    activation = plain_activation(module)
    if isinstance(activation, str):
        return Plan(_fallback(module), activation)
    up_EHD, _ = _matrices(module)
    device = "cpu" if up_EHD.is_cpu else up_EHD.device
    return Plan(resolve_backend("auto", device, up_EHD.dtype), None, activation)


def compute_module(
    module: nn.Module, x: Tensor, assignment: Assignment, activation: Activation, backend: str = "auto"
) -> Tensor:
    """What an experts module of the plain layout computes for an assignment.

    Args:
        module: the experts; its weights are read once, as adapters may make them anew each time.
        x: (T, D).
        assignment: the pairs.
        activation: `plain_activation` of the module.
        backend: as for `compute_experts`.

    Returns:
        (T, D) in the dtype of `x`.
    """
    up_EHD, down_EDF = _matrices(module)
    x_TD = x if torch.is_autocast_enabled(x.device.type) else x.to(up_EHD.dtype)
    return compute_experts(x_TD, assignment, up_EHD, down_EDF, activation, backend).to(x.dtype)


def plain_activation(module: Any) -> Activation | str:
    """What stands between the module's matrices, or why the module is not ours to run."""
    if not _is_experts(module):
        return "its experts do not say how their weights lie"
    if module.has_bias:
        return "its experts have biases"
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm after each expert"
    if module.has_gate and type(module)._apply_gate is not moe._default_apply_gate:
        return "it has a gate function of its own"
    if not module.is_concatenated:
        return "its gate and value rows are interleaved"
    weights = [module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj]
    if any(type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 3 for weight in weights):
        return f"its weights are {', '.join(type(weight).__name__ for weight in weights)}, not plain stacked tensors"
    if not all(weight.is_floating_point() and weight.element_size() >= 2 for weight in weights):
        return f"its weights are {weights[0].dtype}"
    name = _name_of(module.act_fn)
    if name is None:
        return f"its activation is {module.act_fn}, not SiLU, GELU or ReLU"
    return Activation(_GATED[name] if module.has_gate else name)


@lru_cache(maxsize=32)
def _name_of(function: Any) -> str | None:
    """Which known function this is: told by its values, as transformers has several classes for each."""
    probe = torch.tensor(_PROBE, dtype=torch.float64)
    with torch.no_grad():
        values = function(probe)
    if values.shape != probe.shape:
        return None
    matches = [name for name, known in _KNOWN.items() if torch.allclose(values.double(), known(probe), atol=1e-12)]
    return matches[0] if matches else None


def _fallback(module: Any) -> str:
    """Transformers' fastest implementation that takes this module."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    widths = (*up.shape[1:], *module.down_proj.shape[1:])
    plain = up.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = plain and all(width * up.element_size() % 16 == 0 for width in widths)
    return "transformers:grouped_mm" if aligned and hasattr(functional, "grouped_mm") else "eager"
