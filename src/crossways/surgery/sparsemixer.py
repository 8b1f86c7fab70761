"""The weights of PhiMoE's router, which are no function of one pair's logit.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemixer_weights(logits_TE: Tensor, eps: float) -> Tensor:
    """Weights of the best and the second-best expert as SparseMixer-v2 gives them outside training (Liu et al. 2024,
    arXiv 2409.12136): each is a softmax over the experts that come near it, the second without the first.

    Args:
        logits_TE: float32 (T, E).
        eps: how near: within 2 eps of the greater of the two magnitudes.

    Returns:
        Float32 (T, 2), best expert first.
    """
    best_T, first_T = logits_TE.max(-1)
    without_TE = logits_TE.scatter(-1, first_T[:, None], -torch.inf)
    second_T = without_TE.max(-1).values
    return torch.stack([_near(logits_TE, logits_TE, best_T, eps), _near(without_TE, logits_TE, second_T, eps)], -1)


def sparsemixer_of_top2(logits_TE: Tensor, eps: float) -> Tensor:
    """The same weights in their places among all experts, float32 (T, E), zero elsewhere; minus infinity in the
    logits rules an expert out, unless that leaves none."""
    logits_TE = logits_TE.masked_fill((logits_TE == -torch.inf).all(-1, keepdim=True), 0.0)
    index_T2 = logits_TE.topk(2, dim=-1).indices
    return torch.zeros_like(logits_TE).scatter(-1, index_T2, sparsemixer_weights(logits_TE, eps))


def _near(candidates_TE: Tensor, logits_TE: Tensor, best_T: Tensor, eps: float) -> Tensor:
    """Softmax of the best candidate among those near it, (T,)."""
    best_T1 = best_T[:, None]
    far_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1) > 2 * eps
    near_TE = candidates_TE.masked_fill(far_TE, -torch.inf)
    return torch.exp(best_T - near_TE.logsumexp(-1))
