"""Expert compute: ours and transformers' implementations beside a dense network of the same active size, in one run.

    python benchmarks/experts.py [--shape D/F/E/k/T ...] [--dtype float32 bfloat16] [--few D/F/E/k ...] [--seconds 8]

Every contender is first compared with `naive`, output and gradients. Then all run in turn, again and again; each time
is divided by the dense network's of the same round, and a cell holds the median of these ratios and half their
interquartile range, forward and forward+backward. Making the assignment from top-k indices is part of every time, as
sorting is in transformers' functions. The second table is generation: few tokens, where reading the weights is the
limit; a cell holds the bytes of the touched experts' weights per second over what the machine reads at best.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts, resolve_backend, why_not
from measure import Times, head, in_turn, line, peak_bandwidth, peak_flops, ratio

SHAPES = (
    *(
        f"{shape}/{tokens}"
        for shape in ("512/512/16/2", "512/256/64/8", "256/256/16/2")
        for tokens in (512, 4096, 16384)
    ),
    *(f"1024/512/64/8/{tokens}" for tokens in (512, 4096)),
    *(f"2048/1024/64/8/{tokens}" for tokens in (512, 2048)),
    "512/256/256/8/2048",
    "500/250/30/3/1000",
)
FEW = ("512/256/64/8", "1024/512/64/8", "2048/1024/32/4")
FEW_TOKENS = (1, 4, 16, 64)
OURS = ("fused", "loop", "grouped_mm")
PEERS = ("grouped_mm", "eager", "batched_mm")
BATCHED_LIMIT = 2**30
"""`batched_mm` copies an expert's weights for every pair; it is left out where that takes more bytes than this."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass
class Problem:
    """Inputs of one shape, and the contenders by name."""

    leaves: list[Tensor]
    grad_TD: Tensor
    contenders: dict[str, Callable[[], Tensor]]
    flops: float
    """Of the dense network's forward pass."""
    touched: int
    """Bytes of the weights of all experts that have a token."""


def build(shape: str, dtype: torch.dtype, few: bool = False) -> Problem:
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
    weight_TK, index_TK = torch.randn(tokens, experts, generator=generator).softmax(-1).topk(k)
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
    contenders = {"dense": dense, "naive": ours("naive")}
    contenders |= {name: ours(name) for name in OURS if _runs(name, dtype, width, expert_width)}
    for peer in PEERS:
        bytes_copied = tokens * k * up_EHD[0].numel() * up_EHD.element_size()
        aligned = peer != "grouped_mm" or _runs(peer, dtype, width, expert_width)
        if aligned and (peer != "batched_mm" or bytes_copied < BATCHED_LIMIT):
            contenders[f"transformers:{peer}"] = _peer(peer, module, x_TD, index_TK, weight_TK)
    return Problem(
        leaves=[x_TD, up_EHD, down_EDF, weight_TK, dense_up, dense_down],
        grad_TD=torch.randn(tokens, width, generator=generator).to(dtype),
        contenders=contenders,
        flops=6.0 * tokens * k * width * expert_width,
        touched=len(index_TK.unique()) * (up_EHD[0].numel() + down_EDF[0].numel()) * up_EHD.element_size(),
    )


def _runs(name: str, dtype: torch.dtype, width: int, expert_width: int) -> bool:
    if name == "grouped_mm" and any(size * dtype.itemsize % 16 for size in (width, expert_width)):
        return False
    return why_not(name, torch.device("cpu"), dtype) is None


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


def measure(problem: Problem, seconds: float, backward: bool) -> Times:
    """Seconds of each contender but `naive`, round by round."""

    def forget() -> None:
        for leaf in problem.leaves:
            leaf.grad = None

    def one(run: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            if backward:
                run().backward(problem.grad_TD)
            else:
                with torch.no_grad():
                    run()

        return step

    contenders = {name: one(run) for name, run in problem.contenders.items() if name != "naive"}
    return in_turn(contenders, seconds, after=forget)


def _cell(name: str, passes: list[Times]) -> str:
    if name not in passes[0]:
        return "-"
    return ", ".join(ratio(times[name], times["dense"]) for times in passes)


def _against_peers(passes: list[Times], ours: str) -> str:
    """How many times faster than the fastest of transformers' implementations."""
    cells = []
    for times in passes:
        peers = [name for name in times if name.startswith("transformers:")]
        fastest = min(peers, key=lambda name: statistics.median(times[name]))
        cells.append(ratio(times[fastest], times[ours]))
    return ", ".join(cells)


def compare(shapes: list[str], dtypes: list[str], seconds: float) -> None:
    """The first table."""
    names = [*OURS, *(f"transformers:{peer}" for peer in PEERS)]
    columns = ["D/F/E/k/T", "dtype", "dense ms", "dense / peak", *names, "transformers' best / ours"]
    peaks = {name: peak_flops(getattr(torch, name)) for name in dtypes}
    for name, peak in peaks.items():
        print(f"best matrix product in {name}: {peak / 1e9:.0f} GFLOP/s", flush=True)
    head(f"Time / dense, forward, forward+backward; {torch.get_num_threads()} threads", columns)
    for shape in shapes:
        for dtype_name in dtypes:
            dtype = getattr(torch, dtype_name)
            problem = build(shape, dtype)
            check(problem, TOLERANCE[dtype])
            passes = [measure(problem, seconds, backward) for backward in (False, True)]
            dense = [statistics.median(times["dense"]) for times in passes]
            share = [
                f"{problem.flops * (1, 3)[i] / seconds / peaks[dtype_name]:.2f}" for i, seconds in enumerate(dense)
            ]
            line([
                shape, dtype_name, ", ".join(f"{1e3 * one:.1f}" for one in dense), ", ".join(share),
                *(_cell(name, passes) for name in names),
                _against_peers(passes, resolve_backend("auto", "cpu", dtype)),
            ])  # fmt: skip


def compare_few(shapes: list[str], dtypes: list[str], seconds: float) -> None:
    """The second table."""
    bandwidth = peak_bandwidth()
    print(f"\nbest reading rate: {bandwidth / 1e9:.1f} GB/s", flush=True)
    names = [*OURS, *(f"transformers:{peer}" for peer in PEERS)]
    head("Touched weights per second / best reading rate, forward", ["D/F/E/k/T", "dtype", "MB touched", *names])
    for shape in shapes:
        for dtype_name in dtypes:
            for tokens in FEW_TOKENS:
                problem = build(f"{shape}/{tokens}", getattr(torch, dtype_name))
                check(problem, TOLERANCE[getattr(torch, dtype_name)])
                times = measure(problem, seconds / 4, backward=False)
                rates = {
                    name: problem.touched / statistics.median(spent) / bandwidth for name, spent in times.items()
                }
                cells = [f"{rates[name]:.2f}" if name in rates else "-" for name in names]
                line([f"{shape}/{tokens}", dtype_name, f"{problem.touched / 1e6:.0f}", *cells])


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=SHAPES, metavar="D/F/E/k/T")
    parser.add_argument("--few", nargs="*", default=FEW, metavar="D/F/E/k")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each shape, dtype and pass, about")
    arguments = parser.parse_args()
    for name in arguments.dtype:
        if reason := why_not("fused", torch.device("cpu"), getattr(torch, name)):
            print(f"fused is missing in {name}: {reason}")
    compare(arguments.shape, arguments.dtype, arguments.seconds)
    compare_few(arguments.few, arguments.dtype, arguments.seconds)


if __name__ == "__main__":
    main()
