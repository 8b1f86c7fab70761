"""The hash gate: a token's experts follow from its id alone, for good.

Legend: B batch, S sequence, E experts, V vocabulary, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import initialization as init

from crossways.errors import UserError
from crossways.gates.base import Gate, GateSpec, check_vocabulary, check_whole, required_token_ids
from crossways.routing import Context
from crossways.rules.select import Selection, TopK

NOT_CHOSEN = -30.0
"""Logit of the experts that the hash does not name: nothing after softmax or sigmoid in float32, yet finite, so that
disabling the named experts leaves a defined next choice."""


class HashGate(Gate):
    """Logits 0 for the K experts that a fixed table names for the token's id, and `NOT_CHOSEN` for the rest (Hash
    Layers, Roller et al. 2021, arXiv 2106.04426, random hash). Softmax and top-k with the same K choose
    exactly these, each with weight 1 / K.

    The paper routes to one expert; K = 2 distinct ones is the baseline of CartesianMoE (arXiv 2410.16077). The table
    is drawn at initialisation (layers that do not share the gate hash differently), has no parameters and is saved.
    `balance` replaces it by the paper's balanced assignment.
    """

    table_VK: Tensor

    def __init__(self, vocab_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("table_VK", torch.empty(vocab_size, k, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw K distinct experts for every id, all sets alike probable; `std` is unused."""
        vocab_size, k = self.table_VK.shape
        draw_VE = torch.rand(vocab_size, self.num_experts, device=self.table_VK.device)
        init.copy_(self.table_VK, draw_VE.topk(k).indices)

    @torch.no_grad()
    def balance(self, counts_V: Tensor) -> None:
        """The paper's balanced hash: from the commonest id to the rarest, each takes the K experts
        with the fewest tokens so far.

        Args:
            counts_V: how often each id occurs in the training text, (V,).
        """
        counts = counts_V.tolist()
        vocab_size, k = self.table_VK.shape
        if len(counts) != vocab_size:
            raise ValueError(f"the table has {vocab_size} ids, got {len(counts)} counts")
        load_E = torch.zeros(self.num_experts, dtype=torch.float64)
        for token in sorted(range(vocab_size), key=lambda index: -counts[index]):
            experts_K = load_E.argsort(stable=True)[:k]
            load_E[experts_K] += max(counts[token], 1e-9)  # ids never seen are spread too
            self.table_VK[token] = experts_K.to(self.table_VK.device)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E), of which only `context.token_ids_BS` counts."""
        chosen_BSK = self.table_VK[required_token_ids("hash", context)]
        # Never two alike, so that what comes after the named experts does not hang on how a sort breaks ties.
        rest_E = NOT_CHOSEN - torch.arange(self.num_experts, device=x_BSD.device) / self.num_experts
        return rest_E.expand(*chosen_BSK.shape[:2], -1).scatter(-1, chosen_BSK, 0.0)


@dataclass(frozen=True)
class Hash(GateSpec):
    """A fixed random table from token ids to experts."""

    name: ClassVar[str] = "hash"

    k: int = 2
    """Distinct experts per token id, 1 to E, the same k as the selection's; 1 in the paper, 2 in CartesianMoE's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_whole(self.name, "k", self.k))

    def check(self, num_experts: int, select: Selection | None = None) -> None:
        if self.k > num_experts:
            raise UserError(f"gate 'hash': k = {self.k} exceeds the number of experts, {num_experts}")
        if isinstance(select, TopK) and select.k != self.k:
            raise UserError(
                f"gate 'hash' names k = {self.k} experts but selection 'top_k' takes {select.k}: set one k"
            )

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> HashGate:
        self.check(num_experts)
        return HashGate(check_vocabulary(self.name, vocab_size), num_experts, self.k)
