"""The auxiliary losses of a whole model, computed from what was executed and returned, never stored.

Legend: R routers, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossways.models.configuration import CrosswaysConfig
from crossways.routing import Routing
from crossways.rules.balance import load_balance_loss, router_z_loss


def auxiliary_losses(
    routings: Sequence[Routing], config: CrosswaysConfig
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Losses per router, and their weighted sum over routers.

    Summing over routers, not averaging, is Switch Transformers' form (arXiv 2101.03961, section 2.2: the loss is
    added for each layer); a Cartesian layer therefore adds one term per factor.

    Returns:
        `{"load_balance": (R,), "router_z": (R,), "gate": (R,)}`, unweighted, only those with a coefficient and only
        the routers that have one, and a scalar. Routers that repeat another's decision have none, those whose choice
        is fixed no balance loss, and most gates no loss of their own.
    """
    routings = [routing for routing in routings if not routing.reused]
    losses: dict[str, list[Tensor]] = {}
    if config.load_balance_coef:
        learning = [r for r in routings if not r.fixed]
        losses["load_balance"] = [load_balance_loss(r.logits_TE, r.assignment, r.valid_T) for r in learning]
    if config.router_z_loss_coef:
        losses["router_z"] = [router_z_loss(r.logits_TE, r.valid_T) for r in routings]
    if config.gate_loss_coef:
        losses["gate"] = [r.gate_loss for r in routings if r.gate_loss is not None]
    stacked = {name: torch.stack(values) for name, values in losses.items() if values}
    coefs = {
        "load_balance": config.load_balance_coef,
        "router_z": config.router_z_loss_coef,
        "gate": config.gate_loss_coef,
    }
    return stacked, sum(coefs[name] * loss_R.sum() for name, loss_R in stacked.items())


def share_of_step(labels_BS: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This batch's share of the labels of an optimizer step: 1 unless gradients are accumulated.

    The language-model loss is then a sum over the batch divided by the step's labels; auxiliary losses are means and
    need the same share, or accumulation would multiply them.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels_BS[:, 1:] != -100).sum() / num_items_in_batch
