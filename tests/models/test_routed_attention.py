"""Attention with experts for values and outputs: the equations written out, and plain attention as a special case."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.experts.linear import Wiring, linear_experts
from crossways.models.decoder import build_attention

KINDS = {
    "plain": {"attention_experts": 3},
    "grouped": {"attention_experts": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "normed": {"attention_experts": 4, "qk_norm": True, "attention_select": {"name": "top_k", "k": 3}},
    "softmax": {
        "attention_experts": 3,
        "attention_score": "softmax",
        "attention_select": {"name": "top_p", "p": 0.6},
    },
}


def attend(config, attention, x_BSD):
    positions = torch.arange(x_BSD.shape[1])[None]
    rotations = LlamaRotaryEmbedding(config)(x_BSD, positions)
    mask = torch.full((x_BSD.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    return attention(hidden_states=x_BSD, position_embeddings=rotations, attention_mask=mask)[0], rotations


def chosen(gate, x_BSD, heads, config):
    """Each head's weights (B, S, H, E), zero for those it does not choose."""
    logits = (x_BSD @ gate.weight.T).unflatten(-1, (heads, config.attention_experts))
    scores = logits.sigmoid() if config.attention_score["name"] == "sigmoid" else logits.softmax(-1)
    if config.attention_select["name"] == "top_k":
        k = config.attention_select["k"]
        return scores.where(scores >= scores.topk(k, -1).values[..., -1:], 0.0)
    order = scores.sort(-1, descending=True)
    before = order.values.cumsum(-1) - order.values  # top-p takes until the sum reaches p
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(
        -1, order.indices, before < config.attention_select["p"]
    )
    return scores.where(kept, 0.0)


def project(config, projection, x_BSD, heads):
    """(B, S, H, O): each head's sum over its chosen experts, or a plain projection."""
    if isinstance(projection, torch.nn.Linear):
        return projection(x_BSD).unflatten(-1, (heads, -1))
    s, experts = chosen(projection.gate, x_BSD, heads, config), config.attention_experts
    rows = [
        sum(s[:, :, h, e, None] * (x_BSD @ projection.weight[h * experts + e].T) for e in range(experts))
        for h in range(heads)
    ]
    return torch.stack(rows, 2)


def by_equation(config, attention, x_BSD, rotations):
    """V^h = sum s x W_V; A = softmax(Q K / sqrt d); y = sum over h of sum t (A V) W_O."""
    heads, kv_heads, experts = config.num_attention_heads, config.num_key_value_heads, config.attention_experts
    q = project(config, attention.q_proj, x_BSD, heads)
    k, values = (project(config, each, x_BSD, kv_heads) for each in (attention.k_proj, attention.v_proj))
    if config.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotations)
    later = torch.ones(x_BSD.shape[1], x_BSD.shape[1], dtype=torch.bool).triu(1)
    out = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        weights = (q[:, head] @ k[:, kv].mT / config.head_dim**0.5).masked_fill(later, -torch.inf).softmax(-1)
        out.append(weights @ values[:, :, kv])
    if attention.outputs is None:
        return attention.o_proj(torch.cat(out, -1))
    t, y_BSD = chosen(attention.outputs.gate, x_BSD, heads, config), torch.zeros_like(x_BSD)
    for head in range(heads):
        for e in range(experts):
            y_BSD = y_BSD + t[:, :, head, e, None] * (out[head] @ attention.outputs.weight[head * experts + e].T)
    return y_BSD


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_equation_with_every_gradient(tiny_config, kind, implementation):
    config = tiny_config(**KINDS[kind], attn_implementation=implementation)
    attention = build_attention(config, 0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x_BSD = torch.randn(2, 7, 16, requires_grad=True)
    ours, rotations = attend(config, attention, x_BSD)
    theirs = by_equation(config, attention, x_BSD, rotations)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    leaves = [x_BSD, *attention.parameters()]
    grad = torch.randn_like(ours)
    for mine, wanted in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True
    ):
        assert wanted.any()
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-3)


def test_numbers_by_hand(tiny_config):
    # One token attends to itself with weight one. One head of width 1 in a model of width 2, x = (1, 2); two experts,
    # the best is taken. Values: logits (0, ln 3): s = 3/4, W_V = (2, 1): v = 3/4 * 4 = 3. Outputs: logits
    # (0, -1): t = 1/2, W_O = (1, -2): y = 1/2 * 3 * (1, -2).
    config = tiny_config(
        hidden_size=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        attention_experts=2,
        attention_select={"name": "top_k", "k": 1},
    )
    attention = build_attention(config, 0)
    values, outputs = attention.v_proj, attention.outputs
    with torch.no_grad():
        values.gate.weight.copy_(torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]]))
        outputs.gate.weight.copy_(torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))
        values.weight.copy_(torch.tensor([[[9.0, 9.0], [9.0, 9.0]], [[2.0, 1.0], [0.0, 0.0]]]))
        outputs.weight.copy_(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]]))
    y_BSD, _ = attend(config, attention, torch.tensor([[[1.0, 2.0]]]))
    torch.testing.assert_close(y_BSD, torch.tensor([[[1.5, -3.0]]]))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_expert_of_weight_one_is_plain_attention(tiny_config, qk_norm):
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": qk_norm}
    one = {"attention_experts": 1, "attention_score": "softmax", "attention_select": {"name": "top_k", "k": 1}}
    plain = build_attention(tiny_config(**fields, attn_implementation="eager"), 0)
    config = tiny_config(**fields, **one, attn_implementation="eager")
    routed = build_attention(config, 0)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(routed, name).weight.copy_(getattr(plain, name).weight)
        routed.v_proj.weight.copy_(plain.v_proj.weight.view(2, 4, 16))
        routed.outputs.weight.copy_(plain.o_proj.weight.view(16, 4, 4).transpose(0, 1))
    x_BSD = torch.randn(2, 5, 16)
    torch.testing.assert_close(attend(config, routed, x_BSD)[0], attend(config, plain, x_BSD)[0])


def test_padding_changes_nothing_and_a_head_may_leave_experts_alone(tiny_model):
    model = tiny_model(attention_experts=8, attention_select={"name": "top_k", "k": 1})
    alone_BS = torch.tensor([[7, 3, 9]])
    padded_BS, mask_BS = torch.tensor([[0, 7, 3, 9], [1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1], [1] * 4])
    position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    padded = model(padded_BS, attention_mask=mask_BS, position_ids=position_BS).logits[:1, 1:]
    torch.testing.assert_close(padded, model(alone_BS).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(alone_BS[:, :1]).logits, padded[:, :1], atol=1e-5, rtol=1e-4)
    values = model.model.layers[0].self_attn.v_proj
    load_E = values.choose(torch.randn(1, 3, 16)).load_E()
    assert load_E.view(2, 8).sum(1).tolist() == [3, 3]
    assert (load_E == 0).any()


def test_weights_start_as_the_models_others_do_on_meta_too(tiny_model, tmp_path):
    model = tiny_model(attention_experts=8, router_initializer_range=0.1)
    attention = model.model.layers[0].self_attn
    assert attention.outputs.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert attention.outputs.gate.weight.std().item() == pytest.approx(0.1, rel=0.1)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.v_proj.weight"]  # transformers builds on meta, and draws what is missing
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[1].self_attn.v_proj.weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_attention_weights_are_recorded(tiny_model, tokens):
    model = tiny_model(attention_experts=2, attn_implementation="eager")
    attentions = model(tokens[0], output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(3, 2, 9, 9)] * 2


def test_linear_experts_with_nobody_and_nothing():
    nobody = Assignment.from_topk(torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0), 2)
    empty = Wiring(nobody.token_P, nobody.token_P, 3)
    assert torch.equal(linear_experts(torch.randn(3, 4), nobody, torch.randn(2, 5, 4), empty), torch.zeros(3, 5))
    nothing = Assignment.from_topk(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), 2)
    empty = Wiring(nothing.token_P, nothing.token_P, 0)
    assert linear_experts(torch.randn(0, 4), nothing, torch.randn(2, 5, 4), empty).shape == (0, 5)


REFUSED = [
    ({"attention_experts": -1}, "attention_experts must be at least 0"),
    ({"attention_experts": 2, "attention_projections": []}, r"each once, got \[\]"),
    ({"attention_experts": 2, "attention_projections": ["value", "value"]}, "each once, got"),
    ({"attention_experts": 2, "attention_projections": ["values"]}, r"must be some of .* got \['values'\]"),
    ({"attention_experts": 1}, "k = 2 with 1 experts"),
    ({"attention_experts": 2, "attention_bias": True}, "attention_experts = 2 have no biases"),
    (
        {"attention_experts": 4, "attention_select": {"name": "top_c", "k": 1}},
        "attention_select must decide for each",
    ),
    ({"attention_experts": 4, "attention_select": {"name": "threshold"}}, "attention_select must decide for each"),
    (
        {"attention_experts": 4, "attention_select": {"name": "scheduled_top_k", "k": 1, "k_end": 2, "steps": 5}},
        "always alike",
    ),
    ({"attention_experts": 4, "attention_score": "token_softmax"}, "attention_score must decide for each token"),
    ({"attention_score": "sigmod"}, "did you mean 'sigmoid'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_impossible_values_are_refused(tiny_config, fields, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**fields)
