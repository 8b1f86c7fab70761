"""Expert compute: ours and transformers' backends beside a dense network of the same active size, in one run.

    python benchmarks/experts.py [--shape D/F/E/k/T ...] [--dtype float32 bfloat16] [--repetitions 9]

Every backend is first compared with `naive`. Then all run in turn, again and again; each time is divided by the dense
network's of the same round, and the table shows the median of these ratios and half their interquartile range. Making
the assignment from top-k indices is part of every time, as sorting is in transformers' functions.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts

SHAPES = (
    "512/512/16/2/4096",
    "512/256/64/8/4096",
    "256/256/16/2/4096",
    "1024/512/64/8/2048",
    "128/64/16/2/2048",
    "128/64/32/4/2048",
    "256/128/32/4/2048",
)
PEERS = ("eager", "grouped_mm", "batched_mm")
BATCHED_LIMIT = 2**31
"""`batched_mm` copies an expert's weights for every pair; it is left out where that takes more bytes than this."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass
class Problem:
    """Inputs of one shape, and the contenders by name."""

    leaves: list[Tensor]
    grad_TD: Tensor
    contenders: dict[str, Callable[[], Tensor]]


def build(shape: str, dtype: torch.dtype) -> Problem:
    """Random inputs and weights; routing by top-k of random logits."""
    width, expert_width, experts, k, tokens = map(int, shape.split("/"))
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype).requires_grad_()

    x_TD = random(tokens, width)
    up_EHD = random(experts, 2 * expert_width, width, scale=width**-0.5)
    down_EDF = random(experts, width, expert_width, scale=expert_width**-0.5)
    dense_up = random(2 * expert_width * k, width, scale=width**-0.5)
    dense_down = random(width, expert_width * k, scale=(expert_width * k) ** -0.5)
    scores_TE = torch.randn(tokens, experts, generator=generator).softmax(-1)
    weight_TK, index_TK = scores_TE.topk(k)
    weight_TK = weight_TK.detach().to(dtype).requires_grad_()

    def dense() -> Tensor:
        gate, up = functional.linear(x_TD, dense_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, dense_down)

    def ours(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            assignment = Assignment.from_topk(index_TK, weight_TK, experts)
            return compute_experts(x_TD, assignment, up_EHD, down_EDF, Activation("swiglu"), backend)

        return run

    module = _peer_module(width, expert_width, experts, up_EHD, down_EDF)
    contenders = {"dense": dense, **{name: ours(name) for name in ("naive", "fused", "loop", "grouped_mm")}}
    for peer in PEERS:
        bytes_copied = tokens * k * up_EHD[0].numel() * up_EHD.element_size()
        if peer != "batched_mm" or bytes_copied < BATCHED_LIMIT:
            contenders[f"transformers:{peer}"] = _peer(peer, module, x_TD, index_TK, weight_TK)
    leaves = [x_TD, up_EHD, down_EDF, weight_TK, dense_up, dense_down]
    return Problem(leaves, torch.randn(tokens, width, generator=generator).to(dtype), contenders)


def _peer_module(width: int, expert_width: int, experts: int, up_EHD: Tensor, down_EDF: Tensor) -> OlmoeExperts:
    config = OlmoeConfig(hidden_size=width, intermediate_size=expert_width, num_experts=experts)
    with torch.device("meta"):
        module = OlmoeExperts(config)
    # Not parameters: the very tensors of the other contenders, so that gradients land in the same place.
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = up_EHD, down_EDF
    return module


def _peer(name: str, module: OlmoeExperts, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Callable[[], Tensor]:
    if name == "eager":
        eager = OlmoeExperts.forward.__wrapped__
        return lambda: eager(module, x_TD, index_TK, weight_TK)
    return lambda: ALL_EXPERTS_FUNCTIONS[name](module, x_TD, index_TK, weight_TK)


def check(problem: Problem, tolerance: float) -> None:
    """Compare every contender's output and gradients with naive's.

    Raises:
        RuntimeError: when one differs by more than `tolerance` in relative RMS.
    """
    reference = _results(problem, "naive")
    for name in problem.contenders.keys() - {"dense", "naive"}:
        for actual, expected in zip(_results(problem, name), reference, strict=True):
            error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
            if not error <= tolerance:
                raise RuntimeError(f"{name} differs from naive by {error:.1e}; not timing a wrong result")


def _results(problem: Problem, name: str) -> list[Tensor]:
    y_TD = problem.contenders[name]()
    return [y_TD.detach(), *torch.autograd.grad(y_TD, problem.leaves[:4], problem.grad_TD)]


def measure(problem: Problem, repetitions: int, backward: bool) -> dict[str, list[float]]:
    """Seconds of each contender, round by round."""
    times: dict[str, list[float]] = {name: [] for name in problem.contenders}
    for repetition in range(repetitions + 2):
        for name, run in problem.contenders.items():
            start = time.perf_counter()
            if backward:
                run().backward(problem.grad_TD)
            else:
                with torch.no_grad():
                    run()
            elapsed = time.perf_counter() - start
            for leaf in problem.leaves:
                leaf.grad = None
            if repetition >= 2:
                times[name].append(elapsed)
    return times


def relative(times: list[float], dense: list[float]) -> str:
    """Median of the round-by-round ratios to dense, and half their interquartile range."""
    ratios = [ours / theirs for ours, theirs in zip(times, dense, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}±{(high - low) / 2:.2f}"


def _cell(name: str, passes: list[dict[str, list[float]]]) -> str:
    if name not in passes[0]:
        return "-"
    return " | ".join(relative(times[name], times["dense"]) for times in passes)


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="D/F/E/k/T")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    names = ["naive", "loop", "grouped_mm", *(f"transformers:{peer}" for peer in PEERS)]
    table = Table(title=f"time / dense, forward | forward+backward, {torch.get_num_threads()} threads")
    for column in ("D/F/E/k/T", "dtype", "dense ms", *(name.replace("transformers:", "HF ") for name in names)):
        table.add_column(column, justify="right")
    for shape in arguments.shape:
        for dtype_name in arguments.dtype:
            dtype = getattr(torch, dtype_name)
            problem = build(shape, dtype)
            check(problem, TOLERANCE[dtype])
            passes = [measure(problem, arguments.repetitions, backward) for backward in (False, True)]
            dense_ms = " | ".join(f"{statistics.median(times['dense']) * 1e3:.1f}" for times in passes)
            table.add_row(shape, dtype_name, dense_ms, *(_cell(name, passes) for name in names))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
