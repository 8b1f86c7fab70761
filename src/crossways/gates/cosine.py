"""The cosine gate: X-MoE, and the form it has in USMoE's from-scratch experiments.

Legend: B batch, S sequence, D model width, E experts, R routing dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from crossways.gates.base import (
    Gate,
    GateSpec,
    check_positive,
    check_switch,
    check_whole,
    router_float,
    router_product,
)
from crossways.routing import Context, GateOutput

MIN_NORM = 1e-4
"""Norms are taken to be at least this, and a learnt temperature too."""


class CosineGate(Gate):
    """Logits cos(P x, e_i) / tau: project to R dimensions, compare directions with expert embeddings, divide by a
    learnt temperature (X-MoE, Chi et al. 2022, arXiv 2204.09179, section 3.1, eq. 7 and 8). The paper starts the
    embeddings with norm 0.1 and keeps it, against assignments that jump: `embedding_norm=0.1`. Its balance loss (eq.
    9) is the softmax of the cosines over a fixed temperature: `load_balance_probs: cosine`.

    With `normalize_input=False`, `learn_temperature=False`, `temperature=1`, `dim=8` and `embedding_norm=1.5` it is
    the gate that USMoE's authors (arXiv 2503.22996) call XMoE in their code: P x is compared as it is with unit
    embeddings, so logits are |P x| cos. Their embeddings are put back to norm 1.5 before each step, which changes no
    logit, only how far a step turns them. As there, that happens in place, in training, outside the gradient.

    With `project=False` x itself is compared, with embeddings of D numbers: not normalised and at temperature 1 this
    is the gate that the same code calls StableMoE (which it is not: nothing is distilled or frozen).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        dim: int | None,
        *,
        temperature: float = 0.3,
        learn_temperature: bool = True,
        normalize_input: bool = True,
        embedding_norm: float | None = None,
    ) -> None:
        """`dim` is R, None compares x itself; the rest as in `Cosine`."""
        super().__init__()
        self.initial_temperature, self.normalize_input = temperature, normalize_input
        self.embedding_norm = embedding_norm
        self.projection = None if dim is None else nn.Parameter(torch.empty(dim, hidden_size))
        self.embeddings = nn.Parameter(torch.empty(num_experts, dim or hidden_size))
        if learn_temperature:
            self.temperature = nn.Parameter(torch.empty(1))
        self.learn_temperature = learn_temperature
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Projection normal with the given standard deviation; embeddings orthogonal, as in both papers' code (with
        gains 0.1 and 0.32; only the direction matters to the logits), and the temperature at its start."""
        if self.projection is not None:
            nn.init.normal_(self.projection, std=std)
        nn.init.orthogonal_(self.embeddings, gain=0.1 if self.embedding_norm is None else self.embedding_norm)
        if self.learn_temperature:
            nn.init.constant_(self.temperature, self.initial_temperature)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor | GateOutput:
        """(B, S, D) to float32 logits (B, S, E), in training with the cosines that they are."""
        self._restore_norms()
        projected_BSR = router_float(x_BSD) if self.projection is None else router_product(x_BSD, self.projection)
        if self.normalize_input:
            projected_BSR = normalize(projected_BSR, dim=-1, eps=MIN_NORM)
        unit_ER = normalize(self.embeddings.to(projected_BSR.dtype), dim=-1, eps=MIN_NORM)
        cosine_BSE = router_product(projected_BSR, unit_ER)
        temperature: Tensor | float = self.initial_temperature
        if self.learn_temperature:
            temperature = self.temperature.to(cosine_BSE.dtype).clamp(min=MIN_NORM)
        logits_BSE = cosine_BSE / temperature
        return GateOutput(logits_BSE, cosine_BSE=cosine_BSE) if self.training else logits_BSE

    @torch.no_grad()
    def _restore_norms(self) -> None:
        # Through `data`, as the gradients of an earlier pass may not be taken yet; norms that are right already (as
        # in recomputation) are multiplied by exactly one.
        if self.embedding_norm is None or not self.training:
            return
        norm_E1 = self.embeddings.float().norm(dim=-1, keepdim=True)
        factor_E1 = self.embedding_norm / norm_E1.clamp(min=MIN_NORM)
        right_E1 = (factor_E1 - 1).abs() < 4 * torch.finfo(self.embeddings.dtype).eps
        self.embeddings.data.mul_(torch.where(right_E1, 1.0, factor_E1))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        num_experts, dim = self.embeddings.shape
        hidden_size = dim if self.projection is None else self.projection.shape[1]
        return f"hidden_size={hidden_size}, num_experts={num_experts}, dim={dim}"


@dataclass(frozen=True)
class Cosine(GateSpec):
    """Cosine with expert embeddings in a low dimension, over a temperature. The defaults are X-MoE's, but for the
    norm of the embeddings, which stays free."""

    name: ClassVar[str] = "cosine"

    dim: int | None = None
    """Routing dimension, at least 1; None is half the number of experts, X-MoE's choice. USMoE's code: 8."""
    project: bool = True
    """Whether to project before comparing; otherwise embeddings are as wide as the model and `dim` is unused."""
    temperature: float = 0.3
    """Start (or fixed value) of the temperature, above 0. X-MoE gives 0.3 for softmax and 0.07 for sigmoid scores,
    with the symbol of its balance loss' fixed temperature; where the learnt one starts it does not say."""
    learn_temperature: bool = True
    """Whether the temperature is a parameter."""
    normalize_input: bool = True
    """Whether the projected input is normalised too, so that logits lie in [-1 / temperature, 1 / temperature]."""
    embedding_norm: float | None = None
    """Norm that the embeddings are put back to before each training pass (0.1 in X-MoE, 1.5 in USMoE's code); None
    leaves them."""

    def __post_init__(self) -> None:
        if self.dim is not None:
            object.__setattr__(self, "dim", check_whole(self.name, "dim", self.dim))
        check_positive(self.name, "temperature", self.temperature)
        if self.embedding_norm is not None:
            check_positive(self.name, "embedding_norm", self.embedding_norm)
        for field in ("project", "learn_temperature", "normalize_input"):
            check_switch(self.name, field, getattr(self, field))

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> CosineGate:
        return CosineGate(
            hidden_size,
            num_experts,
            (self.dim or max(num_experts // 2, 1)) if self.project else None,
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            normalize_input=self.normalize_input,
            embedding_norm=self.embedding_norm,
        )
