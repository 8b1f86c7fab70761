"""One table of every speed: experts, few tokens, routing, growth, training; ours, peers, and what the machine can do.

    python benchmarks/bench.py                                            # all; about 20 minutes on two cores
    python benchmarks/bench.py --quick                                    # a few minutes
    python benchmarks/bench.py --shape 1000/520/24/1 --tokens 333 4096 --load even hot empty
    python benchmarks/bench.py --only routing few

What a cell holds, by the row's first column:

    forward, forward+backward   time / the dense network's of the same active size; `bound`: the dense network itself,
                                and its share of the best matrix product's rate; `floor`: the least that the products
                                at that rate, or the bytes that must move at the best reading rate, take / dense
    ..., pages kept             the same where the allocator keeps what is given back, for everybody as for ours
    few tokens                  bytes of the touched experts' matrices per second / the rate of reading beside the row
    few tokens, cold            the same with 256 MB of something else read before each
    routing                     a rule's time / its experts' time
    training                    tokens per second / those of transformers' OLMoE; `bound`: OLMoE
    growth per token            time per token / that with the number of tokens before; 1 is linear

`best peer / ours` is how many times faster ours (the backend that `auto` means) is than the fastest peer; `error` is
ours against `naive` in float32. All contenders of a row run in turn; a cell is the median over rounds of the ratio
within a round, and half the interquartile range; `once` marks who was far behind. What is timed was found right
before: in the same run, on the same inputs, in the same pass. Finished rows are kept in OUT and not measured again
while sources, machine and settings stay the same, so the command may be interrupted and repeated. Ends with 1 if a
case failed or ours was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import transformers

import experts
import routing
import train_throughput
from experts import Machine
from problems import LOADS, Case, case_of
from table import Job, Store, print_table

SECTIONS = ("experts", "few", "routing", "training", "held-out", "growth", "kept")
"""In the table's order: what is wanted most comes first, what changes the allocator last."""
MANY = {
    "cpu": (
        *product(("512/512/16/2", "512/256/64/8", "256/256/16/2"), (512, 4096, 16384)),
        *product(("1024/512/64/8",), (512, 4096)),
        *product(("2048/1024/64/8",), (512, 2048)),
    ),
    "cuda": (
        *product(("1024/512/64/8", "2048/1024/64/8", "4096/1536/32/4"), (16384,)),
        ("2048/768/128/8", 32768),
    ),
}
HELD_OUT = (
    ("500/250/30/3", 1000, "even"),
    ("1000/520/24/1", 2048, "even"),
    ("512/256/256/8", 2048, "even"),
    ("512/256/64/8", 4096, "hot"),
    ("512/256/64/8", 4096, "empty"),
    ("333/77/7/1", 999, "hot"),
)
FEW = ("512/256/64/8", "1024/512/64/8", "2048/1024/32/4")
FEW_TOKENS = (1, 4, 16, 64)
GROWTH = ("256/256/16/2", (256, 1024, 4096, 16384, 65536))
KEPT = (*product(("512/512/16/2", "512/256/64/8", "1024/512/64/8"), (4096,)), ("512/256/64/8", 16384))


def cases_of(section: str, options: argparse.Namespace) -> list[Case]:
    """What a section measures."""
    quick = options.quick
    if options.shape:
        found = [case_of(shape, tokens, load) for shape, tokens, load in product(*_chosen(options))]
        return [case for case in found if (case.tokens <= 64) == (section == "few")]
    if section == "few":
        shapes, tokens = (FEW[:1], (1, 16)) if quick else (FEW, FEW_TOKENS)
        return [case_of(*one) for one in product(shapes, tokens)]
    if section == "growth":
        shape, tokens = GROWTH
        return [case_of(shape, count) for count in (tokens[:3] if quick else tokens)]
    if section == "routing":
        return [case_of("512/256/64/8", 2048 if quick else 8192)]
    if section == "held-out":
        return [case_of(*one) for one in (HELD_OUT[::4] if quick else HELD_OUT)]
    if section == "kept":
        kept = KEPT if options.device == "cpu" else ()
        return [case_of(*one) for one in (kept[:1] if quick else kept)]
    shapes = dict.fromkeys(shape for shape, _ in MANY[options.device])
    many = product(list(shapes)[:3], (2048,)) if quick else MANY[options.device]
    return [case_of(*one) for one in many]


def _chosen(options: argparse.Namespace) -> tuple[Sequence, Sequence, Sequence]:
    return options.shape, options.tokens or (4096,), options.load


def jobs(options: argparse.Namespace, machine: Machine) -> Iterator[Job]:
    """All of them, in the table's order."""
    device, seconds = options.device, options.seconds
    wanted = options.only or (("experts", "few") if options.shape else SECTIONS)
    yield Job("peak", "", "", lambda: machine.row(options.dtype))
    for section in (name for name in SECTIONS if name in wanted):
        if section == "training":
            names = options.train or train_throughput.TRAINED[: 1 if options.quick else None]
            yield from train_throughput.jobs(names, options.dtype, device, seconds)
            continue
        cases = cases_of(section, options)
        if section == "routing":
            for case in cases:
                yield from routing.jobs(case, options.dtype, device, seconds)
            continue
        if cases:
            yield from experts.jobs(section, cases, options.dtype, device, seconds, machine)
        if section == "growth":
            wide = [Case(512, 256, 64, 8, case.tokens) for case in cases]
            yield from routing.growth_jobs(wide, device, seconds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter")
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--shape", nargs="+", metavar="D/F/E/k", help="these shapes instead of the listed ones")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", help="with --shape; 4096 if not given")
    parser.add_argument("--load", nargs="+", choices=LOADS, default=["even"], help="with --shape")
    parser.add_argument("--train", nargs="+", choices=list(train_throughput.SHAPES), help="models of `training`")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one, if not given")
    parser.add_argument("--seconds", type=float, help="for each row, about: 2, or 0.5 with --quick")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where finished rows are kept")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if options.tokens and not options.shape:
        parser.error("--tokens goes with --shape")
    try:
        for shape in options.shape or ():
            case_of(shape, 1)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print; the exit status."""
    options = parse(arguments)
    path = options.out / f"{options.device}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.device}, {name}; torch {torch.__version__}, transformers {transformers.__version__}\n")
    store = Store(path, [name, options.seconds, options.quick])
    peers = experts.PEERS[options.device]
    failed = print_table(jobs(options, Machine(options.device)), experts.everybody(options.device), store, peers)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
