import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import Experts


def assignment(tokens=5, experts=3):
    return Assignment.from_topk(torch.arange(tokens)[:, None] % experts, torch.ones(tokens, 1), experts)


@pytest.mark.parametrize(("activation", "name", "rows"), [("swiglu", "gate_up_proj", 8), ("gelu", "up_proj", 4)])
def test_layout_is_that_of_transformers(activation, name, rows):
    experts = Experts(3, 6, 4, activation)
    shapes = {key: tuple(value.shape) for key, value in experts.state_dict().items()}
    assert shapes == {name: (3, rows, 6), "down_proj": (3, 6, 4)}


def test_forward_is_each_tokens_expert():
    experts = Experts(3, 6, 4)
    x_TD = torch.randn(5, 6)
    y_TD = experts(x_TD, assignment())
    gate, up = (x_TD[4] @ experts.gate_up_proj[1].T).chunk(2)
    torch.testing.assert_close(y_TD[4], (torch.nn.functional.silu(gate) * up) @ experts.down_proj[1].T)


def test_reset_parameters_draws_with_the_given_spread():
    experts = Experts(8, 64, 64)
    experts.reset_parameters(std=0.5)
    assert experts.down_proj.std().item() == pytest.approx(0.5, rel=0.05)


def test_repr_names_sizes_and_backend():
    assert repr(Experts(3, 6, 4, backend="naive")) == "Experts(3 x 6 -> 4, activation=swiglu, backend=naive)"


@pytest.mark.parametrize("wrong", [{"num_experts": 0}, {"activation": "tanh"}, {"backend": "fastest"}])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least 1|tanh|fastest"):
        Experts(**{"num_experts": 2, "hidden_size": 4, "intermediate_size": 4, **wrong})
