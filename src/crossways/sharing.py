"""Sharing: which layers use the same gate. A plan is plain data; the model hands the gates out by it.

Legend: L MoE layers, A factors (routers of one layer; 1 for a plain MoE layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from crossways.errors import UserError
from crossways.rules.registry import build


@dataclass(frozen=True)
class Sharing:
    """Says, for every router of the model, which gate it uses."""

    name: ClassVar[str]

    def block(self, layer: int) -> int:
        """The block that MoE layer `layer` (0 to L - 1, counting MoE layers only) belongs to."""
        raise NotImplementedError

    def position(self, layer: int) -> int:
        """How many layers of its block come before MoE layer `layer`."""
        return sum(self.block(earlier) == self.block(layer) for earlier in range(layer))

    def reuses_decision(self, layer: int) -> bool:
        """Whether MoE layer `layer` executes the decision of the layer before instead of making its own."""
        return False

    def plan(self, num_layers: int, num_factors: int = 1) -> list[tuple[int, ...]]:
        """Gate index of every router: L tuples of A indices into the model's list of gates.

        The factors of a Cartesian layer never share with each other, only with the same factor of other layers.
        """
        return [
            tuple(self.block(layer) * num_factors + factor for factor in range(num_factors))
            for layer in range(num_layers)
        ]


@dataclass(frozen=True)
class PerLayer(Sharing):
    """Independent routing: every layer has a gate of its own, as in nearly all published MoE models."""

    name: ClassVar[str] = "layer"

    def block(self, layer: int) -> int:
        return layer


@dataclass(frozen=True)
class PerBlock(Sharing):
    """PathMoE: `size` consecutive MoE layers use one gate, block(l) = floor(l / size) (arXiv 2603.18297, figure 2b).

    Each layer applies the gate to its own hidden state, so decisions inside a block may differ; experts and norms
    are not shared. Size 1 is independent routing.
    """

    name: ClassVar[str] = "block"

    size: int
    """MoE layers per block, at least 1; the paper's best is 4. A last, shorter block is allowed."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or self.size < 1 or self.size % 1 != 0:
            raise UserError(f"sharing 'block': size must be a whole number of at least 1, got {self.size}")
        object.__setattr__(self, "size", int(self.size))

    def block(self, layer: int) -> int:
        return layer // self.size


def build_sharing(spec: str | Mapping[str, Any]) -> Sharing:
    """A sharing plan from its name or its fields; raises `UserError` for an unknown one."""
    return build(Sharing, spec, {cls.name: cls for cls in Sharing.__subclasses__()})
