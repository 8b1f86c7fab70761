"""`CrosswaysConfig`: a LLaMA-style model whose routing is plain JSON."""

# Without `from __future__ import annotations`: `strict` only checks types that are not strings.
import functools
import os
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from crossways.errors import UserError
from crossways.gates import build_gate
from crossways.models.checks import check_configuration
from crossways.rules.select import build_selection
from crossways.sharing import Repeated, Sharing, build_sharing

POINTER_MODULE = "modeling_crossways"
POINTER_SOURCE = '''"""Leads transformers' Auto classes to the installed `crossways` package."""

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM, CrosswaysModel

__all__ = ["CrosswaysConfig", "CrosswaysForCausalLM", "CrosswaysModel"]
'''
AUTO_MAP = {
    "AutoConfig": f"{POINTER_MODULE}.CrosswaysConfig",
    "AutoModel": f"{POINTER_MODULE}.CrosswaysModel",
    "AutoModelForCausalLM": f"{POINTER_MODULE}.CrosswaysForCausalLM",
}

C = TypeVar("C", bound=type)


def user_errors(cls: C) -> C:
    """Class decorator: a constructor that says in one line, as `UserError`, what `strict` wraps in several."""
    construct = cls.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except StrictDataclassError as error:
            cause = error.__cause__
            message = " ".join(str(cause or error).split())
            raise UserError(message) from error

    cls.__init__ = constructor  # type: ignore[misc]
    return cls


@user_errors
@strict
class CrosswaysConfig(LlamaConfig):
    """Configuration of `CrosswaysModel`: everything of `LlamaConfig`, and which layers are routed and how.

    Rules (`gate`, `score`, `select`, `sharing`) are a name or a dictionary `{"name": ..., field: value}`; they are
    stored as dictionaries. Raises `UserError` for an impossible combination.

    Saving also writes a module of two import lines and an `auto_map`, so that a program that knows only transformers
    can load the model with `trust_remote_code=True` wherever crossways is installed.
    """

    model_type = "crossways"

    qk_norm: bool = False
    """Normalise each head's queries and keys (RMSNorm before the rotary embedding), as Qwen3 does."""
    attention_experts: int = 0
    """Experts of each head for each of its routed projections (SwitchHead); 0 is plain attention, 2 to 8 with fewer
    heads there. Needs `attention_bias` off."""
    attention_projections: list[str] | None = None
    """What heads have experts for: some of `query`, `key`, `value` and `output`; by default the last two, as in the
    paper."""
    attention_score: str | dict[str, Any] = "sigmoid"
    """Score rule of heads that choose experts; of the token alone, `sigmoid` in the paper."""
    attention_select: str | dict[str, Any] | None = None
    """Selection rule of heads that choose experts; of the token alone, by default token choice with k = 2."""
    moe_every: int = 1
    """Every n-th layer is routed, the n-th first (n = 2: the second, fourth, ...); 1 is all, 0 none (dense)."""
    moe_layers: list[int] | None = None
    """Which layers are routed, from 0 and ascending (`[0, 2, 3]`), in place of `moe_every`, which stays at 1; any
    pattern. None leaves it to `moe_every`."""
    distinct_layers: int = 0
    """Layers with parameters of their own, which the model goes through again and again until it has gone through
    `num_hidden_layers`: layer i + n is layer i (MoEUT). Divides that number, 1 to 4 customary; 0 is all."""
    layer: str = "moe"
    """Kind of routed layer: `moe`, or `cartesian` for routed sub-layers in sequence."""
    num_factors: int = 2
    """Sub-layers of a `cartesian` layer, each with its own router and experts; 2 in the paper, 1 equals `moe`."""
    cartesian_skip: str = "factor"
    """Where a Cartesian layer's last residual starts: the previous `factor`'s output, or the layer's `input`."""
    router_input: str = "factor"
    """What the routers of a `cartesian` layer read: what the previous `factor` wrote, as in the paper, or all of them
    the `layer`'s input (the control without composition of choices)."""
    num_experts: int = 16
    """Routed experts per router (per factor in a Cartesian layer); customary 8 to 256."""
    moe_intermediate_size: int = 1024
    """Width F of a routed expert; fine-grained experts have a fraction of the dense width."""
    moe_latent_size: int = 0
    """Width of a smaller space that the routed experts, but not router and shared expert, read and write, between two
    projections that the layer owns (Megatron-core); 0 is off, else a quarter to a half of `hidden_size`."""
    expert_bias: bool = False
    """Whether routed experts have biases on both of their products (gpt-oss); they start at zero."""
    weights_on: str = "output"
    """What routing weights multiply: each expert's `output`, or its `input` (Llama 4, with score `sigmoid`)."""
    shared_expert_intermediate_size: int = 0
    """Width of the shared expert (of each factor in a Cartesian layer); 0 for none. Any width is allowed."""
    shared_expert_scale: float | int = 1.0
    """Factor on the shared expert's output; 0.5, with `weight_scale` 0.5, averages it with the routed part (LibMoE),
    1 is customary."""
    shared_expert_gate: bool = False
    """Multiply the shared expert's output by sigmoid(w x) with a learnt w (Qwen2-MoE)."""
    zero_experts: int = 0
    """Experts that return nothing, beside the `num_experts` (MoE++); 0 for none, 1 in the paper."""
    copy_experts: int = 0
    """Experts that return their input (MoE++); 0 for none, 1 in the paper."""
    constant_experts: int = 0
    """Experts that blend their input with a learnt vector (MoE++); 0 for none, 1 to 6 in the paper."""
    negated_experts: bool = False
    """Give each routed expert a second slot, in which it is subtracted (TC-MoE): routers choose among `num_experts`
    that add, as many that subtract, then zero, copy and constant experts."""
    negated_logit_offset: float | int = 0.0
    """Added to the logits of the slots that subtract; 0 is off, -1 in TC-MoE's code, so that most pairs add."""
    zero_logit_offset: float | int = 0.0
    """Added to the logits of zero experts; 0 is off, -10 in TC-MoE's code, so that they are chosen once they learn
    to."""
    expert_activation: str = "swiglu"
    """Activation of routed and shared experts: swiglu, geglu, reglu, silu, gelu or relu."""
    gate: str | dict[str, Any] = "linear"
    """What maps hidden states to logits: `linear`, `random` (frozen), `cosine` (X-MoE), `low_rank` and `recurrent`
    (which make the most of a shared gate), `hash` (of token ids), `noisy`, or `stable` (distilled, then frozen)."""
    score: str | dict[str, Any] = "softmax"
    """Score rule, e.g. `softmax`, `sigmoid`, `relu` or `{"name": "unified", "alpha": 0.5}`."""
    select: str | dict[str, Any] | None = None
    """Selection rule, e.g. `{"name": "top_c", "k": 2, "group": "sequence"}`; by default token choice with k = 2."""
    renormalize: bool | str = False
    """Scale each token's chosen weights to sum to one (as Mixtral does; OLMoE and USMoE do not). `softmax` takes the
    softmax of the chosen scores instead (LibMoE's X-MoE); `with_zero` has them sum to one together with the scores of
    all zero experts (TC-MoE)."""
    weight_scale: float | int = 1.0
    """Factor on all weights, after renormalising (DeepSeek's `routed_scaling_factor`); 1 is off, 2.5 in V3."""
    expert_dropout: float | int = 0.0
    """Probability that a token may not choose an expert in a training step (sigma-MoE); 0 is off, 0.05 there."""
    router_dropout: float | int = 0.0
    """Dropout of what the routers, not the experts, read in training; 0 is off, 0.1 customary."""
    router_dtype: str = "float32"
    """What routers compute logits and scores in, and compare: `float32`, or `float64`, slower, for near ties."""
    router_initializer_range: float | int = 0.0
    """Standard deviation that gates start with; 0 takes `initializer_range`. Smaller starts more balanced."""
    router_jitter: float | int = 0.0
    """In training the routers read their input times uniform(1 - eps, 1 + eps) with this eps (Switch); 0 is off, 0.01
    there, below 1."""
    sharing: str | dict[str, Any] = "layer"
    """Which layers share a gate: `layer` (each its own), `{"name": "block", "size": 4}` (PathMoE; `size` may be a
    list), `all`, or `{"name": "decision", "size": 8}` (a block decides once)."""
    load_balance_coef: float | int = 0.0
    """Weight of the load-balance loss, summed over routers; 0 is off, customary 0.001 to 0.01."""
    load_balance_temperature: float | int = 1.0
    """Temperature of the softmax within that loss, above 0; 1 is the softmax of the logits, 0.3 in USMoE's gates."""
    load_balance_probs: str = "softmax"
    """Probabilities within that loss: `softmax` of the logits, the layer's own `scores` scaled to sum to one, as in
    Megatron-core for sigmoid scores, or for gate `cosine` the softmax of the `cosine`s over
    `load_balance_temperature`, whatever the gate's own (X-MoE, which takes 0.3)."""
    load_balance_pairs: str = "executed"
    """What that loss counts: `executed` pairs, those `asked` for before a full expert drops any (Switch), or the
    `first` choice of each token alone, also before dropping (GShard)."""
    load_balance_scope: str = "batch"
    """Over what that loss counts executed pairs: the `batch` of one pass, all passes of the optimizer `step` so far,
    the same unless gradients are accumulated, or `global`, those of all processes that train together
    (`global_aux_loss` of Megatron-core)."""
    load_balance_over: str = "slots"
    """Between whom that loss balances: all `slots` of a router, or the `experts` that compute alone, both slots of a
    negated one counted together (TC-MoE)."""
    zero_reward_coef: float | int = 0.0
    """Weight of minus the zero experts' mean share of the scores, summed over routers (TC-MoE): more zero experts, so
    fewer executed ones; 0 is off and the authors' released setting, 0.00001 in LibMoE."""
    zero_computation_balance: float | int = 1.0
    """Weight tau of zero, copy and constant experts within the load-balance loss, at least 0: a lower one sends them
    more tokens; 0.75 in MoE++, 1 treats all alike."""
    sequence_balance_coef: float | int = 0.0
    """Weight of the balance loss within each sequence, summed over routers; 0 is off, 0.0001 in DeepSeek-V3."""
    importance_coef: float | int = 0.0
    """Weight of the squared variation of summed weights, summed over routers (Shazeer 2017); 0 is off, 0.1 there."""
    load_coef: float | int = 0.0
    """Weight of the squared variation of the smooth load, summed over routers (Shazeer 2017); 0 is off, 0.1 there.
    Only for gate `noisy`, whose noise makes the load smooth, with selection `top_k`."""
    device_balance_coef: float | int = 0.0
    """Weight of the load-balance loss between groups of experts, summed over routers; 0 is off, 0.05 in
    DeepSeek-V2."""
    communication_balance_coef: float | int = 0.0
    """Weight of the balance loss of tokens sent to groups of experts, summed over routers; 0 is off, 0.02 in
    DeepSeek-V2. Only with selection `group_limited`, which says how many groups a token may visit."""
    expert_groups: int = 0
    """Equal groups of neighbouring experts, as on one device each, for the device-level loss; 0 takes the groups of
    selection `group_limited`."""
    excess_load_coef: float | int = 0.0
    """Weight of StableMoE's balance loss, summed over routers; 0 is off, 0.3 there."""
    entropy_coef: float | int = 0.0
    """Weight of the negative entropy of the mean softmax, summed over routers (sigma-MoE); 0 is off, 0.0001 to 0.001
    there."""
    sequence_entropy_coef: float | int = 0.0
    """Weight of the same of each sequence by itself; 0 is off."""
    mutual_information_coef: float | int = 0.0
    """Weight of the negative mutual information of token and expert, summed over routers (Mod-Squad); 0 is off."""
    sparsity_budget: float | int = 0.0
    """Mean experts per token that an adaptive L1 penalty on the scores aims at (ReMoE, for score `relu` and selection
    `positive`); 0 is off, else above 0 and below the number of experts."""
    sparsity_coef_start: float | int = 1e-8
    """First weight of that penalty, above 0; 1e-8 in the paper, which reaches the target after about 100 steps."""
    sparsity_coef_growth: float | int = 1.2
    """Factor by which each training step raises or lowers that weight, above 1; 1.2 in the paper."""
    router_z_loss_coef: float | int = 0.0
    """Weight of the router z-loss, summed over routers; 0 is off, customary 0.001."""
    gate_loss_coef: float | int = 1.0
    """Weight of the loss that some gates train themselves by (`stable`), summed over routers; 0.3 in the authors'
    code of StableMoE."""
    bias_update_rate: float | int = 0.0
    """Step of loss-free balancing: a bias, added to scores for choosing only, moves against each expert's excess load
    in training (DeepSeek-V3); 0 is off, 0.001 customary. Meant for top-k with sigmoid scores. It moves once for each
    optimizer step under our trainer."""
    quantile_balancing: bool = False
    """Choose by logits less a price of each expert that each optimizer step sets anew, so that loads would be level
    (Megatron-core), instead of a bias that moves by small steps. For selection `top_k`; needs no balance loss."""
    quantile_momentum: float | int = 0.0
    """Share of the old prices kept at each step of quantile balancing, 0 to below 1; 0 in Megatron-core."""
    cutoff_momentum: float | int = 0.99
    """Share of the old estimate kept when a router updates its decode twin's threshold or normaliser; 0.9 to 1."""
    causal_routing: bool = False
    """Route plain forward passes by the decode twin too, as `generate` always does."""
    experts_backend: str = "auto"
    """How expert compute runs: `auto`, or one of `crossways.experts.backends()`; results differ by rounding alone."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.select is None:
            self.select = {"name": "top_k", "k": 2}
        if self.attention_select is None:
            self.attention_select = {"name": "top_k", "k": 2}
        if self.attention_projections is None:
            self.attention_projections = ["value", "output"]
        for field in ("gate", "score", "select", "sharing", "attention_score", "attention_select"):
            if isinstance(spec := getattr(self, field), str):
                setattr(self, field, {"name": spec})
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the `strict` validation: every value can be built, and fits the others."""
        super().validate_architecture()
        check_configuration(self)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, plus the module that leads the Auto classes to the installed package."""
        self.auto_map = dict(AUTO_MAP)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{POINTER_MODULE}.py").write_text(POINTER_SOURCE, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing to do: `save_pretrained` already says where the classes are, without copying their source."""

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the routed layers, in order."""
        if self.moe_layers is not None:
            return list(self.moe_layers)
        return [i for i in range(self.num_hidden_layers) if self.moe_every and (i + 1) % self.moe_every == 0]

    @property
    def zero_computation_experts(self) -> int:
        """Zero, copy and constant experts together."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def router_size(self) -> int:
        """Slots that a router chooses among: the feed-forward experts, the same subtracted if they may be, then the
        zero-computation ones."""
        return self.num_experts * (1 + self.negated_experts) + self.zero_computation_experts

    @property
    def logit_offsets(self) -> tuple[tuple[int, int, float], ...]:
        """First slot, the one after the last, and what is added to their logits; only where that is not nothing."""
        offsets = (
            (self.num_experts, 2 * self.num_experts, float(self.negated_logit_offset)),
            (*self.zero_slots, float(self.zero_logit_offset)),
        )
        return tuple(offset for offset in offsets if offset[2])

    @property
    def zero_slots(self) -> tuple[int, int]:
        """The first zero expert in a router's numbering, and the one after the last."""
        first = self.router_size - self.zero_computation_experts
        return first, first + self.zero_experts

    @property
    def num_groups(self) -> int:
        """Groups of experts that the device-level loss balances; 0 if nobody says."""
        return self.expert_groups or getattr(build_selection(self.select or "top_k"), "n_group", 0)

    @property
    def factors(self) -> int:
        """Routers per routed layer: `num_factors` in a Cartesian layer, else 1."""
        return self.num_factors if self.layer == "cartesian" else 1

    @property
    def gate_plan(self) -> list[tuple[int, ...]]:
        """Gate index of every router, a tuple per routed layer."""
        return self.sharing_plan.plan(len(self.routed_layers), self.factors)

    @property
    def rounds(self) -> int:
        """How often the model goes through its layers."""
        return self.num_hidden_layers // self.distinct_layers if self.distinct_layers else 1

    @property
    def sharing_plan(self) -> Sharing:
        """Which routed layers share a gate, in every round."""
        sharing: Sharing = build_sharing(self.sharing)
        if self.rounds == 1 or not self.routed_layers:
            return sharing
        return Repeated(sharing, len(self.routed_layers) // self.rounds)

    @property
    def scheduled(self) -> bool:
        """Whether the gate or the selection changes in the course of training."""
        return build_gate(self.gate).scheduled or build_selection(self.select or "top_k").scheduled

    @property
    def router_names(self) -> list[str]:
        """A name for every router, in the model's order: `layer 2`, or `layer 2 / factor 1`; layers count from 1."""
        return [
            f"layer {layer + 1}" + (f" / factor {factor + 1}" if self.factors > 1 else "")
            for layer in self.routed_layers
            for factor in range(self.factors)
        ]
