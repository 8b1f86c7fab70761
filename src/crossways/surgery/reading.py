"""What a family's router does, in our own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from crossways.rules.registry import describe
from crossways.rules.score import Score
from crossways.rules.select import Selection

HandOver = Literal["pairs", "dense"]


@dataclass(frozen=True)
class Reading:
    """How one router scores, chooses and weighs; found by `read_router`, which proves it on random numbers."""

    num_experts: int
    """E."""
    k: int
    """Experts per token."""
    score: Score
    select: Selection
    renormalize: bool
    """Whether a token's weights are scaled to sum to one."""
    weight_scale: float
    """Factor on all weights."""
    bias: str | None = None
    """Path, from the block, of the E numbers that are added to the scores when choosing."""
    bias_of_logits: bool = False
    """Whether that is added to the logits instead."""
    factor: str | None = None
    """Path, from the block, of the E numbers that weights are multiplied by."""
    hands_over: HandOver = "pairs"
    """`pairs`: (logits, weights of the chosen, their indices). `dense`: (weights of all with zeros, logits)."""
    probabilities: bool = False
    """Whether what it calls logits are probabilities; their logarithms are the logits, but for a shift per token."""
    logits_from: str | None = None
    """Path, from the router, of the part that says the logits, where the router hands over probabilities."""
    weighs: str = ""
    """Name of a way to weigh that is no score of a pair by itself; empty for all but such families."""
    weighs_eps: float = 0.0
    """Its constant."""

    def __str__(self) -> str:
        text = f"{describe(self.select)} of {self.weighs or describe(self.score)}"
        text += ", biased" if self.bias else ""
        text += ", weights summing to one" if self.renormalize else ""
        text += f", times {self.weight_scale:g}" if self.weight_scale != 1.0 else ""
        return text + (", times a factor per expert" if self.factor else "")


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below a module, as it is now."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, Tensor)
    return tensor
