"""The auxiliary losses of a whole model, computed from what was executed and returned, never stored.

Legend: R routers, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from crossways.models.configuration import CrosswaysConfig
from crossways.models.loss_terms import TERMS
from crossways.routing import GateNoise, Routing
from crossways.rules.balance import sparsity_loss

AUXILIARY_LOSSES = (*TERMS, "sparsity")
"""Every name that `auxiliary_losses` may give."""


def auxiliary_losses(
    routings: Sequence[Routing], config: CrosswaysConfig
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Losses per router, and their weighted sum over routers.

    Summing over routers, not averaging, is Switch Transformers' form (arXiv 2101.03961, section 2.2: the loss is
    added for each layer); a Cartesian layer therefore adds one term per factor.

    The sparsity loss of ReMoE has no fixed weight but the routers' own, and is averaged over routers as in its paper.

    Returns:
        Name to (R,), unweighted, only those in use and only the routers that have one, and a scalar. Routers that
        repeat another's decision have none, those whose choice is fixed no balance loss, gates without noise (and
        none has any outside training) no load loss, and most gates no loss of their own.
    """
    routings = [_in_float32(routing) for routing in routings if not routing.reused]
    losses: dict[str, Tensor] = {}
    total: Tensor | float = 0.0
    for name, term in TERMS.items():
        coef = getattr(config, term.coef)
        having = [value for routing in routings if (value := term(routing, config)) is not None] if coef else []
        if having:
            losses[name] = torch.stack(having)
            total = total + coef * losses[name].sum()
    if config.sparsity_budget and routings:
        losses["sparsity"] = torch.stack(
            [sparsity_loss(r.scores_TE, r.assignment, config.sparsity_budget, r.valid_T) for r in routings]
        )
        coef_R = torch.stack([cast(Tensor, r.sparsity_coef) for r in routings])
        total = total + (coef_R * losses["sparsity"]).mean()
    return losses, total


def _in_float32(r: Routing) -> Routing:
    """What a router in float64 said; losses are float32 like the language model's."""
    if r.logits_TE.dtype == torch.float32:
        return r
    noise = None if r.noise is None else GateNoise(r.noise.clean.float(), r.noise.scale.float())
    gate_loss = None if r.gate_loss is None else r.gate_loss.float()
    return replace(r, logits_TE=r.logits_TE.float(), scores_TE=r.scores_TE.float(), noise=noise, gate_loss=gate_loss)


def share_of_step(labels_BS: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This batch's share of the labels of an optimizer step: 1 unless gradients are accumulated.

    The language-model loss is then a sum over the batch divided by the step's labels; auxiliary losses are means and
    need the same share, or accumulation would multiply them.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels_BS[:, 1:] != -100).sum() / num_items_in_batch
