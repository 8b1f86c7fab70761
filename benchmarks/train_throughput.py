"""Training steps per second: this library's model against transformers' OLMoE of the same shape, in one run.

    python benchmarks/train_throughput.py [--shape quickstart ...] [--dtype float32 bfloat16] [--rounds 9]

Both models have the same layers, width, heads, experts, experts per token, expert width and vocabulary, no shared
expert, softmax scores that are not renormalised, SDPA attention and a load-balance loss. A step is forward, loss,
backward and AdamW. OLMoE is measured with each of its expert implementations and keeps its fastest; then the two
models take turns, step by step. The table shows the median over rounds of our tokens per second divided by theirs,
and half the interquartile range. Above 1 ours is faster. (OLMoE also normalises queries and keys: two norms of width
D per layer that ours does not have.)

`bfloat16` trains bfloat16 weights, `autocast` float32 weights under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM


@dataclass(frozen=True)
class Shape:
    """What both models share, and the batch."""

    layers: int
    width: int
    heads: int
    experts: int
    k: int
    expert_width: int
    vocabulary: int
    batch: int
    sequence: int


SHAPES = {
    "quickstart": Shape(4, 128, 4, 16, 2, 128, 4096, 8, 256),
    "10M": Shape(4, 256, 4, 16, 2, 128, 8192, 8, 256),
    "fine-grained": Shape(4, 256, 4, 64, 8, 64, 8192, 8, 256),
    "100M": Shape(8, 512, 8, 32, 4, 192, 16384, 2, 512),
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
BATCHED_LIMIT = 2**31
"""`batched_mm` copies an expert's weights for every pair; it is left out where one layer would copy more bytes."""


class Contender:
    """A model with its optimiser, ready to take training steps."""

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        self.model = model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32).train()
        self.autocast = dtype == "autocast"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, ids_BS: Tensor) -> float:
        """One training step; seconds."""
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def ours(shape: Shape, backend: str = "auto") -> PreTrainedModel:
    """This library's model."""
    return CrosswaysForCausalLM(
        CrosswaysConfig(
            **_common(shape),
            intermediate_size=shape.expert_width,
            moe_intermediate_size=shape.expert_width,
            select={"name": "top_k", "k": shape.k},
            load_balance_coef=0.01,
            experts_backend=backend,
        )
    )


def olmoe(shape: Shape, implementation: str) -> PreTrainedModel:
    """Transformers' OLMoE with one of its expert implementations."""
    config = OlmoeConfig(
        **_common(shape),
        intermediate_size=shape.expert_width,
        num_experts_per_tok=shape.k,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        eos_token_id=None,
    )
    config._experts_implementation = implementation
    return OlmoeForCausalLM(config)


def _common(shape: Shape) -> dict:
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "num_experts": shape.experts,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.sequence,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }


def fastest_olmoe(shape: Shape, dtype: str, batches: list[Tensor]) -> tuple[str, Contender]:
    """Try each implementation for a few interleaved steps; the one with the best median, built anew."""
    copied = shape.batch * shape.sequence * shape.k * 2 * shape.expert_width * shape.width * 4
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or copied < BATCHED_LIMIT]
    contenders = {name: Contender(olmoe(shape, name), dtype) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for batch in batches[:4]:
        for name, contender in contenders.items():
            times[name].append(contender.step(batch))
    best = min(names, key=lambda name: statistics.median(times[name][1:]))
    return best, contenders[best]


def compare(shape: Shape, dtype: str, rounds: int) -> tuple[str, list[float], list[float], int]:
    """OLMoE's fastest implementation, seconds per step of ours and of theirs, and our parameter count."""
    torch.manual_seed(0)
    # Skewed token frequencies, as in text, so that expert loads are neither constant nor equal.
    batches = list((torch.randn(rounds + 3, shape.batch, shape.sequence).abs() * shape.vocabulary / 5).long())
    batches = [batch.clamp(max=shape.vocabulary - 1) for batch in batches]
    name, theirs = fastest_olmoe(shape, dtype, batches)
    mine = Contender(ours(shape), dtype)
    our_times, their_times = [], []
    for batch in batches:
        our_times.append(mine.step(batch))
        their_times.append(theirs.step(batch))
    parameters = sum(parameter.numel() for parameter in mine.model.parameters())
    return name, our_times[3:], their_times[3:], parameters


def main() -> None:
    """Measure every shape and dtype, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtypes = ("float32", "bfloat16", "autocast")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=dtypes)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    table = Table(title=f"training, ours / OLMoE's fastest, {torch.get_num_threads()} threads")
    for column in ("shape", "parameters", "dtype", "OLMoE with", "ours tok/s", "OLMoE tok/s", "ratio"):
        table.add_column(column, justify="right")
    for shape_name in arguments.shape:
        shape = SHAPES[shape_name]
        tokens = shape.batch * shape.sequence
        for dtype in arguments.dtype:
            name, our_times, their_times, parameters = compare(shape, dtype, arguments.rounds)
            ratios = [theirs / mine for mine, theirs in zip(our_times, their_times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            speeds = [f"{tokens / statistics.median(times):,.0f}" for times in (our_times, their_times)]
            ratio = f"{middle:.2f}±{(high - low) / 2:.2f}"
            table.add_row(shape_name, f"{parameters / 1e6:.0f}M", dtype, name, *speeds, ratio)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
