"""Assignments with slack say the same as those of exact length: values, gradients, losses, and what experts make of
them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways import assignment as module
from crossways.assignment import Assignment
from crossways.experts import Activation, Experts, compute_experts
from crossways.experts.zero_computation import ZeroComputationExperts
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
from crossways.rules.select import Capacity, ExpertChoice, GroupLimited, TopC, TopK, TopP

RULES = {
    "top-k": TopK(2),
    "group-limited": GroupLimited(k=2, n_group=2, topk_group=1),
    "capacity": Capacity(k=2, factor=0.7),
    "capacity by score": Capacity(k=2, factor=0.7, order="score"),
    "capacity by weight": Capacity(k=2, factor=0.7, order="weight", normalize=True, zero_computation=1, tau=0.5),
    "top-p with a cap": TopP(p=0.6, cap=3),
    "top-c": TopC(1.5),
    "top-c over the batch": TopC(0.7, group="batch"),
    "top-c over positions": TopC(2, group="position"),
    "expert choice": ExpertChoice(2),
}


@pytest.fixture
def slack(monkeypatch):
    """Returns a function that behaves, from then on, as off the CPU."""
    return lambda: monkeypatch.setattr(module, "_counting_waits", lambda tensor: True)


def views(assignment):
    """Everything an assignment can say, as tensors of fixed size."""
    return {
        "load": assignment.load_E(),
        "experts per token": assignment.experts_per_token_T(),
        "weight sum": assignment.weight_sum_T(),
        "mask": assignment.to_mask(),
        "dense": assignment.to_dense(),
        "renormalized": assignment.renormalized().to_dense(),
        "top expert": assignment.top_expert_T(),
        "scaled": assignment.with_weights(assignment.weight_P + 3).to_dense(),
        "some experts": assignment.of_experts(1, assignment.num_experts).to_dense(),
        "first experts": assignment.of_experts(0, assignment.num_experts - 1).to_dense(),
        "compact": assignment.compact().to_dense(),
    }


def assert_equal_views(actual, expected):
    actual, expected = views(actual), views(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(2, 6),
    density=st.floats(0, 1),
    spare=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_a_bounded_mask_is_the_mask(tokens, experts, density, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(tokens, experts, generator=generator) < density
    weight_TE = torch.rand(tokens, experts, generator=generator) + 0.1
    exact = Assignment.from_mask(mask_TE, weight_TE)
    bounded = Assignment.from_bounded_mask(mask_TE, weight_TE, most=exact.num_pairs + spare)
    assert bounded.slack
    assert bounded.num_pairs == min(exact.num_pairs + spare, mask_TE.numel())
    assert_equal_views(bounded, exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_counting_waits", lambda tensor: True)
        assert_equal_views(bounded, exact)
        assert_equal_views(exact, exact)
        assert exact.of_experts(1, experts).slack


def test_compact_gives_the_pairs_in_order():
    mask_TE = torch.tensor([[True, False], [False, False], [True, True]])
    weight_TE = torch.arange(6.0).view(3, 2)
    exact = Assignment.from_mask(mask_TE, weight_TE)
    compact = Assignment.from_bounded_mask(mask_TE, weight_TE, most=5).compact()
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(compact, name), getattr(exact, name))
    assert not compact.slack


def make_batch(padded):
    generator = torch.Generator().manual_seed(0)
    logits_BSE = torch.randn(3, 6, 4, generator=generator)
    valid_BS = torch.ones(3, 6, dtype=torch.bool)
    if padded:
        valid_BS[1, 2:], valid_BS[2] = False, False
    return logits_BSE, valid_BS[..., None].expand(3, 6, 4) if padded else None


def select(rule, padded):
    """The assignment, its losses, and the gradients of all of them with respect to the logits."""
    logits_BSE, allowed_BSE = make_batch(padded)
    logits_BSE.requires_grad_()
    scores_BSE = logits_BSE.softmax(-1)
    chosen = rule(scores_BSE, scores_BSE, allowed_BSE)
    logits_TE, scores_TE = logits_BSE.flatten(0, 1), scores_BSE.flatten(0, 1)
    valid_T = None if allowed_BSE is None else allowed_BSE[..., 0].flatten()
    losses = [
        load_balance_loss(logits_TE, chosen, valid_T),
        sequence_balance_loss(scores_TE, chosen, 3, valid_T),
        importance_loss(chosen),
        entropy_loss(logits_TE, valid_T),
        router_z_loss(logits_TE, valid_T),
        sparsity_loss(scores_TE, chosen, 2, valid_T),
        excess_load_loss(logits_TE, chosen, valid_T),
        mutual_information_loss(logits_TE, valid_T),
        sequence_entropy_loss(logits_TE, 3, valid_T),
        device_balance_loss(logits_TE, chosen, 2, valid_T, 3),
        communication_balance_loss(logits_TE, chosen, 2, 1, valid_T, 3),
        chosen.renormalized().to_dense().square().sum(),
    ]
    grads = [torch.autograd.grad(loss, logits_BSE, retain_graph=True)[0] for loss in losses]
    return chosen, [*losses, *grads]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_and_losses_agree(rule, padded, slack):
    exact, expected = select(RULES[rule], padded)
    slack()
    bounded, actual = select(RULES[rule], padded)
    assert not exact.slack
    assert bounded.slack == (padded or RULES[rule] != TopK(2))
    assert_equal_views(bounded, exact)
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs)


def compute(chosen, backend):
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        for shape in ((18, 16), (4, 16, 16), (4, 16, 8))
    ]
    y_TD = compute_experts(leaves[0], chosen, *leaves[1:], Activation("swiglu"), backend)
    return [y_TD, *torch.autograd.grad(y_TD.float().square().sum(), leaves)]


@pytest.mark.parametrize("backend", ["naive", "loop", "grouped_mm", "transformers:batched_mm"])
def test_backends_leave_slack_out(backend, slack):
    exact, _ = select(RULES["capacity"], True)
    slack()
    bounded, _ = select(RULES["capacity"], True)
    assert bounded.num_pairs > exact.num_pairs
    for ours, theirs in zip(compute(bounded, backend), compute(exact, backend), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_zero_computation_experts_leave_slack_out(slack):
    torch.manual_seed(0)
    experts, cheap = Experts(1, 8, 4), ZeroComputationExperts(8, zero=1, copy=1, constant=1)
    cheap.reset_parameters(std=1.0)
    x_TD = torch.randn(18, 8)

    def run():
        chosen, _ = select(TopK(2), True)
        grads = torch.autograd.grad(
            (y := experts(x_TD, chosen.of_experts(0, 1)) + cheap(x_TD, chosen.of_experts(1, 4))).square().sum(),
            [*experts.parameters(), *cheap.parameters()],
        )
        return [y, *grads]

    expected = run()
    slack()
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
