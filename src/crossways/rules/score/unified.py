"""The unified score of USMoE.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor

from crossways.errors import UserError
from crossways.rules.score.base import Score
from crossways.rules.score.token_softmax import Group, RunningTokenSoftmax, TokenSoftmax

ExpertPart = Literal["sigmoid", "softmax_over_tokens"]


@dataclass(frozen=True)
class Unified(Score):
    """u = alpha * softmax(s) + (1 - alpha) * 2 * sigmoid(s) / E (USMoE, arXiv 2503.22996v2, definition 3.2).

    The two parts are the score of token choice and that of expert choice; their form and alpha = 0.5 are those of
    the authors' published code. The factor 2 / E puts both on one scale: each is 1 / E at logits of zero. The sigmoid
    part's row sum is not one, so scores of one token sum to one only on average.

    `expert_part = softmax_over_tokens` takes `token_softmax` for the second part, on the same scale. It looks at
    other tokens, so the score then has the decode twin that is described there. Each part alone: alpha 1 or 0.
    """

    name: ClassVar[str] = "unified"

    alpha: float = 0.5
    """Share of the token-choice part, 0 to 1; 1 is plain softmax, 0 the expert-choice part. The authors use 0.5."""
    expert_part: ExpertPart = "sigmoid"
    """The expert-choice part: `sigmoid` as in the authors' code, or `softmax_over_tokens`."""
    group: Group = "sequence"
    """Over which tokens `softmax_over_tokens` runs: those of one `sequence`, or of the whole `batch`."""

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"score 'unified': alpha must lie in [0, 1], got {self.alpha}")
        if self.expert_part not in get_args(ExpertPart):
            raise UserError(
                f"score 'unified': expert_part must be one of {get_args(ExpertPart)}, got {self.expert_part!r}"
            )
        TokenSoftmax(self.group)

    @property
    def _over_tokens(self) -> TokenSoftmax | None:
        """The part that looks at other tokens, if there is one."""
        looks = self.expert_part == "softmax_over_tokens" and self.alpha < 1.0
        return TokenSoftmax(self.group) if looks else None

    @property
    def causal(self) -> bool:
        """All but a softmax over tokens is."""
        return self._over_tokens is None

    @property
    def batch_invariant(self) -> bool:
        """All but a softmax over the tokens of the batch is."""
        return self._over_tokens is None or self._over_tokens.batch_invariant

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        if self.alpha == 1.0:  # exactly softmax, not softmax plus a zero that rounds or carries an infinity's NaN
            return logits_BSE.softmax(-1)
        expert_choice_BSE = self._expert_choice(logits_BSE, valid_BS)
        return self.alpha * logits_BSE.softmax(-1) + (1.0 - self.alpha) * expert_choice_BSE

    def _expert_choice(self, logits_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
        if self._over_tokens is not None:
            return self._over_tokens(logits_BSE, valid_BS)
        return logits_BSE.sigmoid() * (2.0 / logits_BSE.shape[-1])

    def decode_twin(self) -> Score:
        return self if self._over_tokens is None else _RunningUnified(self.alpha)

    def normaliser(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor | None:
        return None if self._over_tokens is None else self._over_tokens.normaliser(logits_BSE, valid_BS)


@dataclass(frozen=True, eq=False)
class _RunningUnified(Unified):
    """The decode twin with a softmax over tokens: `RunningTokenSoftmax` for the second part."""

    value: Tensor | None = None
    """Its normaliser, float32 (E,)."""

    def at(self, normaliser_E: Tensor) -> Unified:
        return replace(self, value=normaliser_E)

    def _expert_choice(self, logits_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
        return RunningTokenSoftmax(value=self.value)(logits_BSE)
