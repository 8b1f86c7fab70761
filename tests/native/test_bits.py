"""Whole rules in C++ against their plain PyTorch path, on what is easily forgotten.

Legend: B batch, S sequence, E experts, T tokens.
"""

import pytest
import torch

from crossways.native import bits, budgeted, routing, why_not_native
from crossways.rules.select import (
    Base,
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

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))

SHARED = [TopC(k=1.3), TopC(k=1.3, group="batch"), TopC(k=1.3, group="position")]
COLUMNS = [ExpertChoice(k=1), ExpertChoice(k=1, group="batch")]
TIED = [*SHARED, *COLUMNS, Positive(), Threshold(value=0.2), Threshold(value=torch.tensor([0.2]))]
OTHERS = [
    TopK(k=1),
    TopP(p=0.6, cap=1),
    TopP(p=0.9),
    Capacity(k=1, factor=0.6),
    Capacity(k=1, factor=0.6, order="token", group="batch"),
    Capacity(k=1, factor=0.6, order="score"),
    Capacity(k=1, factor=0.6, order="weight", normalize=True),
    Capacity(k=1, factor=0.6, zero_computation=1, tau=0.5),
    Capacity(k=1, factor=None, order="score"),
    Sinkhorn(k=1),
    Sinkhorn(k=1, group="batch"),
    Base(),
    Base(group="batch"),
]


def scores_like(shape, kind):
    """Scores (B, S, E) of a kind, in memory that is not in order where it is `turned`."""
    scores_BSE = torch.randn(shape).softmax(-1)
    if kind == "ties":
        scores_BSE = (4 * scores_BSE).round() / 4
    if kind == "broken":
        scores_BSE[torch.rand(shape) < 0.05] = torch.nan
        scores_BSE[0, 0] = torch.nan
    if kind == "turned":
        scores_BSE = scores_BSE.transpose(0, 2).contiguous().transpose(0, 2)
    return scores_BSE


def made(rule, scores_BSE, allowed_BSE):
    """Pairs, weights and gradient."""
    leaf_BSE = scores_BSE.clone(memory_format=torch.preserve_format).requires_grad_()
    found = rule(scores_BSE, leaf_BSE, allowed_BSE)
    (grad_BSE,) = torch.autograd.grad(found.weight_P.square().sum(), leaf_BSE)
    return found.token_P, found.expert_P, found.offsets_E1, found.weight_P.detach(), grad_BSE


def native_and_plain(monkeypatch, run):
    """What `run` gives with the C++ parts, and without; fails if they are not used."""
    monkeypatch.setattr(routing, "_SMALL", 0)
    assert routing.fits(torch.zeros(1))
    native = run()
    for name in ("fits", "ready", "solves"):
        monkeypatch.setattr(routing, name, lambda *_: False)
    return native, run()


def assert_same(ours, theirs):
    """Bit for bit, NaN where the other has it."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


SHAPES = [(1, 1, 1), (3, 7, 1), (1, 1, 5), (2, 33, 5), (3, 21, 64), (2, 19, 100), (1, 40, 130)]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kind", ["plain", "ties", "broken", "turned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", TIED + OTHERS, ids=str)
def test_every_rule_in_every_shape(monkeypatch, rule, shape, kind, masked):
    if kind in ("ties", "broken") and rule in OTHERS:
        pytest.skip("PyTorch does not say which of equals it takes")
    torch.manual_seed(sum(shape))
    scores_BSE = scores_like(shape, kind)
    allowed_BSE = torch.rand(shape) < 0.6 if masked else None
    if masked:
        allowed_BSE[0, 0] = False
    assert_same(*native_and_plain(monkeypatch, lambda: made(rule, scores_BSE, allowed_BSE)))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 9, 16, 17, 64])
def test_any_number_of_experts_a_token(monkeypatch, k):
    torch.manual_seed(k)
    scores_BSE = scores_like((2, 37, 64), "plain")
    for rule in (TopK(k=k), TopP(p=0.7, cap=k), Capacity(k=k, factor=0.5), Sinkhorn(k=k)):
        with monkeypatch.context() as patch:
            assert_same(*native_and_plain(patch, lambda rule=rule: made(rule, scores_BSE, None)))


@pytest.mark.parametrize("group_score", ["top2", "max", "top"])
@pytest.mark.parametrize(("experts", "groups", "kept"), [(64, 8, 4), (12, 3, 1), (130, 10, 10), (6, 3, 2)])
def test_groups_of_experts(monkeypatch, group_score, experts, groups, kept):
    torch.manual_seed(experts)
    rule = GroupLimited(k=2, n_group=groups, topk_group=kept, group_score=group_score)
    scores_BSE, allowed_BSE = scores_like((2, 33, experts), "plain"), torch.rand(2, 33, experts) < 0.5
    assert_same(*native_and_plain(monkeypatch, lambda: made(rule, scores_BSE, allowed_BSE)))


def test_a_share_is_summed_over_scores_that_another_order_ranks(monkeypatch):
    choice_BSE, scores_BSE = torch.rand(2, 50, 20), torch.randn(2, 50, 20)  # sums that fall again
    scores_BSE[0, 3, 4] = torch.nan

    def run():
        found = TopP(p=0.8, cap=9)(choice_BSE, scores_BSE)
        return found.token_P, found.expert_P, found.weight_P

    assert_same(*native_and_plain(monkeypatch, run))


@pytest.mark.parametrize("order", ["score", "position", "token"])
@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_who_asks_with_a_nan_is_served_beyond_the_capacity(monkeypatch, order, group):
    scores_BSE = torch.rand(2, 30, 4)
    scores_BSE[:, ::3, 2] = torch.nan
    scores_BSE[0, 1, 3] = torch.inf  # the greatest number, and no more
    rule = Capacity(k=2, factor=0.1, order=order, group=group)
    native, plain = native_and_plain(monkeypatch, lambda: made(rule, scores_BSE, None))
    assert native[3].isnan().sum() == 20
    assert_same(native, plain)


def test_a_nan_that_is_not_allowed_is_not_served(monkeypatch):
    scores_BSE = torch.rand(1, 30, 4)
    scores_BSE[0, ::3, 2] = torch.nan
    for order in ("score", "position"):
        rule = Capacity(k=1, factor=0.2, order=order)
        with monkeypatch.context() as patch:
            assert_same(
                *native_and_plain(
                    patch, lambda rule=rule: made(rule, scores_BSE, ~scores_BSE.isnan() & (scores_BSE > 0.2))
                )
            )


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("k", [1, 3])
def test_sinkhorn_takes_what_it_balanced(monkeypatch, group, k):
    """Logits that are no numbers, too, and equals, of which the earlier expert is taken."""
    monkeypatch.setattr(routing, "_SMALL", 0)
    torch.manual_seed(k)
    logits_BSE, allowed_BSE = torch.randn(3, 700, 20), torch.rand(3, 700, 20) < 0.8
    logits_BSE[0, ::50, 3] = torch.nan
    logits_BSE[1, ::40, 4:7] = torch.inf
    logits_BSE[2, ::30] = 0.5
    for allowed in (None, allowed_BSE):
        rule = Sinkhorn(k=k, group=group)
        masked_BSE = logits_BSE if allowed is None else logits_BSE.masked_fill(~allowed, -torch.inf)
        shape = (3, 700, 20) if group == "sequence" else (1, 2100, 20)
        valid_GN = None if allowed is None else allowed.any(-1).view(shape[:2])
        balanced_BSE = rule.balance(masked_BSE.view(shape), valid_GN).view_as(logits_BSE)
        expected, found = TopK(k)(balanced_BSE, logits_BSE, allowed), rule(logits_BSE, logits_BSE, allowed)
        assert torch.equal(found.to_mask(), expected.to_mask())


@pytest.mark.parametrize("rule", [Sinkhorn(k=2), Base(), Capacity(k=2, factor=0.5)], ids=str)
def test_groups_side_by_side_do_not_meet(rule):
    torch.manual_seed(0)
    before, row_SE = torch.get_num_threads(), torch.randn(1500, 20)
    torch.set_num_threads(2)
    try:
        mask_TE = rule(row_SE.repeat(8, 1, 1), row_SE.repeat(8, 1, 1)).to_mask()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mask_TE.view(8, 1500, 20), mask_TE[:1500].expand(8, -1, -1))


BUDGETS = [0, 1, 3, 90, 700, 900, 1000, 1125, 4500, 8000, 8999, 9000, 9500, 2, 30, 2250, 10, 5, 7, 1100]


def columns_of(kind):
    """Columns (N, E) of many tokens, of which a sample says more or less."""
    x_NE = torch.randn(9000, 20)
    if kind == "ties":
        return x_NE.round()
    if kind == "alike":
        return torch.zeros_like(x_NE)
    if kind == "broken":
        return x_NE.masked_fill(torch.rand_like(x_NE) < 0.3, torch.nan)
    if kind == "misleading":  # every eighth token, which is what is sampled, is another
        x_NE[::8] += torch.tensor([9.0, -9.0]).repeat(10)
    if kind == "in order":
        return x_NE.sort(0).values
    if kind == "apart":  # what is sampled are zeros, and as many as the budget says, of the others, are greater
        place_N1 = torch.arange(9000)[:, None] - torch.arange(9000)[:, None] // 8 - 1
        x_NE = torch.where(place_N1 < torch.tensor(BUDGETS), x_NE.abs() + 1, -5)
        x_NE[::8] = 0
    return x_NE


@pytest.mark.parametrize("kind", ["plain", "ties", "alike", "broken", "misleading", "in order", "apart"])
@pytest.mark.parametrize("open_share", [1.0, 0.1, 0.0])
def test_columns_of_many_tokens(kind, open_share):
    torch.manual_seed(0)
    x_NE = columns_of(kind)
    allowed_NE = None if open_share == 1 else torch.rand_like(x_NE) < open_share
    budget_1E = torch.tensor([BUDGETS])
    found_NE = budgeted.of_column_budgets(x_NE[None], budget_1E, allowed_NE).mask()
    ranked_NE = x_NE.nan_to_num(torch.inf)
    if allowed_NE is not None:
        ranked_NE = ranked_NE.masked_fill(~allowed_NE, -torch.inf)
    order_NE = ranked_NE.sort(dim=0, descending=True, stable=True).indices
    expected_NE = torch.zeros_like(found_NE).scatter_(0, order_NE, torch.arange(9000)[:, None] < budget_1E)
    assert torch.equal(found_NE, expected_NE if allowed_NE is None else expected_NE & allowed_NE)
    with_nan_NE = x_NE.isnan() if allowed_NE is None else x_NE.isnan() & allowed_NE
    assert torch.equal(
        budgeted.of_column_budgets(x_NE[None], budget_1E, allowed_NE, broken=True).mask(), found_NE | with_nan_NE
    )
    if allowed_NE is None:
        least_E = budgeted.least_of_columns(x_NE[None], budget_1E)[0]
        sorted_NE = x_NE.gather(0, order_NE)
        expected_E = sorted_NE.gather(0, (budget_1E - 1).clamp(0, 8999))[0].masked_fill(budget_1E[0] == 0, torch.nan)
        assert torch.equal(least_E.nan_to_num(-99), expected_E.nan_to_num(-99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 600, 5), (3, 40, 16), (1, 1100, 70)], ids=str)
def test_sinkhorn_is_the_same_bit_for_bit(monkeypatch, shape, dtype):
    torch.manual_seed(0)
    logits_GNE, valid_GN = (3 * torch.randn(shape)).to(dtype), torch.rand(shape[:2]) < 0.8
    logits_GNE[torch.rand(shape) < 0.02] = torch.nan
    logits_GNE[torch.rand(shape) < 0.02] = torch.inf
    logits_GNE[torch.rand(shape) < 0.02] = -torch.inf
    native, plain = native_and_plain(monkeypatch, lambda: Sinkhorn().balance(logits_GNE, valid_GN))
    assert torch.equal(native, plain)
    assert native.isinf().any() or shape[1] == 1


@pytest.mark.parametrize("rule", TIED + OTHERS, ids=str)
def test_any_number_of_threads(monkeypatch, rule):
    monkeypatch.setattr(routing, "_SMALL", 0)
    scores_BSE, before, found = scores_like((2, 700, 20), "ties"), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(made(rule, scores_BSE, None))
        finally:
            torch.set_num_threads(before)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("experts", [1, 63, 64, 65, 200])
def test_masks_and_back(experts):
    mask_TE = torch.rand(50, experts) < 0.3
    assert torch.equal(bits.of_mask(mask_TE).mask(), mask_TE)


def test_base_fills_what_does_not_divide_and_refuses_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(routing, "_SMALL", 0)
    gain_NE = torch.randn(1000, 7) + 9 * torch.rand(7)
    starts_G1 = torch.tensor([0, 1, 1, 1000])
    chosen_N = routing.balanced(gain_NE, starts_G1)
    assert chosen_N[0] == gain_NE[0].argmax()
    assert chosen_N[1:].bincount(minlength=7).max() <= 143
    assert torch.equal(chosen_N, routing.balanced(gain_NE.double(), starts_G1))
    gain_NE[5, 2] = -torch.inf
    assert routing.balanced(gain_NE, starts_G1) is None


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("experts", [5, 16, 64, 70, 160])
def test_the_greatest_alone_is_the_first_of_the_greatest(experts, masked):
    torch.manual_seed(experts)
    choice_TE = (2 * torch.randn(70, experts)).round() / 2  # many equals
    choice_TE[torch.rand(70, experts) < 0.02] = torch.nan
    choice_TE[torch.rand(70, experts) < 0.1] = -torch.inf
    choice_TE[3], choice_TE[4] = -torch.inf, -0.0
    allowed_TE = torch.rand(70, experts) < 0.5 if masked else None
    if masked:
        allowed_TE[7] = False
    index_T1 = bits.top_k_index(choice_TE, 1, allowed_TE)
    expected_TE = torch.zeros(70, experts, dtype=torch.bool).scatter_(1, index_T1, True)
    if masked:
        expected_TE &= allowed_TE
    assert torch.equal(bits.of_top_k(choice_TE, 1, allowed_TE).mask(), expected_TE)


@pytest.mark.parametrize("experts", [8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [513, 1100])
def test_sinkhorn_of_finite_logits_is_the_same_bit_for_bit(monkeypatch, tokens, experts):
    torch.manual_seed(tokens)
    logits_GNE = 3 * torch.randn(2, tokens, experts)
    logits_GNE[0, 5] = torch.finfo(torch.float32).min  # finite, and below what counts as the lowest
    native, plain = native_and_plain(monkeypatch, lambda: Sinkhorn().balance(logits_GNE))
    assert torch.equal(native, plain)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 9, 130)], ids=str)
def test_weights_have_every_derivative(monkeypatch, shape):
    monkeypatch.setattr(routing, "_SMALL", 0)
    torch.manual_seed(0)
    scores_BSE = torch.rand(shape, requires_grad=True)
    found = TopK(k=3)(scores_BSE, scores_BSE)
    plain_P = scores_BSE.flatten(0, 1)[found.token_P, found.expert_P]
    results = []
    for weight_P in (found.weight_P, plain_P):
        (once,) = torch.autograd.grad(weight_P.pow(3).sum(), scores_BSE, retain_graph=True)
        (first,) = torch.autograd.grad(weight_P.pow(3).sum(), scores_BSE, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), scores_BSE)
        results.append((weight_P, once, first, second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_more_pairs_than_were_foreseen_are_not_written():
    chosen = bits.of_top_k(torch.rand(9, 5), 3)
    with pytest.raises(AssertionError, match="27 pairs are chosen where 26"):
        bits.pairs(bits.Bits(chosen.word_TW, 5, 26), torch.rand(9, 5))
    token_P, expert_P, weight_P, _ = bits.pairs(bits.Bits(chosen.word_TW, 5, 40), torch.rand(9, 5))
    assert len(token_P) == len(expert_P) == len(weight_P) == 27
