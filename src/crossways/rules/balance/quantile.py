"""Quantile balancing: the prices of experts under which each token's k best experts are level loads.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.routing import Routing


def balancing_price(routing: Routing, bias_E: Tensor) -> Tensor:
    """One step of dual coordinate descent on prices (Megatron-core 0.20, `quantile_balancing`, and the posts of Su
    that it follows; we know no paper): tokens choose by logits less price, s - b; a_t is what the best expert that
    token t did not choose has to offer, s[t, e] - b_e; then expert e's price becomes the (q + 1)-th greatest over
    tokens of s[t, e] - a_t, which q tokens exceed, q = P / E being the level load. Ties and a fraction of q
    aside, and for these a_t, every expert is then chosen q times.

    Tokens that chose all experts, or none, have no a_t and do not count.

    Args:
        routing: what was decided by logits plus `bias_E` = -b; `choice_TE` holds the sum.
        bias_E: the bias of that decision, float32 (E,).

    Returns:
        Float32 (E,); the old prices when no token counts.
    """
    assert routing.choice_TE is not None  # routers always fill it in
    mask_TE, choice_TE = routing.assignment.to_mask(), routing.choice_TE.float()
    offer_T1 = choice_TE.masked_fill(mask_TE, -torch.inf).amax(-1, keepdim=True)
    counts_T = mask_TE.any(-1) & offer_T1[:, 0].isfinite()
    if not len(counts_T):
        return -bias_E
    # All are sorted, since the rank is known to the device alone.
    margin_TE = (choice_TE - bias_E - offer_T1).masked_fill(~counts_T[:, None], -torch.inf)
    pairs = (mask_TE & counts_T[:, None]).sum()
    level = (pairs.double() / mask_TE.shape[1] + 0.5).floor().long()
    rank = (level + 1).minimum(counts_T.sum()).clamp(min=1)
    price_E = margin_TE.sort(0, descending=True).values.index_select(0, (rank - 1)[None])[0]
    return torch.where(counts_T.any(), price_E, -bias_E)
