"""The recurrent gate: a GRU that runs over the layers, not over the tokens.

Legend: B batch, S sequence, D model width, E experts, L layers that share the gate, H state width, N = B * S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from crossways.gates.base import Gate, GateSpec, check_switch, check_whole, router_product
from crossways.routing import Context, GateOutput


class RecurrentGate(Gate):
    """x'_l = P_l x_l, h_l = GRU(x'_l, h_(l-1)), logits G_l h_l, with h before the first layer zero (layer-wise
    recurrent router, Qiu et al. 2024, arXiv 2408.06793, section 3.2, eq. 4-6; Recurrent-MoE of PathMoE, arXiv
    2603.18297).

    The GRU is one for all layers that share the gate; P_l and G_l are each layer's own in the paper, and one for all
    with `shared_projection` and `shared_head`. Each token's state goes from layer to layer, never from token to
    token, so routing stays causal and a decoding step needs no state of the step before. The first layer of a block
    starts afresh; the paper has one block (sharing `all`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_layers: int,
        state_size: int,
        *,
        shared_projection: bool = False,
        shared_head: bool = False,
    ) -> None:
        super().__init__()
        projections, heads = (1 if shared else num_layers for shared in (shared_projection, shared_head))
        self.state_size = state_size
        self.projection_LHD = nn.Parameter(torch.empty(projections, state_size, hidden_size))
        self.head_LEH = nn.Parameter(torch.empty(heads, num_experts, state_size))
        self.input_weight = nn.Parameter(torch.empty(3 * state_size, state_size))
        self.state_weight = nn.Parameter(torch.empty(3 * state_size, state_size))
        self.input_bias = nn.Parameter(torch.empty(3 * state_size))
        self.state_bias = nn.Parameter(torch.empty(3 * state_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Matrices normal with the given standard deviation, biases zero."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> GateOutput:
        """(B, S, D) to float32 logits (B, S, E) and state (B, S, H), from the state in `context.previous`."""
        context = context or Context()
        input_BSH = router_product(x_BSD, self._of_layer(self.projection_LHD, context.layer))
        state_BSH = self._gru(input_BSH, self._state_before(input_BSH, context))
        return GateOutput(router_product(state_BSH, self._of_layer(self.head_LEH, context.layer)), state=state_BSH)

    @staticmethod
    def _of_layer(weights: Tensor, layer: int) -> Tensor:
        return weights[layer if weights.shape[0] > 1 else 0]

    @staticmethod
    def _state_before(input_BSH: Tensor, context: Context) -> Tensor:
        if context.layer == 0:
            return torch.zeros_like(input_BSH)
        if context.previous is None or context.previous.state is None:
            raise ValueError(f"layer {context.layer} of a recurrent gate needs the routing of the layer before")
        return context.previous.state

    def _gru(self, input_BSH: Tensor, state_BSH: Tensor) -> Tensor:
        weights = (self.input_weight, self.state_weight, self.input_bias, self.state_bias)
        with maybe_autocast(input_BSH.device.type, enabled=False):
            new_NH = torch.gru_cell(
                input_BSH.flatten(0, 1), state_BSH.flatten(0, 1), *(w.to(input_BSH.dtype) for w in weights)
            )
        return new_NH.view_as(input_BSH)

    def weights_per_token(self) -> int:
        """One layer's projection and head, and the cell."""
        parts = (self.projection_LHD[0], self.head_LEH[0], self.input_weight, self.state_weight)
        return sum(part.numel() for part in parts)


@dataclass(frozen=True)
class Recurrent(GateSpec):
    """A GRU over the layers of a block."""

    name: ClassVar[str] = "recurrent"

    state_size: int = 256
    """Width of the state, at least 1; 128 in most of the paper's settings, 256 is the default of its code."""
    shared_projection: bool = False
    """One projection into the GRU for all layers, instead of one each."""
    shared_head: bool = False
    """One map from states to logits for all layers, instead of one each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_size", check_whole(self.name, "state_size", self.state_size))
        for field in ("shared_projection", "shared_head"):
            check_switch(self.name, field, getattr(self, field))

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> RecurrentGate:
        return RecurrentGate(
            hidden_size,
            num_experts,
            num_layers,
            self.state_size,
            shared_projection=self.shared_projection,
            shared_head=self.shared_head,
        )
