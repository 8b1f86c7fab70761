"""What no family of softmax top-k can express, refused with the reason."""

from __future__ import annotations

from crossways.errors import UserError
from crossways.gates import Linear, build_gate
from crossways.models.convert.weights import is_expert_bias
from crossways.models.modeling import CrosswaysForCausalLM
from crossways.rules.score import Score, Softmax, Unified, build_score
from crossways.rules.select import TopK, build_selection


def refused(family: str, reason: str) -> UserError:
    return UserError(f"{family} cannot express this model: {reason}")


def token_choice_k(model: CrosswaysForCausalLM, family: str) -> int:
    """Experts per token, after refusing every routing but softmax top-k in plain layers."""
    config = model.config
    select = build_selection(config.select or "top_k")
    if config.factors != 1:
        raise refused(family, f"its layers are Cartesian with {config.factors} factors")
    if not isinstance(select, TopK):
        raise refused(family, f"its selection is {select.name!r}, not 'top_k'")
    if not _plain_softmax(score := build_score(config.score)):
        raise refused(family, f"its score is {score.name!r}, not 'softmax'")
    if not isinstance(gate := build_gate(config.gate), Linear):
        raise refused(family, f"its gate is {gate.name!r}, not 'linear'")
    if gate.bias:
        raise refused(family, "its gates have biases")
    if config.attention_experts:
        raise refused(family, f"its heads choose among {config.attention_experts} experts")
    if config.rounds > 1:
        raise refused(family, f"it goes through its {config.distinct_layers} layers {config.rounds} times")
    if any(map(config.sharing_plan.reuses_decision, range(len(config.routed_layers)))):
        raise refused(family, "layers repeat the decision of the layer before")
    if config.negated_experts:
        raise refused(family, "its experts may also be subtracted")
    if not isinstance(config.renormalize, bool):
        raise refused(family, f"its weights are scaled by renormalize {config.renormalize!r}")
    if config.zero_computation_experts:
        raise refused(family, f"it has {config.zero_computation_experts} zero-computation experts")
    if config.qk_norm:
        raise refused(family, "attention normalises queries and keys")
    if any(router.has_bias and bool(router.bias.any()) for router in model.model.routers):
        raise refused(family, "its choices are biased by loss-free or quantile balancing")
    if config.moe_latent_size:
        raise refused(family, f"its experts live in a smaller space of width {config.moe_latent_size}")
    if config.weights_on != "output":
        raise refused(family, f"its weights multiply each expert's {config.weights_on}")
    if any(bool(parameter.any()) for name, parameter in model.named_parameters() if is_expert_bias(name)):
        raise refused(family, "its experts have biases that are not zero")
    if config.mlp_bias:
        raise refused(family, "its dense layers have biases")
    if any(router.perturbation is not None for router in model.model.routers):
        raise refused(family, "a perturbation is installed on its routers")
    return select.k


def _plain_softmax(score: Score) -> bool:
    return isinstance(score, Softmax) or (isinstance(score, Unified) and score.alpha == 1.0)
