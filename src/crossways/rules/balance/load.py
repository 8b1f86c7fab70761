"""Load balance in the form of Switch: the share of tokens an expert gets times the probability it is given.

Legend: T tokens, E experts, B rows of the batch, S tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.balance.tokens import mean_over_tokens


def load_balance_loss(
    logits_TE: Tensor,
    assignment: Assignment,
    valid_T: Tensor | None = None,
    share_E: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformers, arXiv 2101.03961, eq. 4-6; 1/k: DeepSeekMoE, arXiv 2401.06066, eq. 13).

    f_e is expert e's share of the executed pairs (Switch counts those asked for, before any is dropped, GShard, arXiv
    2006.16668, algorithm 1, first choices alone), P_e its mean softmax probability. Both sum to one, so perfect
    balance gives 1 for any k; transformers' `load_balancing_loss_func` counts each of the k choices in full and
    gives k times this. Other counts and other probabilities: `balance_product`.

    Args:
        logits_TE: raw router logits (T, E).
        assignment: what was executed; its loads carry no gradient.
        valid_T: boolean (T,), false for padding, or None.
        share_E: factor on each expert's term, float32 (E,), or None for one. MoE++ (arXiv 2410.07348, eq. 7) takes
            tau <= 1 for zero-computation experts, so that the balance point sends them more tokens; its formula lacks
            E / k, so its weight 0.01 is 0.01 k / E here.
        temperature: the probabilities are softmax(logits / temperature), above 0. The gates of USMoE's authors' code
            (arXiv 2503.22996) take 0.3 here and 1 for the weights.

    Returns:
        Float32 scalar; zero when nothing was chosen or there is nothing but padding.
    """
    probs_TE = (logits_TE.float() / temperature).softmax(-1)
    load_E = assignment.load_E()
    pairs = assignment.offsets_E1[-1]
    return balance_product(load_E if share_E is None else load_E * share_E, pairs, probs_TE, valid_T)


def balance_product(load_E: Tensor, pairs: Tensor | int, probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """E * sum_e (load_e / pairs) mean_t probs[t, e], scalar: any load-balance loss of Switch's kind.

    Args:
        load_E: how often each expert was chosen, (E,), without gradient: in the batch, in all batches of a step so
            far (Qiu et al. 2025, arXiv 2501.11873), before dropping (Switch), or as first choice alone (GShard).
        pairs: their total, or zero.
        probs_TE: float32 (T, E), each row summing to one.
        valid_T: boolean (T,), false for padding, or None.
    """
    pairs = pairs.clamp(min=1) if isinstance(pairs, Tensor) else max(pairs, 1)
    return load_E.shape[0] * torch.dot(load_E.float() / pairs, mean_over_tokens(probs_TE, valid_T))


def normalised(scores_TE: Tensor) -> Tensor:
    """Non-negative scores (T, E) scaled so that each token's sum to one; zeros stay zeros."""
    return scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)


def sequence_balance_loss(
    scores_TE: Tensor, assignment: Assignment, num_rows: int, valid_T: Tensor | None = None
) -> Tensor:
    """Mean over rows of E * sum_e f_e P_e within one row (DeepSeek-V3, arXiv 2412.19437, eq. 17-20): f_e is expert
    e's share of the row's executed pairs, P_e its mean score after each token's scores were scaled to sum to one.

    Eq. 18 counts the k best scores without bias and groups, here the executed pairs count. With softmax scores this
    is DeepSeek-V2's expert-level loss (arXiv 2405.04434, eq. 23-25). It keeps single sequences from collapsing on few
    experts where a bias balances the batch as a whole; DeepSeek-V3 gives it the weight 0.0001. Rows of padding count
    as zero.

    Args:
        scores_TE: non-negative scores (T, E), row-major.
        assignment: what was executed.
        num_rows: B, a divisor of T.
        valid_T: boolean (T,), false for padding, or None.
    """
    valid_T = scores_TE.new_ones(scores_TE.shape[0], dtype=torch.bool) if valid_T is None else valid_T
    share_BSE = torch.where(valid_T[:, None], normalised(scores_TE), 0.0).view(num_rows, -1, scores_TE.shape[-1])
    probs_BE = share_BSE.sum(1) / valid_T.view(num_rows, -1).sum(1, keepdim=True).clamp(min=1)
    load_BE = assignment.to_mask().view(share_BSE.shape).sum(1).float()
    load_BE = load_BE / load_BE.sum(1, keepdim=True).clamp(min=1)
    return scores_TE.shape[-1] * (load_BE * probs_BE).sum(-1).mean()
