"""Sharing: which layers use the same gate. A plan is plain data; the model hands the gates out by it.

Legend: L MoE layers, A factors (routers of one layer; 1 for a plain MoE layer).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from crossways.errors import UserError
from crossways.rules.registry import build, catalogue


@dataclass(frozen=True)
class Sharing:
    """Says, for every router of the model, which gate it uses."""

    name: ClassVar[str]

    def block(self, layer: int) -> int:
        """The block that MoE layer `layer` (0 to L - 1, counting MoE layers only) belongs to."""
        raise NotImplementedError

    def check(self, num_layers: int) -> None:
        """Raise `UserError` if the plan does not fit this many MoE layers."""

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

    def deciding(self, num_layers: int) -> list[int]:
        """For each block, how many of its layers decide for themselves and so ask its gate."""
        counts = Counter(self.block(layer) for layer in range(num_layers) if not self.reuses_decision(layer))
        return [counts[block] for block in range(len(counts))]


@dataclass(frozen=True)
class PerLayer(Sharing):
    """Independent routing: every layer has a gate of its own, as in nearly all published MoE models."""

    name: ClassVar[str] = "layer"

    def block(self, layer: int) -> int:
        return layer


@dataclass(frozen=True)
class PerBlock(Sharing):
    """PathMoE: consecutive MoE layers use one gate, block(l) = floor(l / size) (arXiv 2603.18297, figure 2b).

    Each layer applies the gate to its own hidden state, so decisions inside a block may differ; experts and norms
    are not shared. Size 1 is independent routing. Blocks of unequal sizes are not the paper's, which names them as
    future work.
    """

    name: ClassVar[str] = "block"

    size: int | list[int] | tuple[int, ...]
    """MoE layers per block, at least 1; the paper's best is 4, and a last, shorter block is allowed. Or a list of
    sizes, first block first, that add up to the number of MoE layers."""

    def __post_init__(self) -> None:
        sizes = tuple(self.size) if isinstance(self.size, list | tuple) else (self.size,)
        if not sizes or not all(_is_size(size) for size in sizes):
            raise UserError(
                f"sharing {self.name!r}: size must be a whole number of at least 1 or a list of them, got {self.size}"
            )
        whole = tuple(int(size) for size in sizes)  # 4.0 in a recipe means 4
        object.__setattr__(self, "size", whole if isinstance(self.size, list | tuple) else whole[0])

    def check(self, num_layers: int) -> None:
        if isinstance(self.size, tuple) and sum(self.size) != num_layers:
            raise UserError(
                f"sharing {self.name!r}: blocks of {list(self.size)} are {sum(self.size)} layers, the model routes "
                f"{num_layers}"
            )

    def block(self, layer: int) -> int:
        if isinstance(self.size, tuple):
            return bisect_right(list(accumulate(self.size)), layer)
        return layer // self.size  # type: ignore[operator]


@dataclass(frozen=True)
class All(Sharing):
    """One gate for all MoE layers: a single block, whatever the depth (PathMoE's B = L)."""

    name: ClassVar[str] = "all"

    def block(self, layer: int) -> int:
        return 0


@dataclass(frozen=True)
class Decision(PerBlock):
    """One decision per block: its first layer decides, and the others execute the same assignment, weights included,
    with their own experts (PathMoE, figure 2c; MonoB8 is `size` 8).

    In Cartesian layers each factor repeats the decision of the same factor. The paper does not say whether the
    weights are computed anew in each layer; here they are part of the decision.
    """

    name: ClassVar[str] = "decision"

    def reuses_decision(self, layer: int) -> bool:
        return self.position(layer) > 0


@dataclass(frozen=True)
class Repeated(Sharing):
    """The plan of a model that goes through its layers several times: every round shares as the first does."""

    once: Sharing
    """The plan of one round."""
    num_layers: int
    """MoE layers in a round, at least 1."""

    def block(self, layer: int) -> int:
        return self.once.block(layer % self.num_layers)

    def check(self, num_layers: int) -> None:
        self.once.check(self.num_layers)

    def position(self, layer: int) -> int:
        return self.once.position(layer % self.num_layers)

    def reuses_decision(self, layer: int) -> bool:
        return self.once.reuses_decision(layer % self.num_layers)

    def deciding(self, num_layers: int) -> list[int]:
        return self.once.deciding(self.num_layers)


def _is_size(size: Any) -> bool:
    return isinstance(size, int | float) and not isinstance(size, bool) and size >= 1 and size % 1 == 0


def sharing_catalogue() -> dict[str, type[Sharing]]:
    """Every sharing plan by name."""
    return catalogue(Sharing)


def build_sharing(spec: str | Mapping[str, Any]) -> Sharing:
    """A sharing plan from its name or its fields; raises `UserError` for an unknown one."""
    return build(Sharing, spec, sharing_catalogue())
