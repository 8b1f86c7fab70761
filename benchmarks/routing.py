"""What routing costs: every selection rule beside the expert compute that it feeds, in one run.

    python benchmarks/routing.py [--shape D/F/E/k/T] [--dtype float32 bfloat16] [--seconds 4]

A cell is the rule's time, from scores to assignment, over the time of the forward pass of the layer's experts under
the assignment that the rule made. Training adds the estimate of the decode twin's cutoff, in the last column.

Legend: B rows, S tokens of a row, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from crossways.experts import Activation, compute_experts
from crossways.rules.select import (
    Base,
    Capacity,
    ExpertChoice,
    GroupLimited,
    Positive,
    Selection,
    Sinkhorn,
    Threshold,
    TopC,
    TopK,
    TopP,
)
from measure import head, in_turn, line, ratio


def rules(k: int, experts: int) -> list[Selection]:
    """Every rule that can spend about k experts a token."""
    chosen: list[Selection] = [
        TopK(k=k),
        TopC(k=k),
        TopC(k=k, group="batch"),
        TopC(k=k, group="position"),
        ExpertChoice(k=k),
        ExpertChoice(k=k, group="batch"),
        TopP(p=0.5, cap=2 * k),
        Capacity(k=k),
        Capacity(k=k, order="score"),
        Positive(),
        Threshold(value=1.5 / experts),
        Sinkhorn(k=k),
        Base(),
    ]
    if experts % 8 == 0 and k <= experts // 2:
        chosen.append(GroupLimited(k=k))
    return chosen


def main() -> None:
    """Measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512/256/64/8/8192", metavar="D/F/E/k/T")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each rule and dtype, about")
    arguments = parser.parse_args()
    width, expert_width, experts, k, tokens = map(int, arguments.shape.split("/"))
    # The lower half of the scores is zero, as the rule that takes all positive ones would have it.
    logits_BSE = torch.randn(4, tokens // 4, experts, generator=torch.Generator().manual_seed(0))
    scores_BSE = logits_BSE.softmax(-1)
    columns = [
        "rule",
        "pairs per token",
        "ms",
        *(f"rule / experts {dtype}" for dtype in arguments.dtype),
        "cutoff ms",
    ]
    head(f"Selection, {arguments.shape}, {torch.get_num_threads()} threads", columns)
    for rule in rules(k, experts):
        choice_BSE = logits_BSE.clamp_min(0) if isinstance(rule, Positive) else scores_BSE
        cells = []
        assignment = rule(choice_BSE, choice_BSE)
        for name in arguments.dtype:
            dtype = getattr(torch, name)
            x_TD = torch.randn(tokens, width).to(dtype)
            up_EHD = (torch.randn(experts, 2 * expert_width, width) * width**-0.5).to(dtype)
            down_EDF = (torch.randn(experts, width, expert_width) * expert_width**-0.5).to(dtype)
            tensors = x_TD, assignment, up_EHD, down_EDF, Activation("swiglu")
            with torch.no_grad():
                times = in_turn(
                    {
                        "rule": lambda rule=rule, choice=choice_BSE: rule(choice, choice),
                        "experts": lambda tensors=tensors: compute_experts(*tensors),
                    },
                    arguments.seconds,
                )
            cells.append(ratio(times["rule"], times["experts"]))
        spent = statistics.median(times["rule"])
        cutoff = statistics.median(
            in_turn({"cutoff": lambda rule=rule, choice=choice_BSE: rule.cutoff(choice)}, 0.5)["cutoff"]
        )
        line([rule, f"{assignment.num_pairs / tokens:.2f}", f"{1e3 * spent:.2f}", *cells, f"{1e3 * cutoff:.2f}"])


if __name__ == "__main__":
    main()
