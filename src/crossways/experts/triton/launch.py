"""What every matrix product of one call is launched with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossways.experts.activation import Activation
from crossways.experts.triton.configs import block_rows, load_class

_FUNCTION = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


class Products(NamedTuple):
    """Compile-time arguments of the kernels."""

    activation: str
    """The elementwise function: silu, gelu or relu."""
    gated: bool
    """Whether it is multiplied by a second product."""
    block_rows: int
    """Rows of a tile."""
    load: int
    """How many pairs an expert gets on average, roughly."""
    upcast: bool
    """Multiply in float32 whatever the inputs: Triton's interpreter has no bfloat16 arithmetic."""
    precision: str
    """How float32 is multiplied: `ieee`, or `tf32` where PyTorch's own products may."""

    def meta(self) -> dict[str, Any]:
        """As keyword arguments of a row product."""
        return {"UPCAST": self.upcast, "PRECISION": self.precision, "BLOCK_M": self.block_rows}


def products_for(x_TD: Tensor, num_pairs: int, num_experts: int, activation: str) -> Products:
    """The arguments for these inputs and an activation by its name."""
    return Products(
        activation=_FUNCTION.get(activation, activation),
        gated=Activation(activation).gated,
        block_rows=block_rows(num_pairs, num_experts),
        load=load_class(num_pairs, num_experts),
        upcast=not x_TD.is_cuda,
        precision="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    )
