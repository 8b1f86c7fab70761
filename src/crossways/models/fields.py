"""What a configuration may say beyond LLaMA's: every field with its default, what it does, and a sensible range."""

# Without `from __future__ import annotations`: `strict` only checks types that are not strings.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class RoutingFields(LlamaConfig):
    """The fields of `CrosswaysConfig`, which says what follows from them."""

    qk_norm: bool = False
    """Normalise each head's queries and keys (RMSNorm before the rotary embedding), as Qwen3 does."""
    attention_experts: int = 0
    """Experts of each head for each of its routed projections (SwitchHead); 0 is plain attention, 2 to 8 with fewer
    heads there. Needs `attention_bias` off. What heads choose is in no trace, load or perturbation."""
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
