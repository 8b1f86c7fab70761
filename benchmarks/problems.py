"""What expert compute is given: a shape, a dtype, a load; and whether what somebody made of it is right.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts

LOADS = ("even", "hot", "empty")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Greatest relative root-mean-square error against `naive` in float32, of the output and of each gradient."""
NAMES = ("output", "x", "routing weight", "first matrix", "second matrix")


@dataclass(frozen=True)
class Case:
    """A shape, how many tokens, and how they are spread over the experts."""

    width: int
    expert_width: int
    experts: int
    k: int
    tokens: int
    load: str = "even"
    """`even`: random; `hot`: nine tokens in ten choose expert 0, among others; `empty`: half of the experts, or all
    but k, get nobody."""

    def __str__(self) -> str:
        shape = f"{self.width}/{self.expert_width}/{self.experts}/{self.k}/{self.tokens}"
        return shape if self.load == "even" else f"{shape} {self.load}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of one forward pass."""
        return 6.0 * self.tokens * self.k * self.width * self.expert_width


def case_of(shape: str, tokens: int, load: str = "even") -> Case:
    """From `D/F/E/k`.

    Raises:
        ValueError: when it is no such thing.
    """
    parts = shape.split("/")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is D/F/E/k, such as 512/256/64/8, not {shape!r}")
    width, expert_width, experts, k = map(int, parts)
    if k > experts:
        raise ValueError(f"{k} experts a token of {experts} in shape {shape!r}")
    return Case(width, expert_width, experts, k, tokens, load)


@dataclass
class Contender:
    """Something that maps the inputs to (T, D)."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    """What it is differentiated by: inputs and routing weights, which all share, then matrices."""
    shared: int = 4
    """How many of the leaves, from the first, must have naive's gradients: 4, or 2 for who has matrices of its own;
    none, nor the output, for the dense network, which has 0."""


@dataclass
class Problem:
    """Random inputs and matrices of one case."""

    case: Case
    dtype: torch.dtype
    device: str
    leaves: list[Tensor]
    """x (T, D), routing weights (T, K), first matrices (E, 2F, D), second ones (E, D, F)."""
    index_TK: Tensor
    grad_TD: Tensor
    random: Callable[..., Tensor]
    reference: list[Tensor] = field(default_factory=list)

    @property
    def touched(self) -> int:
        """Bytes of the matrices of all experts that have a token."""
        _, _, up_EHD, down_EDF = self.leaves
        return len(self.index_TK.unique()) * (up_EHD[0].numel() + down_EDF[0].numel()) * self.dtype.itemsize

    def step(self, contender: Contender, backward: bool) -> None:
        """One pass; gradients are allocated anew, as in every training step."""
        if backward:
            torch.autograd.grad(contender.run(), contender.leaves, self.grad_TD)
        else:
            with torch.no_grad():
                contender.run()

    def results(self, contender: Contender) -> list[Tensor]:
        """Output and gradients."""
        y_TD = contender.run()
        return [y_TD.detach(), *torch.autograd.grad(y_TD, contender.leaves, self.grad_TD.to(y_TD.dtype))]

    def expected(self) -> list[Tensor]:
        """Output and gradients by `naive` in float32; computed once."""
        if not self.reference:
            wide = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
            self.reference = self.results(crossways_contender(self, "naive", wide))
        return self.reference

    def error(self, contender: Contender) -> tuple[float, str]:
        """The greatest relative root-mean-square error among output and shared gradients, and of which."""
        computed = self.results(contender)[: contender.shared + 1]
        pairs = zip(NAMES, computed, self.expected(), strict=False)
        errors = [(_difference(one, other), name) for name, one, other in pairs]
        return max(errors, key=lambda pair: (not pair[0] <= torch.inf, pair[0]))  # NaN is worst


def _difference(actual: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item()
    error = (actual.float() - expected).norm().item()
    return error / scale if scale else error


def crossways_contender(problem: Problem, backend: str, leaves: list[Tensor] | None = None) -> Contender:
    """One of the backends of `compute_experts`; making the assignment from top-k indices is part of it."""
    x_TD, weight_TK, up_EHD, down_EDF = leaves = leaves or problem.leaves

    def run() -> Tensor:
        assignment = Assignment.from_topk(problem.index_TK, weight_TK, problem.case.experts)
        return compute_experts(x_TD, assignment, up_EHD, down_EDF, Activation("swiglu"), backend)

    return Contender(run, leaves)


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random inputs and matrices, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    x_TD = random(case.tokens, case.width)
    up_EHD = random(case.experts, 2 * case.expert_width, case.width, scale=case.width**-0.5)
    down_EDF = random(case.experts, case.width, case.expert_width, scale=case.expert_width**-0.5)
    weight_TK, index_TK = route(case, generator)
    weight_TK = weight_TK.to(dtype).requires_grad_()
    grad_TD = random(case.tokens, case.width).detach()
    return Problem(case, dtype, device, [x_TD, weight_TK, up_EHD, down_EDF], index_TK, grad_TD, random)


def route(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights and experts (T, K). Weights are random whatever the load, so that no expert's errors weigh nothing."""
    logits_TE = torch.randn(case.tokens, case.experts, generator=generator, device=generator.device)
    choice_TE = logits_TE.clone()
    if case.load == "hot":
        choice_TE[: case.tokens * 9 // 10, 0] += 100
    if case.load == "empty":
        choice_TE[:, max(case.experts // 2, case.k) :] -= 100
    index_TK = choice_TE.topk(case.k).indices
    return logits_TE.gather(-1, index_TK).softmax(-1), index_TK
