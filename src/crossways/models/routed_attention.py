"""Attention whose value and output projections are routed (SwitchHead, Csordás et al. 2024, arXiv 2312.07987).

Each head has E matrices for values and E for outputs, but one attention matrix however many experts it has; queries
and keys are as ever, or routed in the same way (`attention_projections`). With sigmoid scores s = sigmoid(x W_S) of
the token that is attended to, and t = sigmoid(x W_D) of the one that attends, both of head h:

    V^h = sum over the k best e of s[e] x W_V^{h,e}        y = sum over h and the k best e of t[e] (A^h V^h) W_O^{h,e}

A head chooses for itself, without a look at other tokens, so nothing here has a decode twin, and cached values are
what they would be without a cache. There is no balance loss, as in the paper. What is chosen here is in no trace:
paths, loads and perturbations are of the feed-forward networks' routers alone.

Legend: B batch, S sequence, T = B S tokens, H heads, E experts of a head, D model width, I and O widths of a matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from crossways.assignment import Assignment
from crossways.experts.linear import Wiring, linear_experts
from crossways.gates import LinearGate
from crossways.models.configuration import CrosswaysConfig
from crossways.rules.score import build_score
from crossways.rules.select import build_selection


class HeadExperts(nn.Module):
    """E matrices for every head, and the gate by which each head chooses among its own.

    Towards the heads (`into="heads"`) it maps x (B, S, D) to (B, S, H O), from them (`into="model"`) it maps
    (B, S, H I) to (B, S, D), summed over heads.
    """

    def __init__(self, config: CrosswaysConfig, heads: int, into: Literal["heads", "model"]) -> None:
        """
        Args:
            config: of the model, whose `attention_experts`, `attention_score` and `attention_select` it follows.
            heads: H; values have as many as keys.
            into: see above.
        """
        super().__init__()
        self.heads, self.num_experts, self.into = heads, config.attention_experts, into
        self.score, self.select = (
            build_score(config.attention_score),
            build_selection(config.attention_select or "top_k"),
        )
        self.gate = LinearGate(config.hidden_size, heads * self.num_experts)
        widths = (config.head_dim, config.hidden_size) if into == "heads" else (config.hidden_size, config.head_dim)
        self.weight = nn.Parameter(torch.empty(heads * self.num_experts, *widths))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def choose(self, x_BSD: Tensor) -> Assignment:
        """What each head of each token takes: T H tokens, heads innermost, and H E experts, those of a head side by
        side."""
        logits = self.gate(x_BSD).view(len(x_BSD), -1, self.num_experts)  # heads as tokens, (B, S H, E)
        scores = self.score(logits)
        rule = self.select.in_training() if self.training else self.select
        chosen = rule(logits if rule.chooses_by == "logits" else scores, scores).compact()
        expert_P = chosen.token_P % self.heads * self.num_experts + chosen.expert_P
        return Assignment.from_pairs(
            chosen.token_P, expert_P, chosen.weight_P, chosen.num_tokens, self.heads * self.num_experts
        )

    def forward(self, x_BSD: Tensor, input_BSI: Tensor | None = None) -> Tensor:
        """
        Args:
            x_BSD: what the gate reads.
            input_BSI: what the matrices read, by default the same.
        """
        chosen = self.choose(x_BSD)
        token_P, tokens = chosen.token_P // self.heads, chosen.num_tokens // self.heads
        if self.into == "heads":
            wiring, rows = Wiring(token_P, chosen.token_P, chosen.num_tokens), x_BSD.flatten(0, 1)
        else:
            assert input_BSI is not None
            wiring, rows = Wiring(chosen.token_P, token_P, tokens), input_BSI.reshape(chosen.num_tokens, -1)
        return linear_experts(rows, chosen, self.weight, wiring).view(*x_BSD.shape[:2], -1)

    def extra_repr(self) -> str:
        """Numbers and rules."""
        return f"heads={self.heads}, num_experts={self.num_experts}, score={self.score}, select={self.select}"


class _Routed:
    """Makes some projections of a Llama-like attention routed; everything else stays its own."""

    def __init__(self, config: CrosswaysConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        shared = config.num_key_value_heads or config.num_attention_heads
        heads = {"query": config.num_attention_heads, "key": shared, "value": shared}
        routed = config.attention_projections or ()
        for name in heads.keys() & set(routed):
            setattr(self, f"{name[0]}_proj", HeadExperts(config, heads[name], "heads"))
        self.outputs = HeadExperts(config, config.num_attention_heads, "model") if "output" in routed else None
        if self.outputs is not None:
            self.o_proj = nn.Identity()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the attention that is routed."""
        attended_BSI, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return attended_BSI if self.outputs is None else self.outputs(hidden_states, attended_BSI), weights


class RoutedAttention(_Routed, LlamaAttention):  # type: ignore[misc]
    """Llama's, routed."""


class RoutedNormedAttention(_Routed, Qwen3Attention):  # type: ignore[misc]
    """Qwen3's, which is Llama's with two norms, routed."""
