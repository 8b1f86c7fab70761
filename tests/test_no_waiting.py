"""Nothing on the way from hidden states to gradients makes the host wait for the device.

Checked without a GPU on tensors of the device `meta`, which have no content that could be read; an operator that
would wait on a GPU is refused by name. With a GPU, PyTorch itself refuses.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crossways.experts import Experts
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.balance import (
    communication_balance_loss,
    device_balance_loss,
    entropy_loss,
    excess_load_loss,
    importance_loss,
    load_balance_loss,
    mutual_information_loss,
    router_z_loss,
    sequence_balance_loss,
    sequence_entropy_loss,
    sparsity_loss,
)
from crossways.rules.balance.quantile import balancing_price
from crossways.rules.score import Softmax
from crossways.rules.select import (
    Capacity,
    ExpertChoice,
    GroupLimited,
    Positive,
    Sinkhorn,
    Threshold,
    TopC,
    TopK,
    TopP,
)
from crossways.training.watch import FiniteWatch

EXPERTS = 8
TINY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "max_position_embeddings": 64,
}
WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::equal",
}
RULES = {
    "top-1": TopK(1),
    "top-k": TopK(2),
    "group-limited": GroupLimited(k=2, n_group=4, topk_group=2),
    "capacity": Capacity(k=2, factor=1.0),
    "capacity by score": Capacity(k=2, factor=1.0, order="score"),
    "top-p with a cap": TopP(p=0.5, cap=2),
    "top-c": TopC(1.5),
    "top-c over the batch": TopC(2, group="batch"),
    "expert choice": ExpertChoice(2),
}


class RefuseToWait(TorchDispatchMode):
    """Raises where an operator would copy to the host, or give a tensor whose size depends on content."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "aten::index" else []
        if name in WAITING or masks or (name == "aten::repeat_interleave" and "output_size" not in (kwargs or {})):
            raise AssertionError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_") and args[0].device != out.device:
            raise AssertionError(f"{func} copies from {args[0].device} to {out.device}")
        return out


def layer(select, **router):
    gate = LinearGate(16, EXPERTS)
    return MoE(Router(EXPERTS, Softmax(), select, gate=gate, **router), Experts(EXPERTS, 16, 8))


def train_step(model, x_BSD, valid_BS):
    y_BSD, (routing,) = model(x_BSD, contexts=[Context(valid_BS=valid_BS)])
    scores, executed, valid_T = routing.scores_TE, routing.assignment, routing.valid_T
    loss = y_BSD.square().mean()
    loss = loss + load_balance_loss(routing.logits_TE, executed, valid_T) + importance_loss(executed)
    loss = loss + entropy_loss(routing.logits_TE, valid_T) + router_z_loss(routing.logits_TE, valid_T)
    loss = loss + sequence_balance_loss(scores, executed, routing.num_rows, valid_T)
    loss = loss + excess_load_loss(routing.logits_TE, executed, valid_T)
    loss = loss + mutual_information_loss(routing.logits_TE, valid_T)
    loss = loss + sequence_entropy_loss(routing.logits_TE, routing.num_rows, valid_T)
    loss = loss + device_balance_loss(routing.logits_TE, executed, 2, valid_T, routing.num_rows)
    loss = loss + communication_balance_loss(routing.logits_TE, executed, 2, 1, valid_T, routing.num_rows)
    balancing_price(routing, torch.zeros(EXPERTS, device=x_BSD.device))
    loss = loss + sparsity_loss(scores, executed, 2, valid_T) + routing.density()
    loss.backward()
    model.router.observe(routing)
    watch = FiniteWatch(x_BSD.device)
    watch.note(loss, 1)
    return executed


def check(model, device, padded, guard):
    model = model.to(device).train()
    x_BSD = torch.randn(3, 5, 16, device=device, requires_grad=True)
    valid_BS = torch.ones(3, 5, dtype=torch.bool, device=device) if padded else None
    if device == "cuda":
        train_step(model, x_BSD, valid_BS)  # the first call compiles and times kernels
    with guard:
        executed = train_step(model, x_BSD, valid_BS)
    for parameter in (x_BSD, *model.parameters()):
        assert parameter.grad.shape == parameter.shape
    return executed


@contextlib.contextmanager
def cuda_refuses():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


DEVICES = [
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("rule", RULES)
def test_a_training_step_never_waits(rule, padded, device):
    guard = RefuseToWait() if device == "meta" else cuda_refuses()
    executed = check(layer(RULES[rule]), device, padded, guard)
    assert executed.num_pairs <= 3 * 5 * EXPERTS


@pytest.mark.parametrize("device", DEVICES)
def test_bias_dropout_and_renormalisation_never_wait(device):
    model = layer(TopK(2), renormalize=True, bias_update_rate=0.001, expert_dropout=0.1)
    guard = RefuseToWait() if device == "meta" else cuda_refuses()
    assert check(model, device, True, guard).num_pairs == 3 * 5 * 2


@pytest.mark.parametrize("device", DEVICES)
def test_zero_computation_experts_never_wait(device):
    cheap = ZeroComputationExperts(16, zero=1, copy=1, constant=2)
    router = Router(EXPERTS, Softmax(), TopK(2), gate=LinearGate(16, EXPERTS))
    model = MoE(router, Experts(EXPERTS - 4, 16, 8), zero_computation=cheap)
    guard = RefuseToWait() if device == "meta" else cuda_refuses()
    assert check(model, device, True, guard).num_experts == EXPERTS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [{"name": name, "k": 2} for name in ("top_k", "top_c")], ids=str)
def test_a_model_never_waits(rule, device):
    config = CrosswaysConfig(**TINY, select=rule, load_balance_coef=0.01, router_z_loss_coef=0.001)
    model = CrosswaysForCausalLM(config).to(device).train()
    ids_BS = torch.ones(2, 8, dtype=torch.long, device=device)

    def step():
        outputs = model(input_ids=ids_BS, labels=ids_BS)
        outputs.loss.backward()
        return outputs

    if device == "cuda":
        step()
    with RefuseToWait() if device == "meta" else cuda_refuses():
        outputs = step()
    assert len(outputs.expert_load) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "rule", [TopP(p=0.5), Threshold(value=0.1), Positive(), Sinkhorn()], ids=lambda rule: rule.name
)
def test_the_guard_sees_rules_that_do_wait(rule):
    with pytest.raises((AssertionError, NotImplementedError)):
        check(layer(rule), "meta", False, RefuseToWait())


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: (x > 0).nonzero(),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
    ],
)
def test_the_guard_sees(wait):
    with pytest.raises(AssertionError, match="waits"), RefuseToWait():
        wait(torch.ones(3))


def test_the_guard_sees_copies_between_devices():
    with pytest.raises(AssertionError, match="copies"), RefuseToWait():
        torch.ones(3).to("meta")
