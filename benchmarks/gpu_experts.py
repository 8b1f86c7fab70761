"""Expert compute on a CUDA device, ours and others', beside a dense network of the same active size.

    python benchmarks/gpu_experts.py [--shape D/F/E/k/T ...] [--dtype bfloat16] [--routing even hot] [--rounds 20]

Every contender's output and gradients are first compared with `naive` in float32; one that differs is not timed. Then
all run in turn, again and again; each time is divided by the dense network's of the same round, and the table shows
the median of these ratios, half their interquartile range, and the peak memory of forward+backward above the inputs.
Making the assignment from top-k indices is part of every time of ours. ScatterMoE and SonicMoE take part where they
can be imported or fetched. Without a CUDA device it says so and ends.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts, why_not

SHAPES = (
    "1024/512/64/8/16384",
    "2048/1024/64/8/16384",
    "2048/768/128/8/32768",
    "4096/1536/32/4/16384",
    "2048/1024/256/8/16384",
    "1000/520/24/1/16384",
)
BACKENDS = ("triton", "grouped_mm", "transformers:grouped_mm", "transformers:sonicmoe")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass
class Contender:
    """Something that maps the inputs to (T, D)."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    """What it is differentiated by: inputs and routing weights, which all share, and its own matrices."""
    shared: int = 4
    """How many of the leaves, from the first, must have naive's gradients."""


@dataclass
class Problem:
    """Inputs of one shape, and who computes with them."""

    grad_TD: Tensor
    reference: list[Tensor]
    """Output and gradients by `naive` in float32."""
    flops: float
    """Multiplications and additions of one forward pass."""
    contenders: dict[str, Contender]
    left_out: dict[str, str] = field(default_factory=dict)
    """Why the others do not take part."""


def route(tokens: int, experts: int, k: int, routing: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights and experts (T, K) of random scores; `hot` sends nine tokens in ten to expert 0, among others."""
    logits_TE = torch.randn(tokens, experts, generator=generator, device=generator.device)
    if routing == "hot":
        logits_TE[: tokens * 9 // 10, 0] += 100
    weight_TK, index_TK = logits_TE.softmax(-1).topk(k)
    return weight_TK, index_TK


def build(shape: str, dtype: torch.dtype, routing: str) -> Problem:
    """Random inputs and matrices, and the contenders."""
    width, expert_width, experts, k, tokens = map(int, shape.split("/"))
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()

    x_TD = random(tokens, width)
    up_EHD = random(experts, 2 * expert_width, width, scale=width**-0.5)
    down_EDF = random(experts, width, expert_width, scale=expert_width**-0.5)
    weight_TK, index_TK = route(tokens, experts, k, routing, generator)
    weight_TK = weight_TK.to(dtype).requires_grad_()
    leaves = [x_TD, weight_TK, up_EHD, down_EDF]
    grad_TD = random(tokens, width).detach()
    problem = Problem(grad_TD, [], 6.0 * tokens * k * width * expert_width, {})
    problem.contenders["dense"] = dense(x_TD, random, expert_width * k)
    for name in BACKENDS:
        if reason := why_not(name, x_TD.device, dtype):
            problem.left_out[name] = reason
        else:
            problem.contenders[name] = ours(name, leaves, index_TK, experts)
    scatter_moe(problem, leaves, index_TK)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    problem.reference = results(ours("naive", wide, index_TK, experts), grad_TD.float())
    return problem


def dense(x_TD: Tensor, random: Callable[..., Tensor], active: int) -> Contender:
    """A SwiGLU network as wide as a token's experts together."""
    width = x_TD.shape[1]
    up, down = random(2 * active, width, scale=width**-0.5), random(width, active, scale=active**-0.5)

    def run() -> Tensor:
        gate, value = functional.linear(x_TD, up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * value, down)

    return Contender(run, [x_TD, up, down], shared=0)


def ours(backend: str, leaves: list[Tensor], index_TK: Tensor, experts: int) -> Contender:
    """One of the backends of `compute_experts`."""
    x_TD, weight_TK, up_EHD, down_EDF = leaves

    def run() -> Tensor:
        assignment = Assignment.from_topk(index_TK, weight_TK, experts)
        return compute_experts(x_TD, assignment, up_EHD, down_EDF, Activation("swiglu"), backend)

    return Contender(run, leaves)


def scatter_moe(problem: Problem, leaves: list[Tensor], index_TK: Tensor) -> None:
    """ScatterMoE (Tan et al. 2024, arXiv 2403.08245), which has matrices of its own, the gate in the second half."""
    try:
        from scattermoe.mlp import GLUMLP
    except ImportError as error:
        problem.left_out["scattermoe"] = str(error)
        return
    x_TD, weight_TK, up_EHD, down_EDF = leaves
    experts, width, expert_width = down_EDF.shape
    module = GLUMLP(width, expert_width, experts, index_TK.shape[1], activation=nn.SiLU()).to(x_TD)
    with torch.no_grad():
        module.experts.weight.copy_(up_EHD.roll(expert_width, dims=1))
        module.output_experts.weight.copy_(down_EDF)
    parameters = [module.experts.weight, module.output_experts.weight]
    problem.contenders["scattermoe"] = Contender(
        lambda: module(x_TD, weight_TK, index_TK), [x_TD, weight_TK, *parameters], shared=2
    )


def results(contender: Contender, grad_TD: Tensor) -> list[Tensor]:
    """Output and gradients."""
    y_TD = contender.run()
    return [y_TD.detach(), *torch.autograd.grad(y_TD, contender.leaves, grad_TD)]


def check(problem: Problem, dtype: torch.dtype) -> None:
    """Leave out, with the reason, who fails or differs from naive by more than the tolerance in relative RMS."""
    for name, contender in list(problem.contenders.items()):
        try:
            computed = results(contender, problem.grad_TD)
        except Exception as error:
            if name in ("dense", "triton"):
                raise
            problem.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del problem.contenders[name]
            continue
        if not contender.shared:
            continue
        pairs = zip(computed[: contender.shared + 1], problem.reference, strict=False)
        error = max(((one.float() - other).norm() / other.norm()).item() for one, other in pairs)
        if not error <= TOLERANCE[dtype]:
            if name == "triton":
                raise RuntimeError(f"triton differs from naive by {error:.1e}; not timing a wrong result")
            problem.left_out[name] = f"differs from naive by {error:.1e}"
            del problem.contenders[name]


def step(problem: Problem, contender: Contender, backward: bool) -> None:
    """One pass."""
    if not backward:
        with torch.no_grad():
            contender.run()
        return
    torch.autograd.grad(contender.run(), contender.leaves, problem.grad_TD)


def measure(problem: Problem, rounds: int, backward: bool) -> dict[str, list[float]]:
    """Milliseconds of each contender, round by round, by the device's clock."""
    times: dict[str, list[float]] = {name: [] for name in problem.contenders}
    for repetition in range(rounds + 3):
        for name, contender in problem.contenders.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(problem, contender, backward)
            stop.record()
            stop.synchronize()
            if repetition >= 3:  # the first compile and tune
                times[name].append(start.elapsed_time(stop))
    return times


def peak_memory(problem: Problem, name: str) -> float:
    """GB that forward and backward take beyond what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(problem, problem.contenders[name], backward=True)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def relative(times: list[float], dense_times: list[float]) -> str:
    """Median of the round-by-round ratios to dense, and half their interquartile range."""
    ratios = [mine / theirs for mine, theirs in zip(times, dense_times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}±{(high - low) / 2:.2f}"


def rows(problem: Problem, label: tuple[str, ...], rounds: int) -> list[tuple[str, ...]]:
    """The table's rows of one problem."""
    forward, both = (measure(problem, rounds, backward) for backward in (False, True))
    lines = []
    for name in problem.contenders:
        milliseconds = statistics.median(forward[name])
        cells = (
            relative(forward[name], forward["dense"]),
            relative(both[name], both["dense"]),
            f"{problem.flops / milliseconds / 1e9:.0f}",
            f"{peak_memory(problem, name):.2f}",
        )
        lines.append((*label, name, *cells))
    return lines


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="D/F/E/k/T")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--routing", nargs="+", default=["even", "hot"], choices=["even", "hot"])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_experts: no CUDA device, nothing measured")
        return
    console = Console(width=140)
    table = Table(title=f"time / dense on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    columns = ("D/F/E/k/T", "dtype", "routing", "who", "forward", "forward+backward", "TFLOP/s forward", "peak GB")
    for column in columns:
        table.add_column(column, justify="right")
    for shape in arguments.shape:
        for dtype_name in arguments.dtype:
            for routing in arguments.routing:
                dtype = getattr(torch, dtype_name)
                problem = build(shape, dtype, routing)
                check(problem, dtype)
                for row in rows(problem, (shape, dtype_name, routing), arguments.rounds):
                    table.add_row(*row)
                for name, reason in problem.left_out.items():
                    console.print(f"{shape} {dtype_name} {routing}: without {name}: {reason}")
                torch.cuda.empty_cache()
    console.print(table)


if __name__ == "__main__":
    main()
