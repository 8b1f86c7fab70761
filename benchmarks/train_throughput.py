"""Rows of whole training steps: this library's model against transformers' OLMoE of the same shape.

Both models have the same layers, width, heads, experts, experts per token, expert width and vocabulary, no shared
expert, softmax scores that are not renormalised, SDPA attention and a load-balance loss. A step is forward, loss,
backward and AdamW. OLMoE is measured with each of its expert implementations and keeps its fastest; then the two
models take turns, step by step. A cell is our tokens per second divided by theirs; above 1 ours is faster. (OLMoE
also normalises queries and keys: two norms of width D per layer that ours does not have.) Our model is first held to
itself with `naive` experts: the same loss and gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from crossways.experts import resolve_backend
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from measure import clock_of, ratio
from problems import TOLERANCE
from table import Job, Row


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

    def __init__(self, model: PreTrainedModel, dtype: str, device: str = "cpu") -> None:
        self.model = model.to(device, getattr(torch, dtype)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.clock = clock_of(device)

    def loss(self, ids_BS: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        loss = self.model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        return loss.detach()

    def step(self, ids_BS: Tensor) -> float:
        """One training step; seconds."""

        def run() -> None:
            self.loss(ids_BS)
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.clock(run)


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
    """Try each implementation for a few interleaved steps; the one with the best median."""
    device = batches[0].device.type
    copied = shape.batch * shape.sequence * shape.k * 2 * shape.expert_width * shape.width * 4
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or copied < BATCHED_LIMIT]
    contenders = {name: Contender(olmoe(shape, name), dtype, device) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for batch in batches[:4]:
        for name, contender in contenders.items():
            times[name].append(contender.step(batch))
    best = min(names, key=lambda name: statistics.median(times[name][1:]))
    return best, contenders[best]


def batches_of(shape: Shape, count: int, device: str) -> list[Tensor]:
    """Skewed token frequencies, as in text, so that expert loads are neither constant nor equal."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, shape.batch, shape.sequence, generator=generator).abs() * shape.vocabulary / 5
    return list(drawn.long().clamp(max=shape.vocabulary - 1).to(device))


def error(shape: Shape, dtype: str, ids_BS: Tensor) -> float:
    """Relative root-mean-square difference of the gradients of our model and of the same with `naive` experts."""
    grads = []
    for backend in ("auto", "naive"):
        torch.manual_seed(0)
        contender = Contender(ours(shape, backend), dtype, ids_BS.device.type)
        contender.loss(ids_BS)
        grads.append([p.grad.float() for p in contender.model.parameters() if p.grad is not None])
    difference = sum((one - other).square().sum() for one, other in zip(*grads, strict=True))
    return (difference / sum(other.square().sum() for other in grads[1])).sqrt().item()


def compare(name: str, dtype: str, device: str, rounds: int) -> list[Row]:
    """One row."""
    shape, warm = SHAPES[name], 3
    batches = batches_of(shape, rounds + warm, device)
    # In bfloat16 a score that rounds differently may choose another expert, so that a few rows may differ.
    limit, found = (10 * TOLERANCE[getattr(torch, dtype)], error(shape, dtype, batches[0]))
    case = f"{name}: {shape.layers} x {shape.width}, {shape.experts} experts, {shape.k} a token"
    if not found <= limit:
        return [Row("training", case, dtype, {}, {"ours": f"WRONG: gradients differ from naive's by {found:.1e}"})]
    implementation, theirs = fastest_olmoe(shape, dtype, batches)
    mine = Contender(ours(shape), dtype, device)
    times = [(mine.step(batch), theirs.step(batch)) for batch in batches][warm:]
    our_times, their_times = zip(*times, strict=True)
    speed = shape.batch * shape.sequence / statistics.median(their_times)
    millions = sum(parameter.numel() for parameter in mine.model.parameters()) / 1e6
    cells = {
        "bound": f"OLMoE {speed:,.0f} tokens/s with {implementation}",
        resolve_backend("auto", device, getattr(torch, dtype)): ratio(their_times, our_times),
        "error": f"{found:.0e}",
    }
    return [Row("training", f"{case}, {millions:.0f}M", dtype, cells)]


def jobs(quick: bool, dtypes: Sequence[str], device: str) -> Iterator[Job]:
    """One for each shape and dtype."""
    for name in ("quickstart",) if quick else SHAPES:
        for dtype in dtypes:
            rounds = 4 if quick else 9
            yield Job("training", name, dtype, partial(compare, name, dtype, device, rounds))
