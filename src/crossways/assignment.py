"""`Assignment`: the sparse token-by-expert matrix that routing hands to compute.

Rows are tokens, columns are experts, entries are weights. It is the only thing that crosses from routing to expert
compute, losses, traces and reports: nothing downstream re-derives a selection from logits.

Off the CPU, and in a graph that `torch.compile` traces, how many pairs were chosen is not known until the device has
finished, and waiting for it would stall every step. Where a bound is known beforehand, the pair tensors get that
length, and what is beyond the chosen pairs is slack, which every method here knows how to leave out.

Legend: T tokens, E experts, K experts per token, P chosen pairs. `offsets_E1` has E + 1 entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossways.native import bits, choices, routing


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
    slack: bool = False
    """Whether the pair tensors may be longer than `offsets_E1[-1]`. Entries from there on belong to no expert and
    weigh zero; their token and expert are valid indices without a meaning."""

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
        if routing.ready(expert_P):
            order_P, expert_P, offsets_E1 = routing.sort_pairs(expert_P, num_experts)
            return cls(token_P[order_P], expert_P, weight_P[order_P], offsets_E1, num_tokens)
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
        if k and routing.ready(index_TK):
            return cls(*choices.sorted_choices(index_TK, weight_TK, num_experts), num_tokens)
        token_P = torch.arange(num_tokens, device=index_TK.device).repeat_interleave(k)
        return cls.from_pairs(token_P, index_TK.reshape(-1), weight_TK.reshape(-1), num_tokens, num_experts)

    @classmethod
    def from_choices(
        cls, index_TK: Tensor, weight_TE: Tensor, kept_TK: Tensor | None = None, allowed_TE: Tensor | None = None
    ) -> Assignment:
        """From each token's experts, all different, and a matrix that holds all weights.

        Args:
            index_TK: int64 (T, K).
            weight_TE: (T, E).
            kept_TK: boolean (T, K), which of them to take; None for all.
            allowed_TE: boolean (T, E), which pairs may be taken at all; None for all.
        """
        num_experts = weight_TE.shape[1]
        if routing.fits(index_TK, weight_TE, kept_TK, allowed_TE):
            return cls.from_bits(bits.of_index(index_TK, num_experts, kept_TK, allowed_TE), weight_TE)
        weight_TK = weight_TE.gather(-1, index_TK)
        if allowed_TE is not None:
            open_TK = allowed_TE.gather(-1, index_TK)
            kept_TK = open_TK if kept_TK is None else kept_TK & open_TK
        if kept_TK is None:
            return cls.from_topk(index_TK, weight_TK, num_experts)
        # The others go to one more expert, whose pairs are then left out.
        everything = cls.from_topk(torch.where(kept_TK, index_TK, num_experts), weight_TK, num_experts + 1)
        return everything.of_experts(0, num_experts)

    @classmethod
    def from_mask(cls, mask_TE: Tensor, weight_TE: Tensor, most: int | None = None) -> Assignment:
        """From a boolean (T, E) mask of chosen pairs and a (T, E) matrix that holds their weights.

        Args:
            mask_TE: which pairs.
            weight_TE: their weights.
            most: the most pairs that may be chosen, where that is known beforehand; without it, counting them waits
                for the device.
        """
        if most is not None and _counting_waits(mask_TE):
            return cls.from_bounded_mask(mask_TE, weight_TE, most)
        return cls._from_counted_mask(mask_TE, weight_TE)

    @classmethod
    @torch.compiler.disable(
        reason="the selection may choose any number of pairs, and a graph needs a bound; with a cap it is one graph"
    )
    def _from_counted_mask(cls, mask_TE: Tensor, weight_TE: Tensor) -> Assignment:
        if routing.ready(mask_TE):
            return cls.from_bits(bits.of_mask(mask_TE), weight_TE)
        expert_P, token_P = mask_TE.t().nonzero(as_tuple=True)
        return cls(
            token_P=token_P,
            expert_P=expert_P,
            weight_P=routing.weights(weight_TE, token_P, expert_P),
            offsets_E1=torch.nn.functional.pad(mask_TE.sum(0).cumsum(0), (1, 0)),
            num_tokens=mask_TE.shape[0],
        )

    @classmethod
    def from_bits(cls, chosen: bits.Bits, weight: Tensor) -> Assignment:
        """From chosen pairs as the C++ parts give them, and what holds their weights, (T, E) or (B, S, E)."""
        token_P, expert_P, weight_P, offsets_E1 = bits.pairs(chosen, weight)
        return cls(token_P, expert_P, weight_P, offsets_E1, len(chosen.word_TW))

    @classmethod
    def from_bounded_mask(cls, mask_TE: Tensor, weight_TE: Tensor, most: int) -> Assignment:
        """As `from_mask`, in pair tensors of length `most` (at most T E), with slack; pairs beyond it are lost."""
        most = min(most, mask_TE.numel())
        cell_P = torch.nonzero_static(mask_TE.t().reshape(-1), size=most, fill_value=-1)[:, 0]
        # Slack is spread over all cells: gradients that meet in one cell, if only zeros, wait for each other.
        cell_P = torch.where(cell_P < 0, torch.arange(most, device=cell_P.device), cell_P)
        bounded = cls(
            token_P=cell_P % max(mask_TE.shape[0], 1),
            expert_P=cell_P // max(mask_TE.shape[0], 1),
            weight_P=weight_TE.t().reshape(-1).gather(0, cell_P),
            offsets_E1=torch.nn.functional.pad(mask_TE.sum(0).cumsum(0), (1, 0)),
            num_tokens=mask_TE.shape[0],
            slack=True,
        )
        return bounded.with_weights(bounded.weight_P)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets_E1.numel() - 1

    @property
    def num_pairs(self) -> int:
        """P, the length of the pair tensors: the number of expert evaluations this assignment costs, or where there
        is slack, a bound on it that the host knows."""
        return self.token_P.numel()

    def chosen_P(self) -> Tensor:
        """Boolean (P,), false for slack."""
        return torch.arange(self.num_pairs, device=self.token_P.device) < self.offsets_E1[-1]

    def compact(self) -> Assignment:
        """The same without slack. Waits for the device if there may be any."""
        if not self.slack:
            return self
        pairs = slice(int(self.offsets_E1[-1]))
        return replace(
            self,
            token_P=self.token_P[pairs],
            expert_P=self.expert_P[pairs],
            weight_P=self.weight_P[pairs],
            slack=False,
        )

    def load_E(self) -> Tensor:
        """Number of pairs of each expert, int64 (E,)."""
        return self.offsets_E1.diff()

    def experts_per_token_T(self) -> Tensor:
        """Number of experts of each token, int64 (T,)."""
        ones_P = self.chosen_P().long()
        return ones_P.new_zeros(self.num_tokens).index_add_(0, self.token_P, ones_P)

    def weight_sum_T(self) -> Tensor:
        """Sum of each token's weights (T,); zero for a token that chose nobody. Differentiable."""
        return self.weight_P.new_zeros(self.num_tokens).index_add(0, self.token_P, self.weight_P)

    def with_weights(self, weight_P: Tensor) -> Assignment:
        """The same pairs with other weights (P,)."""
        if self.slack:
            weight_P = weight_P.where(self.chosen_P(), 0.0)
        return Assignment(self.token_P, self.expert_P, weight_P, self.offsets_E1, self.num_tokens, self.slack)

    def renormalized(self) -> Assignment:
        """The same pairs with each token's weights scaled to sum to one."""
        sum_P = self.weight_sum_T()[self.token_P]
        if self.slack:
            sum_P = sum_P.where(self.chosen_P(), 1.0)  # 0 / 0 would reach the gradients
        return self.with_weights(self.weight_P / sum_P)

    def softmaxed(self) -> Assignment:
        """The same pairs with the softmax of each token's weights, over that token's pairs alone."""
        weight_P = self.weight_P if not self.slack else self.weight_P.where(self.chosen_P(), -torch.inf)
        most_T = weight_P.detach().new_full((self.num_tokens,), -torch.inf)
        most_T = most_T.scatter_reduce(0, self.token_P, weight_P.detach(), "amax")
        if self.slack:
            weight_P, most_T = self.weight_P, most_T.clamp(min=torch.finfo(most_T.dtype).min)
        return self.with_weights((weight_P - most_T[self.token_P]).exp()).renormalized()

    def of_experts(self, first: int, end: int) -> Assignment:
        """The pairs of experts `first` to `end - 1` alone, with these numbered from 0."""
        if _counting_waits(self.token_P):
            return self._of_experts_with_slack(first, end)
        begin_P, end_P = self.offsets_E1[[first, end]].tolist()
        return Assignment(
            token_P=self.token_P[begin_P:end_P],
            expert_P=self.expert_P[begin_P:end_P] - first,
            weight_P=self.weight_P[begin_P:end_P],
            offsets_E1=self.offsets_E1[first : end + 1] - begin_P,
            num_tokens=self.num_tokens,
        )

    def _of_experts_with_slack(self, first: int, end: int) -> Assignment:
        begin = self.offsets_E1[first]
        order_P = (torch.arange(self.num_pairs, device=begin.device) + begin) % max(self.num_pairs, 1)
        part = replace(
            self,
            token_P=self.token_P[order_P],
            expert_P=(self.expert_P[order_P] - first).clamp(0, end - first - 1),
            weight_P=self.weight_P[order_P],
            offsets_E1=self.offsets_E1[first : end + 1] - begin,
            slack=True,
        )
        return part.with_weights(part.weight_P)

    def to_mask(self) -> Tensor:
        """Boolean (T, E), true at the chosen pairs."""
        return self._spread(torch.ones_like(self.token_P, dtype=torch.bool), False)

    def to_dense(self) -> Tensor:
        """The matrix itself: weights at the chosen pairs, zero elsewhere, (T, E)."""
        return self._spread(self.weight_P, 0.0)

    def _spread(self, value_P: Tensor, elsewhere: float) -> Tensor:
        """The pairs' values in their cells, (T, E); slack goes to a column that is cut off."""
        column_P = self.expert_P.where(self.chosen_P(), self.num_experts) if self.slack else self.expert_P
        cells = value_P.new_full((self.num_tokens, self.num_experts + self.slack), elsewhere)
        return cells.index_put((self.token_P, column_P), value_P)[:, : self.num_experts]

    def top_expert_T(self) -> Tensor:
        """Each token's expert of greatest weight, int64 (T,); -1 for a token that chose nobody.

        This is the token's entry in its expert path (PathMoE, introduction: the top-1 expert of each layer).
        """
        executed_TE = self._spread(self.weight_P.detach(), -torch.inf)
        best_T, top_T = executed_TE.max(-1)
        return torch.where(best_T > -torch.inf, top_T, -1)


def _counting_waits(tensor: Tensor) -> bool:
    """Whether a number that depends on the tensor's content costs a wait for its device, or breaks a graph."""
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()
