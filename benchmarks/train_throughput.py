"""Rows of whole training steps: this library's model against transformers' OLMoE of the same shape.

Both models have the same layers, width, heads, experts, experts per token, expert width and vocabulary, no shared
expert, softmax scores that are not renormalised, SDPA attention and a load-balance loss. A step is forward, loss,
backward and AdamW. Ours and OLMoE with each of its expert implementations take turns, step by step; implementations
that are behind stop early. A cell is our tokens per second divided by those of OLMoE with its fastest; above 1 ours
is faster. (OLMoE also normalises queries and keys: two norms of width D per layer that ours does not have.) Our model
is first held to itself with `naive` experts: the same gradients.
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
from measure import Times, clock_of, in_turn, ratio
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
TRAINED = ("quickstart", "100M")
"""What `make bench` trains; the others are for `--train`."""
MOST = 40
"""Steps of each model at most, after two that do not count."""
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
BATCHED_LIMIT = 2**31
"""`batched_mm` copies an expert's weights for every pair; it is left out where one layer would copy more bytes."""


class Contender:
    """A model with its optimiser, ready to take training steps."""

    def __init__(self, model: PreTrainedModel, dtype: str, device: str = "cpu") -> None:
        self.model = model.to(device, getattr(torch, dtype)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def loss(self, ids_BS: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        loss = self.model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        return loss.detach()

    def step(self, ids_BS: Tensor) -> None:
        """One training step."""
        self.loss(ids_BS)
        self.optimizer.step()
        self.optimizer.zero_grad()


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


def compare(name: str, dtype: str, device: str, seconds: float) -> list[Row]:
    """One row."""
    shape = SHAPES[name]
    batches = batches_of(shape, MOST + 2, device)
    # In bfloat16 a score that rounds differently may choose another expert, so that a few rows may differ.
    limit, found = (10 * TOLERANCE[getattr(torch, dtype)], error(shape, dtype, batches[0]))
    case = f"{name}: {shape.layers} x {shape.width}, {shape.experts} experts, {shape.k} a token"
    if not found <= limit:
        return [Row("training", case, dtype, {}, {"ours": f"WRONG: gradients differ from naive's by {found:.1e}"})]
    copied = shape.batch * shape.sequence * shape.k * 2 * shape.expert_width * shape.width * 4
    peers = [one for one in IMPLEMENTATIONS if one != "batched_mm" or copied < BATCHED_LIMIT]
    mine = Contender(ours(shape), dtype, device)
    everybody = {one: Contender(olmoe(shape, one), dtype, device) for one in peers} | {"ours": mine}
    # The same batches in the same order for all; none twice, as some compile for every new load of an expert.
    turns = {who: iter(batches) for who in everybody}
    steps = {who: (lambda who=who: everybody[who].step(next(turns[who]))) for who in everybody}

    def fastest(times: Times) -> str:
        return min(peers, key=lambda one: statistics.median(times[one]))

    times = in_turn(
        steps, seconds, least=5, most=MOST, warm=2, slow=3.0, clock=clock_of(device),
        wanted=lambda times: {"ours", fastest(times)},
    )  # fmt: skip
    best = fastest(times)
    speed = shape.batch * shape.sequence / statistics.median(times[best])
    millions = sum(parameter.numel() for parameter in mine.model.parameters()) / 1e6
    cells = {
        "bound": f"OLMoE {speed:,.0f} tokens/s with {best}",
        resolve_backend("auto", device, getattr(torch, dtype)): ratio(times[best], times["ours"]),
        "error": f"{found:.0e}",
    }
    return [Row("training", f"{case}, {millions:.0f}M", dtype, cells)]


def jobs(names: Sequence[str], dtypes: Sequence[str], device: str, seconds: float) -> Iterator[Job]:
    """One for each shape and dtype."""
    for name in names:
        for dtype in dtypes:
            yield Job("training", name, dtype, partial(compare, name, dtype, device, 4 * seconds))
