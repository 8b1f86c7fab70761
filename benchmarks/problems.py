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
from crossways.experts.naive import naive
from crossways.native import why_not_native
from crossways.native.memory import settle

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

    def flops(self, backward: bool = False) -> float:
        """Multiplications and additions of a forward pass: three matrices for each pair; with the backward pass,
        which needs gradients of the pair's vectors and of the matrices, three times as many."""
        return (6.0, 18.0)[backward] * self.tokens * self.k * self.width * self.expert_width

    def expert_bytes(self, itemsize: int) -> int:
        """Of the matrices of one expert."""
        return 3 * self.width * self.expert_width * itemsize

    def least_bytes(self, experts: int, itemsize: int, backward: bool = False) -> int:
        """What must pass between memory and processor at least, if nothing waits in a cache.

        Forward: the matrices of the `experts` that have a token once, x and y. Forward+backward: those matrices twice
        and their gradients once, x, y and their gradients.
        """
        rows = (2, 4)[backward] * self.tokens * self.width * itemsize
        return (1, 3)[backward] * experts * self.expert_bytes(itemsize) + rows


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
    """How many of the leaves, from the first, must have naive's gradients; 2 for who has matrices of its own."""
    forward_only: str = ""
    """Why it takes no part in passes with backward; empty if it does."""


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
    matrix: Callable[..., Tensor]
    """Makes a random matrix of some size with rows of length 1, as it is after a while of computing with it."""
    reference: list[Tensor] = field(default_factory=list)

    @property
    def touched(self) -> int:
        """How many experts have a token."""
        return len(self.index_TK.unique())

    def results(self, contender: Contender, backward: bool) -> list[Tensor]:
        """One pass: the output, and gradients if asked for, which are allocated anew as in every training step."""
        if not backward:
            with torch.no_grad():
                return [contender.run()]
        y_TD = contender.run()
        return [y_TD.detach(), *torch.autograd.grad(y_TD, contender.leaves, self.grad_TD.to(y_TD.dtype))]

    def step(self, contender: Contender, backward: bool) -> None:
        """One pass whose results nobody looks at."""
        self.results(contender, backward)

    def expected(self, backward: bool) -> list[Tensor]:
        """Output, and gradients if asked for, by `naive` in float32; kept until `reference` is cleared."""
        if len(self.reference) < 1 + 4 * backward:
            self.reference[:] = self.results(_reference(self), backward)
            if backward:
                # One leaf for each expert: the gradient of a slice is as large as what it was cut from.
                y_TD, grad_x_TD, grad_weight_TK, *grads = self.reference
                ups, downs = grads[: self.case.experts], grads[self.case.experts :]
                self.reference[:] = [y_TD, grad_x_TD, grad_weight_TK, torch.stack(ups), torch.stack(downs)]
        return self.reference

    def error(self, contender: Contender, results: list[Tensor]) -> tuple[float, str]:
        """The greatest relative root-mean-square error of what `results` returned, and in which tensor.

        The output and the gradients of what all contenders share are looked at, every element of them.
        """
        backward = len(results) > 1
        pairs = zip(NAMES, results[: 1 + contender.shared], self.expected(backward), strict=False)
        errors = [(_difference(one, other), name) for name, one, other in pairs]
        return max(errors, key=badness)


def badness(error: tuple[float, str]) -> tuple[bool, float]:
    """To compare errors by: NaN is worst."""
    return not error[0] <= torch.inf, error[0]


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Row by row of the first dimension where that is experts, so that no copy of all matrices is made."""
    pairs = zip(actual, expected, strict=True) if expected.ndim == 3 else [(actual, expected)]
    squares = [((one.float() - other).square().sum(), other.square().sum()) for one, other in pairs]
    error, scale = (torch.stack(parts).double().sum().sqrt().item() for parts in zip(*squares, strict=True))
    return error / scale if scale else error


def _reference(problem: Problem) -> Contender:
    """`naive` in float32, differentiated by each expert's matrices as leaves of their own."""
    x_TD, weight_TK, up_EHD, down_EDF = (leaf.detach().float() for leaf in problem.leaves)
    inputs = [x_TD.requires_grad_(), weight_TK.requires_grad_()]
    ups, downs = ([one.requires_grad_() for one in matrices.unbind()] for matrices in (up_EHD, down_EDF))

    def run() -> Tensor:
        assignment = Assignment.from_topk(problem.index_TK, weight_TK, problem.case.experts)
        return naive(x_TD, assignment, ups, downs, Activation("swiglu"))  # type: ignore[arg-type]

    return Contender(run, [*inputs, *ups, *downs])


def crossways_contender(problem: Problem, backend: str) -> Contender:
    """One of the backends of `compute_experts`; making the assignment from top-k indices is part of it."""
    x_TD, weight_TK, up_EHD, down_EDF = problem.leaves

    def run() -> Tensor:
        assignment = Assignment.from_topk(problem.index_TK, weight_TK, problem.case.experts)
        return compute_experts(x_TD, assignment, up_EHD, down_EDF, Activation("swiglu"), backend)

    return Contender(run, problem.leaves)


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random inputs and matrices, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def matrix(*size: int) -> Tensor:
        x = (random(*size) * size[-1] ** -0.5).to(dtype)
        if device == "cpu" and why_not_native() is None:
            settle(x)
        return x.requires_grad_()

    x_TD = random(case.tokens, case.width).to(dtype).requires_grad_()
    up_EHD = matrix(case.experts, 2 * case.expert_width, case.width)
    down_EDF = matrix(case.experts, case.width, case.expert_width)
    weight_TK, index_TK = route(case, generator)
    weight_TK = weight_TK.to(dtype).requires_grad_()
    grad_TD = random(case.tokens, case.width).to(dtype)
    return Problem(case, dtype, device, [x_TD, weight_TK, up_EHD, down_EDF], index_TK, grad_TD, matrix)


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
