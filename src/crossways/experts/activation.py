"""Expert activations: what stands between an expert's two matrices.

Legend: P rows, F expert width, H = 2F for gated activations, F for plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class _Function(NamedTuple):
    """An elementwise function, its version that writes into `out`, and its gradient that writes into `out`."""

    apply: Callable[[Tensor], Tensor]
    apply_into: Callable[[Tensor, Tensor], Tensor]
    grad_into: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(gradient, input, out)"""


_SILU = _Function(
    functional.silu,
    lambda x, out: torch.ops.aten.silu.out(x, out=out),
    lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out),
)
_GELU = _Function(
    functional.gelu,
    lambda x, out: torch.ops.aten.gelu.out(x, out=out),
    lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out),
)
_RELU = _Function(
    functional.relu,
    lambda x, out: torch.clamp_min(x, 0, out=out),
    lambda grad, x, out: torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
)

_FUNCTIONS: dict[str, tuple[_Function, bool]] = {
    "swiglu": (_SILU, True),
    "geglu": (_GELU, True),
    "reglu": (_RELU, True),
    "silu": (_SILU, False),
    "gelu": (_GELU, False),
    "relu": (_RELU, False),
}


@dataclass(frozen=True)
class Activation:
    """An expert's activation, by name.

    Gated ones (`swiglu`, `geglu`, `reglu`; Shazeer 2020, arXiv 2002.05202) multiply f(gate) by up, the
    gate being the first half of the columns; plain ones (`silu`, `gelu`, `relu`) apply f.

    Raises:
        ValueError: for an unknown name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _FUNCTIONS:
            raise ValueError(f"unknown expert activation {self.name!r}; choose one of {', '.join(_FUNCTIONS)}")

    @property
    def gated(self) -> bool:
        """Whether the first matrix has 2F rows."""
        return _FUNCTIONS[self.name][1]

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """The elementwise f itself."""
        return _FUNCTIONS[self.name][0].apply

    def __call__(self, up_PH: Tensor) -> Tensor:
        """(P, H) to (P, F)."""
        if not self.gated:
            return self.function(up_PH)
        gate_PF, up_PF = up_PH.chunk(2, dim=-1)
        return self.function(gate_PF) * up_PF

    def apply_into(self, up_PH: Tensor, out_PF: Tensor) -> None:
        """The same, written into `out_PF`; not differentiable."""
        function, gated = _FUNCTIONS[self.name]
        if not gated:
            function.apply_into(up_PH, out_PF)
            return
        gate_PF, up_PF = up_PH.chunk(2, dim=-1)
        function.apply_into(gate_PF, out_PF)
        out_PF.mul_(up_PF)

    def backward_into(self, grad_PF: Tensor, weight_P1: Tensor, up_PH: Tensor, out: BackwardOut) -> None:
        """Backward of `weight * activation(up)`, from its incoming gradient.

        Args:
            grad_PF: gradient with respect to weight * activation(up); overwritten.
            weight_P1: routing weights (P, 1), in the dtype of `up_PH`.
            up_PH: what the first matrix returned.
            out: where the results go.
        """
        function, gated = _FUNCTIONS[self.name]
        if not gated:
            function.apply_into(up_PH, out.hidden_PF)
        else:
            gate_PF, value_PF = up_PH.chunk(2, dim=-1)
            grad_gate_PF, grad_value_PF = out.grad_up_PH.chunk(2, dim=-1)
            function.apply_into(gate_PF, out.scratch_PF)
            torch.mul(out.scratch_PF, value_PF, out=out.hidden_PF)
        if out.grad_weight_P is not None:
            torch.linalg.vecdot(grad_PF, out.hidden_PF, out=out.grad_weight_P)
        out.hidden_PF.mul_(weight_P1)
        grad_PF.mul_(weight_P1)
        if not gated:
            function.grad_into(grad_PF, up_PH, out.grad_up_PH)
            return
        torch.mul(grad_PF, out.scratch_PF, out=grad_value_PF)
        grad_PF.mul_(value_PF)
        function.grad_into(grad_PF, gate_PF, grad_gate_PF)


class BackwardOut(NamedTuple):
    """Buffers that `Activation.backward_into` fills."""

    hidden_PF: Tensor
    """weight * activation(up): the input of the second matrix."""
    grad_up_PH: Tensor
    """Gradient with respect to `up`."""
    grad_weight_P: Tensor | None
    """Gradient with respect to the routing weights, or None when it is not wanted."""
    scratch_PF: Tensor
    """Working space, used by gated activations."""
