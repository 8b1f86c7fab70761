"""The two losses of Shazeer et al. 2017: the variation of importance, and of a smooth estimate of the load.

Legend: T tokens, E experts, P chosen pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.balance.tokens import squared_variation, without_padding


def importance_loss(assignment: Assignment) -> Tensor:
    """CV(importance)^2 with importance_e the sum of expert e's executed weights (Shazeer et al. 2017, arXiv
    1701.06538, eq. 6-7): squared standard deviation over squared mean, zero for equal importance, E - 1 for one
    expert alone.

    Returns:
        Float32 scalar; zero when nothing was chosen.
    """
    weight_P = assignment.weight_P.float()
    return squared_variation(weight_P.new_zeros(assignment.num_experts).index_add(0, assignment.expert_P, weight_P))


def load_loss(
    noisy_TE: Tensor, clean_TE: Tensor, scale_TE: Tensor, assignment: Assignment, valid_T: Tensor | None = None
) -> Tensor:
    """CV(load)^2 with load_e = sum_t P(t, e), the smooth load of Shazeer et al. 2017 (arXiv 1701.06538, eq. 8-11):
    P(t, e) = Phi((clean_e - kth_excluding(noisy, k, e)) / scale_e) is the probability that e is among the token's k
    best if its own noise is drawn anew, all others' kept.

    The k-th best among the others is read off what was executed: for a chosen expert the best one not chosen, for
    another the worst one chosen. So the number of experts may differ between tokens; it takes a selection that ranks
    each token's logits by themselves, such as `top_k`. Where there is no such rival (all experts are chosen, or none
    is) P is 1 or 0.

    Args:
        noisy_TE: the logits that were ranked, H(x), (T, E).
        clean_TE: those without noise, x W_g, (T, E).
        scale_TE: standard deviation of the noise, softplus(x W_noise), above 0, (T, E).
        assignment: what was executed.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    chosen_TE = assignment.to_mask()
    best_left_T1 = noisy_TE.masked_fill(chosen_TE, -torch.inf).amax(-1, keepdim=True)
    worst_taken_T1 = noisy_TE.masked_fill(~chosen_TE, torch.inf).amin(-1, keepdim=True)
    rival_TE = torch.where(chosen_TE, best_left_T1, worst_taken_T1)
    # Infinities would be NaN in the gradient of the quotient, so they are put in afterwards.
    known_TE = rival_TE.isfinite()
    margin_TE = (clean_TE - torch.where(known_TE, rival_TE, clean_TE.detach())) / scale_TE
    probs_TE = torch.where(known_TE, torch.special.ndtr(margin_TE), chosen_TE.to(margin_TE.dtype))
    return squared_variation(without_padding(probs_TE.float(), valid_T).sum(0))
