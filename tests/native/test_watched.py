"""Who looks at operators is noticed, and gets what he looks for or an error."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts
from crossways.native import why_not_native
from crossways.native.watched import has_tangent, is_watched

needs_native = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


class Counting(TorchDispatchMode):
    """Names of the operators that it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen.append(str(function))
        return function(*arguments, **(named or {}))


class Subclass(torch.Tensor):
    pass


def problem():
    torch.manual_seed(0)
    index_TK, weight_TK = torch.rand(3, 4).topk(2).indices, torch.rand(3, 2)
    up_EHD, down_EDF = torch.randn(4, 64, 32) / 6, torch.randn(4, 32, 32) / 6

    def run(x_TD, weight_TK=weight_TK, backend="fused"):
        pairs = Assignment.from_topk(index_TK, weight_TK, 4)
        return compute_experts(x_TD, pairs, up_EHD, down_EDF, Activation("swiglu"), backend)

    return run, torch.randn(3, 32), weight_TK


def test_plain_tensors_are_not_watched():
    assert not is_watched(torch.zeros(2), torch.nn.Parameter(torch.zeros(2)))
    assert is_watched(torch.zeros(2), torch.zeros(2).as_subclass(Subclass))


def test_transforms_modes_and_tangents_are_noticed():
    found = []

    def look(x):
        found.append(is_watched(x))
        return x.sum()

    torch.func.vmap(look)(torch.zeros(2, 3))
    torch.func.grad(look)(torch.zeros(3))
    with Counting():
        look(torch.zeros(3))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(torch.zeros(3), torch.ones(3)))
        assert has_tangent(torch.zeros(1), forward_ad.make_dual(torch.zeros(3), torch.ones(3)))
        assert not has_tangent(torch.zeros(3))
    assert found == [True] * 4
    assert not is_watched(torch.zeros(2))


@needs_native
def test_modes_see_the_operator_and_fakes_stay_fakes():
    run, x_TD, _ = problem()
    expected = run(x_TD)
    with Counting() as mode:
        assert torch.equal(run(x_TD), expected)
    assert "crossways.fused_experts.default" in mode.seen
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        y_TD = run(x_TD)
    assert y_TD.fake_mode is fake
    assert y_TD.shape == expected.shape


@needs_native
def test_forward_mode_derivatives_are_refused_and_not_lost():
    run, x_TD, weight_TK = problem()
    for fail in (lambda: torch.func.jvp(run, (x_TD,), (x_TD,)), lambda: dual(run, x_TD, weight_TK)):
        with pytest.raises(NotImplementedError, match="naive"):
            fail()
    tangent_TD = torch.func.jvp(lambda weight_TK: run(x_TD, weight_TK, "naive"), (weight_TK,), (weight_TK,))[1]
    torch.testing.assert_close(tangent_TD, run(x_TD))  # linear in the weights


def dual(run, x_TD, weight_TK):
    with forward_ad.dual_level():
        return run(x_TD, forward_ad.make_dual(weight_TK, torch.ones_like(weight_TK)))


@needs_native
def test_vmap_over_tokens_and_over_weights():
    run, x_TD, weight_TK = problem()
    torch.testing.assert_close(torch.func.vmap(run)(torch.stack([x_TD, -x_TD])), torch.stack([run(x_TD), run(-x_TD)]))
    weights_NTK = torch.stack([weight_TK, weight_TK / 2])
    many_NTD = torch.func.vmap(lambda weight_TK: run(x_TD, weight_TK))(weights_NTK)
    torch.testing.assert_close(many_NTD, torch.stack([run(x_TD), run(x_TD) / 2]))


@needs_native
def test_inference_mode_changes_no_bit():
    run, x_TD, _ = problem()
    expected = run(x_TD)
    with torch.inference_mode():
        assert torch.equal(run(x_TD), expected)
