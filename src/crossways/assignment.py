"""`Assignment`: the sparse token-by-expert matrix that routing hands to compute.

Rows are tokens, columns are experts, entries are weights. It is the only thing that crosses from routing to expert
compute, losses, traces and reports: nothing downstream re-derives a selection from logits.

Legend: T tokens, E experts, K experts per token, P chosen pairs. `offsets_E1` has E + 1 entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """The chosen (token, expert, weight) triples, ragged, sorted by expert and then by token.

    Expert `e` owns the pairs `offsets_E1[e]:offsets_E1[e + 1]`. A token may appear zero to E times. Gradients flow
    through `weight_P` only. Build one with `from_topk`, `from_mask` or `from_pairs`, which establish the order.
    """

    token_P: Tensor
    """Token index of each pair, int64 (P,)."""
    expert_P: Tensor
    """Expert index of each pair, int64 (P,), non-decreasing."""
    weight_P: Tensor
    """Factor by which the expert's output is multiplied, floating point (P,)."""
    offsets_E1: Tensor
    """First pair of each expert, and P at the end, int64 (E + 1,)."""
    num_tokens: int
    """T, including tokens that chose nobody."""

    @classmethod
    def from_pairs(
        cls, token_P: Tensor, expert_P: Tensor, weight_P: Tensor, num_tokens: int, num_experts: int
    ) -> Assignment:
        """Sort arbitrary pairs by expert; pairs of one expert keep their order (so pass them token by token).

        Args:
            token_P: int64 (P,), values in [0, T).
            expert_P: int64 (P,), values in [0, E).
            weight_P: floating point (P,).
            num_tokens: T.
            num_experts: E.
        """
        # One stable sort of narrow keys: experts fit 16 bits, and narrow keys sort several times faster.
        key_P = expert_P.to(torch.int16) if num_experts < 2**15 else expert_P  # bounds reach num_experts
        sorted_P, order_P = torch.sort(key_P, stable=True)
        bounds_E1 = torch.arange(num_experts + 1, device=expert_P.device, dtype=sorted_P.dtype)
        return cls(
            token_P=token_P[order_P],
            expert_P=sorted_P.long(),
            weight_P=weight_P[order_P],
            offsets_E1=torch.searchsorted(sorted_P, bounds_E1),
            num_tokens=num_tokens,
        )

    @classmethod
    def from_topk(cls, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Assignment:
        """From the rectangular form of per-token selections: int64 (T, K) expert indices and their (T, K) weights."""
        num_tokens, k = index_TK.shape
        token_P = torch.arange(num_tokens, device=index_TK.device).repeat_interleave(k)
        return cls.from_pairs(token_P, index_TK.reshape(-1), weight_TK.reshape(-1), num_tokens, num_experts)

    @classmethod
    def from_mask(cls, mask_TE: Tensor, weight_TE: Tensor) -> Assignment:
        """From a boolean (T, E) mask of chosen pairs and a (T, E) matrix that holds their weights."""
        expert_P, token_P = mask_TE.t().nonzero(as_tuple=True)
        return cls(
            token_P=token_P,
            expert_P=expert_P,
            weight_P=weight_TE[token_P, expert_P],
            offsets_E1=torch.nn.functional.pad(mask_TE.sum(0).cumsum(0), (1, 0)),
            num_tokens=mask_TE.shape[0],
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets_E1.numel() - 1

    @property
    def num_pairs(self) -> int:
        """P, the number of expert evaluations this assignment costs."""
        return self.token_P.numel()

    def load_E(self) -> Tensor:
        """Number of pairs of each expert, int64 (E,)."""
        return self.offsets_E1.diff()

    def experts_per_token_T(self) -> Tensor:
        """Number of experts of each token, int64 (T,)."""
        ones_P = torch.ones_like(self.token_P)
        return ones_P.new_zeros(self.num_tokens).index_add_(0, self.token_P, ones_P)

    def weight_sum_T(self) -> Tensor:
        """Sum of each token's weights (T,); zero for a token that chose nobody. Differentiable."""
        return self.weight_P.new_zeros(self.num_tokens).index_add(0, self.token_P, self.weight_P)

    def with_weights(self, weight_P: Tensor) -> Assignment:
        """The same pairs with other weights (P,)."""
        return replace(self, weight_P=weight_P)

    def renormalized(self) -> Assignment:
        """The same pairs with each token's weights scaled to sum to one."""
        return self.with_weights(self.weight_P / self.weight_sum_T()[self.token_P])

    def of_experts(self, first: int, end: int) -> Assignment:
        """The pairs of experts `first` to `end - 1` alone, with these numbered from 0."""
        begin_P, end_P = self.offsets_E1[[first, end]].tolist()
        return Assignment(
            token_P=self.token_P[begin_P:end_P],
            expert_P=self.expert_P[begin_P:end_P] - first,
            weight_P=self.weight_P[begin_P:end_P],
            offsets_E1=self.offsets_E1[first : end + 1] - begin_P,
            num_tokens=self.num_tokens,
        )

    def to_mask(self) -> Tensor:
        """Boolean (T, E), true at the chosen pairs."""
        mask_TE = torch.zeros(self.num_tokens, self.num_experts, dtype=torch.bool, device=self.token_P.device)
        mask_TE[self.token_P, self.expert_P] = True
        return mask_TE

    def to_dense(self) -> Tensor:
        """The matrix itself: weights at the chosen pairs, zero elsewhere, (T, E)."""
        weights_TE = self.weight_P.new_zeros(self.num_tokens, self.num_experts)
        return weights_TE.index_put((self.token_P, self.expert_P), self.weight_P)

    def top_expert_T(self) -> Tensor:
        """Each token's expert of greatest weight, int64 (T,); -1 for a token that chose nobody.

        This is the token's entry in its expert path (PathMoE, introduction: the top-1 expert of each layer).
        """
        executed_TE = self.weight_P.new_full((self.num_tokens, self.num_experts), -torch.inf)
        executed_TE[self.token_P, self.expert_P] = self.weight_P.detach()
        best_T, top_T = executed_TE.max(-1)
        return torch.where(best_T > -torch.inf, top_T, -1)
