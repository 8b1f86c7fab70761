"""What a recipe says about evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crossways.settings import Settings


class EvaluationSettings(Settings):
    """The perplexity protocol: each document alone, sliding windows, every token scored once."""

    window: int = Field(default=256, ge=2)
    """Tokens a window holds, up to the model's context; usually the training length."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens scored per window, 1 (slow, most context) to `window` (disjoint); None is `window`."""
    batch_size: int = Field(default=16, ge=1)
    """Windows per forward pass. Changes figures only of rules that are not batch-invariant."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Score whole documents up to this many tokens, at least one document; None scores all validation documents."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the evaluation; log-probabilities are float32 always."""
    disable_top: bool = True
    """Also measure perplexity with each token's top-1 routed expert disabled, weights as they are and rescaled."""
