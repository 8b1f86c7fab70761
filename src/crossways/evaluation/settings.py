"""What a recipe says about evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crossways.errors import UserError
from crossways.settings import Settings


class EvaluationSettings(Settings):
    """The perplexity protocol: each document alone, sliding windows, every token scored once."""

    window: int = Field(default=256, ge=2)
    """Tokens a window holds, up to the model's context, which is taken where none is asked for and it is shorter;
    usually the training length."""
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


def fitted(settings: EvaluationSettings, context: int | None) -> EvaluationSettings:
    """A protocol whose window a model of this context can read.

    Args:
        settings: the protocol.
        context: most tokens the model reads; None if there is no limit.

    Raises:
        UserError: a longer window was asked for.
    """
    if context is None or settings.window <= context:
        return settings
    if "window" in settings.model_fields_set:
        raise UserError(
            f"evaluation.window {settings.window} exceeds the model's context of {context}; "
            f"set it to {context} or less (--set evaluation.window={context})"
        )
    return settings.model_copy(update={"window": context})
