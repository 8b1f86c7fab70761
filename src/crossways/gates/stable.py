"""The stable gate: learn to route, distil the choice into a table of token ids, then freeze it.

Legend: B batch, S sequence, D model width, E experts, V vocabulary, R routing dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from crossways.gates.base import (
    Gate,
    GateSpec,
    check_vocabulary,
    check_whole,
    required_token_ids,
    router_product,
)
from crossways.routing import Context, GateOutput


class StableGate(Gate):
    """Two stages (StableMoE, Dai et al. 2022, arXiv 2204.08396, section 3, eq. 6-7, 9-10 and 12-14).

    Stage 1: the backbone's logits W x choose and weigh; a word-embedding router, logits C r(token), learns by
    cross-entropy to name the backbone's first choice (eq. 10 as a mean over tokens, the gate's loss). Stage 2, from
    `freeze_after` steps on: the distilled router chooses and no longer changes, so a token id keeps its experts;
    W x only weighs, and goes on learning. Outside training the distilled router chooses in both stages, as in the
    authors' code. The paper routes to one expert with sigmoid weights, y = sigmoid(w_i x) FFN_i(x).

    Its balance loss of stage 1 (eq. 8) is `excess_load_coef`; like any other balance loss it is left out in stage 2.
    Under distributed data parallel, stage 2 needs `find_unused_parameters`: the distilled router gets no gradient
    there.
    """

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int, dim: int, freeze_after: int) -> None:
        super().__init__()
        self.freeze_after = freeze_after
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.words_VR = nn.Parameter(torch.empty(vocab_size, dim))
        self.centroids_ER = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Backbone normal with the given standard deviation; words standard normal and centroids orthogonal with gain
        0.1, as in the authors' code."""
        nn.init.normal_(self.weight, std=std)
        nn.init.normal_(self.words_VR)
        nn.init.orthogonal_(self.centroids_ER, gain=0.1)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> GateOutput:
        """(B, S, D) and `context.token_ids_BS` to float32 logits (B, S, E), what to choose by, and the loss."""
        token_ids_BS = required_token_ids("stable", context)
        assert context is not None  # or there would be no token ids
        fixed = context.step >= self.freeze_after
        logits_BSE = router_product(x_BSD, self.weight)
        distilled_BSE = router_product(self.words_VR[token_ids_BS].to(logits_BSE.dtype), self.centroids_ER)
        if self.training and not fixed:
            loss = _distillation_loss(distilled_BSE, logits_BSE, context.valid_BS)
            return GateOutput(logits_BSE, loss=loss)
        return GateOutput(logits_BSE, choice_BSE=distilled_BSE.detach(), fixed=fixed)

    def weights_per_token(self) -> int:
        """Both routers; looking up a word costs nothing."""
        return self.weight.numel() + self.centroids_ER.numel()


def _distillation_loss(distilled_BSE: Tensor, logits_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Mean cross-entropy over valid tokens against the backbone's first choice; zero when all is padding."""
    target_BS = logits_BSE.argmax(-1)
    if valid_BS is not None:
        target_BS = target_BS.masked_fill(~valid_BS, -100)
    total = cross_entropy(distilled_BSE.flatten(0, 1), target_BS.flatten(), reduction="sum")
    return total / (target_BS >= 0).sum().clamp(min=1)


@dataclass(frozen=True)
class Stable(GateSpec):
    """A backbone router, distilled into a router of token ids that is frozen after a while."""

    name: ClassVar[str] = "stable"
    scheduled: ClassVar[bool] = True

    freeze_after: int
    """Optimizer steps of stage 1, at least 0; a tenth of all in the paper's language models, 6,000 of 60,000
    (training passes where neither our trainer nor its `OptimizerSteps` is used)."""
    dim: int = 50
    """Width of the word embeddings, at least 1; 50 in the paper."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze_after", check_whole(self.name, "freeze_after", self.freeze_after, least=0))
        object.__setattr__(self, "dim", check_whole(self.name, "dim", self.dim))

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> StableGate:
        vocab_size = check_vocabulary(self.name, vocab_size)
        return StableGate(hidden_size, num_experts, vocab_size, self.dim, self.freeze_after)
