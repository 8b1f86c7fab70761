"""What a model costs before it is trained: parameters in total and per token, and operations per training token.

Conventions. Parameters include embeddings and head, which the `non_embedding` counts leave out; a shared tensor
counts once. *Active* is what one token uses at the selection's mean budget k: all but the experts it skips.
Operations are those of matrix products, 2 m n k each, the backward pass twice the forward; attention's two products
are counted over the full S x S square, not its causal half (as torch's counter does, and PaLM, arXiv 2204.02311,
appendix B). Norms, biases, activations, rotary embeddings, the optimizer and recomputation under gradient
checkpointing are left out.

Legend: S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from crossways.errors import UserError
from crossways.experts.module import Experts
from crossways.gates import Gate
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.models.routed_attention import HeadExperts
from crossways.rules.registry import describe
from crossways.rules.select import Selection, Threshold, build_selection


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    total: int
    """All of them."""
    active: int
    """Those one token uses at the mean budget, rounded to a whole number."""
    router: int
    """Those of all gates."""
    total_non_embedding: int
    """`total` without input embedding and head."""
    active_non_embedding: int
    """`active` without input embedding and head."""


def build_on_meta(config: CrosswaysConfig) -> CrosswaysForCausalLM:
    """The model with shapes and no memory, of any size."""
    with torch.device("meta"):
        return CrosswaysForCausalLM(config)


def mean_budget(config: CrosswaysConfig) -> float:
    """Experts per token and router that the configured selection spends on average, k; may be fractional. Of a
    scheduled one, what it arrives at, so operations counted with it are those of the last training step.

    A capacity is counted as if nobody were dropped. Zero-computation experts are counted as chosen like all others.

    Raises:
        UserError: for a selection whose budget depends on the text: a threshold with a fixed value, top-p, and
            `positive` unless `sparsity_budget` says what it is trained to spend.
    """
    return _budget_of(build_selection(config.select or "top_k"), config.sparsity_budget)


def _budget_of(selection: Selection, otherwise: float = 0.0) -> float:
    fixed = isinstance(selection, Threshold) and selection.value is not None
    budget = getattr(selection, "k_end", None) or getattr(selection, "k", None) or otherwise
    if fixed or not budget:
        raise UserError(
            f"the budget of {describe(selection)} depends on the text, so its active parameters and FLOPs cannot be "
            "counted; use a selection with a budget `k` (a threshold without `value`), or for `positive` a "
            "`sparsity_budget`"
        )
    return float(budget)


def _share_used(config: CrosswaysConfig) -> float:
    """The share of its experts' weights that a router's token uses, all slots being chosen alike. A token in both
    slots of an expert, which executes it once, is counted twice, but not beyond all experts."""
    return min(mean_budget(config) * (1 + config.negated_experts) / config.router_size, 1.0)


def count_parameters(config: CrosswaysConfig) -> ParameterCounts:
    """Exact counts, taken from the model built on the meta device.

    Raises:
        UserError: if the selection's mean budget is not known beforehand.
    """
    model = build_on_meta(config)
    total = _size(model)
    experts = sum(_size(module) for module in model.modules() if isinstance(module, Experts))
    used = _share_used(config) if experts else 0.0
    used = min(used * config.rounds, 1.0)  # another round takes other experts of a layer, as long as there are any
    of_heads, gates = 0, _size(model.model.gates)
    for module in model.modules():
        if isinstance(module, HeadExperts):
            of_heads += round(module.weight.numel() * max(1.0 - _share_of_head(module) * config.rounds, 0.0))
            gates += _size(module.gate)
    active = total - experts + round(experts * used) - of_heads
    embedding = len({id(p): p for p in (model.model.embed_tokens.weight, model.lm_head.weight)})
    embedding *= config.vocab_size * config.hidden_size
    return ParameterCounts(
        total=total,
        active=active,
        router=gates,
        total_non_embedding=total - embedding,
        active_non_embedding=active - embedding,
    )


def forward_flops_per_token(config: CrosswaysConfig, sequence_length: int) -> float:
    """Matrix-product operations per token of a forward pass over windows of S tokens, without the loss."""
    model = build_on_meta(config)
    experts_used = _share_used(config) if config.routed_layers else 0.0
    weights = 0.0
    gates, layers = set(model.model.gates.modules()), set(model.model.layers.modules())
    for module in model.modules():
        times = config.rounds if module in layers else 1
        if isinstance(module, nn.Linear) and module not in gates:
            weights += _size(module) * times
        elif isinstance(module, HeadExperts):
            weights += (module.weight.numel() * _share_of_head(module) + module.gate.weights_per_token()) * times
        elif isinstance(module, Experts):
            matrices = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 3)
            weights += matrices * experts_used * times
    # A shared gate is stored once and applied by every router that shares it, unless that repeats a decision.
    reuses = config.sharing_plan.reuses_decision
    applied = [gate for layer, planned in enumerate(config.gate_plan) if not reuses(layer) for gate in planned]
    weights += sum(cast(Gate, model.model.gates[gate]).weights_per_token() for gate in applied)
    attention_width = config.num_attention_heads * (config.head_dim or 0)
    products = 2 * sequence_length * attention_width * config.num_hidden_layers
    return 2.0 * (weights + products)


def training_flops_per_token(config: CrosswaysConfig, sequence_length: int) -> float:
    """Operations per training token, forward and backward: three times `forward_flops_per_token`.

    Args:
        config: the model.
        sequence_length: S, tokens in a training window.
    """
    return 3.0 * forward_flops_per_token(config, sequence_length)


def _share_of_head(module: HeadExperts) -> float:
    """What a head uses of its experts."""
    return _budget_of(module.select) / module.num_experts


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
