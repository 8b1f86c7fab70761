"""What a family's router does, in our own terms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from crossways.rules.registry import describe
from crossways.rules.score import Score
from crossways.rules.select import Selection
from crossways.surgery.forms import Form


@dataclass(frozen=True)
class Reading:
    """How one router scores, chooses and weighs; found by `read_router`, which proves it on random numbers."""

    num_experts: int
    """E, those that compute nothing included."""
    k: int
    """Experts per token."""
    score: Score
    select: Selection
    renormalize: bool
    """Whether a token's weights are scaled to sum to one; with those of its shared experts, if `shared`."""
    weight_scale: float
    """Factor on all weights."""
    bias: str | None = None
    """Path, from the block, of the E numbers that are added to the scores when choosing."""
    bias_of_logits: bool = False
    """Whether that is added to the logits instead."""
    factor: str | None = None
    """Path, from the block, of the E numbers, or the one number, that weights are multiplied by."""
    hands_over: Form = "pairs"
    """How the choice goes from the router to the experts."""
    probabilities: bool = False
    """Whether what it calls logits are probabilities; their logarithms are the logits, but for a shift per token."""
    logits_from: str | None = None
    """Path, from the router, of the part that says the logits, where the router hands over probabilities."""
    weighs: str = ""
    """Name of a way to weigh that is no score of a pair by itself; empty for all but such families."""
    weighs_eps: float = 0.0
    """Its constant."""
    free: int = 0
    """Experts that compute nothing, the last of the E: they hand on their input, or nothing at all."""
    skips: bool = False
    """Whether the free one is known to the router alone, which hands it over as a weight of zero."""
    shared: str | None = None
    """Path, from the block, of the matrix that gives shared experts logits as well, in the rows after the E. Their
    weights then follow from the choice: they are scored like chosen experts."""

    @property
    def num_places(self) -> int:
        """Indices that the experts themselves know: all but that of a pass."""
        return self.num_experts - self.skips

    def __str__(self) -> str:
        text = f"{describe(self.select)} of {self.weighs or describe(self.score)}"
        text += ", biased" if self.bias else ""
        text += ", weights summing to one" if self.renormalize else ""
        text += " with those of shared experts" if self.renormalize and self.shared else ""
        text += f", times {self.weight_scale:g}" if self.weight_scale != 1.0 else ""
        if self.factor:
            text += ", times a factor"
        return text + (f"; {self.free} of the {self.num_experts} compute nothing" if self.free else "")


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below a module, as it is now."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, Tensor)
    return tensor
