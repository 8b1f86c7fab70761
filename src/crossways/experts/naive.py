"""The readable reference for expert compute. Every other backend is held to it, gradients included.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.biased import Biases


def naive(
    x_TD: Tensor,
    assignment: Assignment,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
    biases: Biases | None = None,
) -> Tensor:
    """y[t] = sum over t's pairs of weight * down_e(activation(up_e(x[t]))), one expert after the other.

    Args:
        x_TD: inputs (T, D).
        assignment: which experts each token visits, and their weights.
        up_EHD: first matrices, (E, 2F, D) for gated activations (gate rows first, then up rows), else (E, F, D).
        down_EDF: second matrices (E, D, F).
        activation: maps (P, H) to (P, F).
        biases: what up_e and down_e add, or None for nothing.

    Returns:
        (T, D) in the dtype of `x_TD`; zero rows for tokens that chose nobody.
    """
    y_TD = x_TD.new_zeros(x_TD.shape)
    offsets = assignment.offsets_E1.tolist()
    for expert in range(assignment.num_experts):
        pairs = slice(offsets[expert], offsets[expert + 1])
        token_P = assignment.token_P[pairs]
        up_bias_H, down_bias_D = (None, None) if biases is None else (biases.up_EH[expert], biases.down_ED[expert])
        hidden_PF = activation(functional.linear(x_TD[token_P], up_EHD[expert], up_bias_H))
        out_PD = functional.linear(hidden_PF, down_EDF[expert], down_bias_D)
        out_PD = out_PD * assignment.weight_P[pairs, None].to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_P, out_PD)
    return y_TD
