"""The forward pass of few rows in half precision, which keeps a row in a column between the products."""

import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import Activation, columns, compute_experts
from crossways.experts.naive import naive

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def problem(activation, tokens=40):
    """x, assignment, matrices; expert 1 idle, expert 2 with all tokens, token 0 with expert 2 alone."""
    generator = torch.Generator().manual_seed(0)
    mask_TE = torch.rand(tokens, 5, generator=generator) < 0.4
    mask_TE[0] = mask_TE[:, 1] = False
    mask_TE[:, 2] = True
    rows = 24 * (2 if activation.gated else 1)
    x, up, down, weight = (
        torch.randn(shape, generator=generator).mul(scale).half().bfloat16().double()
        for shape, scale in (((tokens, 16), 1), ((5, rows, 16), 0.25), ((5, 16, 24), 0.2), ((tokens, 5), 1))
    )
    return x, Assignment.from_mask(mask_TE, weight), up, down


def computed(x, assignment, up, down, activation, dtype):
    low = assignment.with_weights(assignment.weight_P.to(dtype))
    with torch.no_grad():
        return compute_experts(x.to(dtype), low, up.to(dtype), down.to(dtype), activation, "loop")


@pytest.fixture
def tiles_done(monkeypatch):
    """The tiles that went this way."""
    done, forward = [], columns.forward
    monkeypatch.setattr(columns, "forward", lambda tile, *rest: (done.append(tile), forward(tile, *rest)))
    return done


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu", "silu", "gelu", "relu"])
def test_same_as_naive(name, dtype, tiles_done):
    activation = Activation(name)
    given = problem(activation)
    actual, expected = computed(*given, activation, dtype), naive(*given, activation)
    assert tiles_done
    assert (actual.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_many_rows_and_other_dtypes_go_the_usual_way(tiles_done):
    activation = Activation("swiglu")
    for tokens, dtype in ((300, torch.bfloat16), (40, torch.float32)):
        given = problem(activation, tokens)
        actual, expected = computed(*given, activation, dtype), naive(*given, activation)
        assert not tiles_done
        assert (actual.double() - expected).norm() < 1.5e-2 * expected.norm()


def test_a_token_that_is_nan_stays_alone():
    activation = Activation("swiglu")
    x, assignment, up, down = problem(activation)
    x[0] = torch.nan
    y = computed(x, assignment, up, down, activation, torch.bfloat16)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
