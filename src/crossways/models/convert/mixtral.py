"""Mixtral: every layer routed, weights of a token that sum to one, no shared expert."""

from __future__ import annotations

from transformers import MixtralConfig, MixtralForCausalLM

from crossways.errors import UserError
from crossways.models.configuration import CrosswaysConfig
from crossways.models.convert.fields import common_fields, hidden_act, routing
from crossways.models.convert.refusals import refused, token_choice_k
from crossways.models.convert.weights import filled, with_gates_in_model, with_gates_per_layer
from crossways.models.modeling import CrosswaysForCausalLM


def to_mixtral(model: CrosswaysForCausalLM) -> MixtralForCausalLM:
    """A Mixtral with the weights and logits of `model`.

    Raises:
        UserError: naming what the family cannot express.
    """
    config, k = model.config, token_choice_k(model, "Mixtral")
    impossible = {
        "not every layer is routed": len(config.routed_layers) < config.num_hidden_layers,
        "there is a shared expert": bool(config.shared_expert_intermediate_size),
        "weights are not renormalised": not config.renormalize,
        "attention has biases": config.attention_bias,
    }
    for reason, holds in impossible.items():
        if holds:
            raise refused("Mixtral", reason)
    theirs = MixtralConfig(
        **common_fields(config),
        hidden_act=hidden_act(config, "Mixtral", dense=False),
        intermediate_size=config.moe_intermediate_size,
        num_local_experts=config.num_experts,
        num_experts_per_tok=k,
        router_aux_loss_coef=0.0,
    )
    return filled(MixtralForCausalLM, theirs, with_gates_per_layer(model.state_dict(), config), model)


def from_mixtral(model: MixtralForCausalLM) -> CrosswaysForCausalLM:
    """Our model with the weights and logits of a Mixtral.

    Raises:
        UserError: if it uses sliding-window attention.
    """
    theirs = model.config
    if theirs.sliding_window is not None:
        raise UserError("this Mixtral uses sliding-window attention, which crossways models do not have")
    config = CrosswaysConfig(
        **common_fields(theirs),
        **routing(theirs.hidden_act, theirs.num_experts_per_tok, True),
        num_experts=theirs.num_local_experts,
        moe_intermediate_size=theirs.intermediate_size,
        intermediate_size=theirs.intermediate_size,
    )
    return filled(CrosswaysForCausalLM, config, with_gates_in_model(dict(model.state_dict()), config), model)
