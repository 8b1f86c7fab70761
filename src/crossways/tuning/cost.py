"""What the chosen pairs cost, counted from what was executed.

Legend: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from crossways.surgery.find import find_blocks


@dataclass(frozen=True)
class PairCosts:
    """Operations of matrix products, 2 for each weight that is used."""

    pair_L: tuple[int, ...]
    """FLOPs of one executed pair, for each routed layer."""
    rest: int
    """FLOPs per token of all other matrices: attention's projections, dense and shared experts, routers, head. Not
    attention's products with keys and values, which depend on the length."""

    def per_token(self, executed_L: Sequence[float]) -> float:
        """Expert FLOPs per token at these mean executed experts of each layer."""
        return sum(cost * experts for cost, experts in zip(self.pair_L, executed_L, strict=True))


def pair_costs(model: nn.Module) -> PairCosts:
    """Read from the shapes of the weights.

    The input embedding is looked up, not multiplied by, and is left out unless it is the head as well.
    """
    blocks = find_blocks(model)
    inside = {id(p) for block in blocks for p in block.experts.parameters()}
    pair_L = tuple(
        2 * sum(p.numel() for p in block.experts.parameters() if p.dim() == 3) // block.num_experts
        for block in blocks
    )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = set(inside)
    if embedding is not None and (head is None or head.weight is not embedding.weight):
        left_out |= {id(p) for p in embedding.parameters()}
    used = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in left_out)
    return PairCosts(pair_L, 2 * used)
