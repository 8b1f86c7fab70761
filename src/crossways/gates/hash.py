"""The hash gate: a token's experts follow from its id alone, for good.

Legend: B batch, S sequence, E experts, V vocabulary, K experts per token.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import initialization as init

from crossways.errors import UserError
from crossways.gates.base import (
    Gate,
    GateSpec,
    check_switch,
    check_vocabulary,
    check_whole,
    required_token_ids,
)
from crossways.routing import Context
from crossways.rules.select import Selection, TopK

NOT_CHOSEN = -30.0
"""Logit of the experts that the hash does not name: nothing after softmax or sigmoid in float32, yet finite, so that
disabling the named experts leaves a defined next choice."""


OPEN = -1
"""In a balanced table before the counts are known."""


class HashGate(Gate):
    """Logits 0 for the K experts that a fixed table names for the token's id, and `NOT_CHOSEN` for the rest (Hash
    Layers, Roller et al. 2021, arXiv 2106.04426, random hash). Softmax and top-k with the same K choose
    exactly these, each with weight 1 / K.

    The paper routes to one expert; K = 2 distinct ones is the baseline of CartesianMoE (arXiv 2410.16077). The table
    is drawn at initialisation (layers that do not share the gate hash differently), has no parameters and is saved.

    A `balanced` one is the paper's balanced assignment, the same for all layers: it is
    made by `count_tokens` from the counts of the training text, which our training does before the first step,
    and refuses to route before.
    """

    table_VK: Tensor

    def __init__(self, vocab_size: int, num_experts: int, k: int, balanced: bool = False) -> None:
        super().__init__()
        self.num_experts, self.balanced = num_experts, balanced
        self.register_buffer("table_VK", torch.empty(vocab_size, k, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw K distinct experts for every id, all sets alike probable, or leave a balanced table open; `std` is
        unused."""
        vocab_size, k = self.table_VK.shape
        if self.balanced:
            init.constant_(self.table_VK, OPEN)
            return
        draw_VE = torch.rand(vocab_size, self.num_experts, device=self.table_VK.device)
        init.copy_(self.table_VK, draw_VE.topk(k).indices)

    @torch.no_grad()
    def balance(self, counts_V: Tensor) -> None:
        """Replace the table by the paper's balanced hash: from the commonest id to the rarest, each takes the K
        experts with the fewest tokens so far.

        Args:
            counts_V: how often each id occurs in the training text, (V,).
        """
        counts = counts_V.tolist()
        vocab_size, k = self.table_VK.shape
        if len(counts) != vocab_size:
            raise ValueError(f"the table has {vocab_size} ids, got {len(counts)} counts")
        queue = [(0.0, expert) for expert in range(self.num_experts)]  # tokens so far, fewest first
        table: list[list[int]] = [[]] * vocab_size
        for token in sorted(range(vocab_size), key=lambda index: -counts[index]):
            least = [heapq.heappop(queue) for _ in range(k)]
            table[token] = [expert for _, expert in least]
            for load, expert in least:
                heapq.heappush(queue, (load + max(counts[token], 1e-9), expert))  # ids never seen are spread too
        self.table_VK.copy_(torch.tensor(table))

    @property
    def wants_counts(self) -> bool:
        return self.balanced and bool(self.table_VK.numel()) and int(self.table_VK[0, 0]) == OPEN

    def count_tokens(self, counts_V: Tensor) -> None:
        if self.balanced:
            self.balance(counts_V)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E), of which only `context.token_ids_BS` counts."""
        token_ids_BS = required_token_ids("hash", context)
        if self.wants_counts:
            raise UserError(
                "gate 'hash' is balanced and does not know the training text: train by `crossways`, or tell it with "
                "model.model.count_tokens(counts_V)"
            )
        chosen_BSK = self.table_VK[token_ids_BS]
        # Never two alike, so that what comes after the named experts does not hang on how a sort breaks ties.
        rest_E = NOT_CHOSEN - torch.arange(self.num_experts, device=x_BSD.device) / self.num_experts
        return rest_E.expand(*chosen_BSK.shape[:2], -1).scatter(-1, chosen_BSK, 0.0)


@dataclass(frozen=True)
class Hash(GateSpec):
    """A fixed table from token ids to experts, drawn at random or balanced by frequency."""

    name: ClassVar[str] = "hash"

    k: int = 2
    """Distinct experts per token id, 1 to E, the same k as the selection's; 1 in the paper, 2 in CartesianMoE's."""
    balanced: bool = False
    """Give all experts equally many tokens of the training text, whose ids are counted before the first step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_whole(self.name, "k", self.k))
        check_switch(self.name, "balanced", self.balanced)

    @property
    def counts_tokens(self) -> bool:
        """A balanced one must be."""
        return self.balanced

    def check(self, num_experts: int, select: Selection | None = None) -> None:
        if self.k > num_experts:
            raise UserError(f"gate 'hash': k = {self.k} exceeds the number of experts, {num_experts}")
        if isinstance(select, TopK) and select.k != self.k:
            raise UserError(
                f"gate 'hash' names k = {self.k} experts but selection 'top_k' takes {select.k}: set one k"
            )

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> HashGate:
        self.check(num_experts)
        return HashGate(check_vocabulary(self.name, vocab_size), num_experts, self.k, self.balanced)
