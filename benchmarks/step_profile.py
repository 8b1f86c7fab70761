"""Where the time of a training step goes: a share for each part of the model, forward and backward.

    python benchmarks/step_profile.py [--shape quickstart 100M] [--dtype float32 bfloat16] [--steps 5]

The models are those of `train_throughput.py`. An operator belongs to the innermost module of the list below that it
runs under; a backward operator belongs to the part of the forward operator whose gradient it computes. What has
neither (the loss, residual sums, rotary tables) is `rest`. Times are the operators' own on the thread that calls
them, so the profiler's cost per operator is in them: parts of many small operators look dearer than they are.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from train_throughput import SHAPES, Contender, olmoe, ours

MARK = "part: "
PARTS = {
    "embed_tokens": "embedding, output",
    "lm_head": "embedding, output",
    "self_attn": "attention",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "router": "routing",
    "gate": "routing",
    "experts": "experts",
    "mlp": "routing",
}
"""Last name of a module's path to the part it is reported as; the innermost wins, so `mlp` means what is in the
routed layer but neither a gate nor experts: building assignments, choosing."""


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Within the context, forward passes of the modules in `PARTS` appear in a profile by their part."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            part = PARTS.get(path.rpartition(".")[2])
            if part is not None:
                _mark(stack, module, MARK + part)
        yield


def _mark(stack: ExitStack, module: nn.Module, name: str) -> None:
    running: list[record_function] = []

    def enter(*_: object) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
        stack.callback(handle.remove)


def shares(events: list[FunctionEvent]) -> Counter[tuple[str, str]]:
    """Own time in microseconds by (part, direction)."""
    forward_parts = {
        event.sequence_nr: part
        for event in events
        if event.sequence_nr >= 0 and not _is_backward(event) and (part := _part(event)) is not None
    }
    times: Counter[tuple[str, str]] = Counter()
    for event in events:
        node = _backward_node(event)
        part = _part(event) if node is None else forward_parts.get(node.sequence_nr)
        direction = "forward" if node is None else "backward"
        times[part or "rest", direction] += event.self_cpu_time_total
    return times


def _ancestry(event: FunctionEvent) -> Iterator[FunctionEvent]:
    current: FunctionEvent | None = event
    while current is not None:
        yield current
        current = current.cpu_parent


def _is_backward(event: FunctionEvent) -> bool:
    return _backward_node(event) is not None


def _backward_node(event: FunctionEvent) -> FunctionEvent | None:
    name = "autograd::engine::evaluate_function"
    return next((parent for parent in _ancestry(event) if parent.name.startswith(name)), None)


def _part(event: FunctionEvent) -> str | None:
    names = (parent.name for parent in _ancestry(event))
    return next((name.removeprefix(MARK) for name in names if name.startswith(MARK)), None)


def profiled(contender: Contender, ids_BS: Tensor, steps: int) -> Counter[tuple[str, str]]:
    """Own times of `steps` training steps after two that are not counted."""
    for _ in range(2):
        contender.step(ids_BS)
    step = contender.optimizer.step
    with marked(contender.model), profile(activities=[ProfilerActivity.CPU]) as record:

        def optimizer_step() -> None:
            with record_function(MARK + "optimizer"):
                step()

        contender.optimizer.step = optimizer_step  # type: ignore[method-assign, assignment]
        for _ in range(steps):
            contender.step(ids_BS)
    return shares(list(record.events() or []))


def show(title: str, times: Counter[tuple[str, str]], steps: int) -> None:
    """One table: milliseconds a step and share, by part."""
    table = Table(title=title)
    for column in ("part", "forward, ms", "backward, ms", "share"):
        table.add_column(column, justify="right")
    total = sum(times.values())
    by_part: Counter[str] = Counter()
    for (part, _), time in times.items():
        by_part[part] += time
    for part, time in by_part.most_common():
        cells = [f"{times[part, direction] / steps / 1e3:.1f}" for direction in ("forward", "backward")]
        table.add_row(part, *cells, f"{time / total:.1%}")
    Console(width=120).print(table)


def main() -> None:
    """Profile every shape and dtype, ours and OLMoE with `grouped_mm`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["quickstart", "100M"], choices=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.shape:
        shape = SHAPES[name]
        torch.manual_seed(0)
        ids_BS = torch.randint(shape.vocabulary, (shape.batch, shape.sequence))
        for dtype in arguments.dtype:
            for label, model in (("ours", ours(shape)), ("OLMoE, grouped_mm", olmoe(shape, "grouped_mm"))):
                times = profiled(Contender(model, dtype), ids_BS, arguments.steps)
                show(f"{name}, {dtype}, {label}", times, arguments.steps)


if __name__ == "__main__":
    main()
