"""Expert activations: what stands between an expert's two matrices.

Legend: P rows, F expert width, H = 2F for gated activations, F for plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (functional.silu, True),
    "geglu": (functional.gelu, True),
    "reglu": (functional.relu, True),
    "silu": (functional.silu, False),
    "gelu": (functional.gelu, False),
    "relu": (functional.relu, False),
}


@dataclass(frozen=True)
class Activation:
    """An expert's activation, by name.

    Gated ones (`swiglu`, `geglu`, `reglu`; Shazeer 2020, arXiv 2002.05202, section 2) multiply f(gate) by up, the
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

    def __call__(self, up_PH: Tensor) -> Tensor:
        """(P, H) to (P, F)."""
        function, gated = _FUNCTIONS[self.name]
        if not gated:
            return function(up_PH)
        gate_PF, up_PF = up_PH.chunk(2, dim=-1)
        return function(gate_PF) * up_PF
