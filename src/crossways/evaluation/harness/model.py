"""The language model that lm-eval evaluates. Imports lm-eval: import this file only where that is installed.

lm-eval's own wrapper pads on the right and passes no attention mask. Causal attention does not mind, but a router
that ranks the tokens of a sequence would let padding compete, and measured loads would count it. So requests are
scored here with a mask; all else is lm-eval's.

Legend: B batch, S sequence, C tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.padding import Side, model_inputs, padded
from crossways.models import CrosswaysForCausalLM

Request = tuple[Any, list[int], list[int]]
"""A cache key, the context's token ids and the continuation's."""
Answer = tuple[float, bool]
"""Log-likelihood of a continuation, and whether it is the greedy one."""


class RoutedLM(HFLM):
    """lm-eval's `HFLM` around a model in memory. Call it within `decided_by`, which says who decides."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        padding_side: Side = "right",
        causal: bool = True,
        progress: bool = False,
    ) -> None:
        """
        Args:
            model: any causal language model.
            tokenizer: its own; a copy of it is used.
            batch_size: sequences per forward pass.
            max_length: most tokens of a sequence; the model's context by default.
            padding_side: of scored sequences; generation pads on the left.
            causal: whether one of crossways' own models generates by its decode twin.
            progress: show progress bars.
        """
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )
        self.padding_side, self.causal, self.progress = padding_side, causal, progress
        self.requests = 0
        self.truncated = 0

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of an answer where the task does not say: lm-eval's 256, half the context if that is short."""
        return min(256, self.max_length // 2)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        """As in lm-eval, with bars only if they were asked for; so the next two."""
        return super().loglikelihood(requests, disable_tqdm or not self.progress)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts."""
        return super().loglikelihood_rolling(requests, disable_tqdm or not self.progress)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop sequence."""
        return super().generate_until(requests, disable_tqdm or not self.progress)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Score every request; those that differ in their last token only share a forward pass."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            sharing.setdefault(self._fitted(context, continuation), []).append(index)
        rows = sorted(sharing, key=len, reverse=True)
        size = override_bs or self.batch_size
        answers: dict[int, Answer] = {}
        for start in tqdm(range(0, len(rows), size), disable=disable_tqdm or not self.progress):
            chunk = rows[start : start + size]
            for row, logits_SV in zip(chunk, self._logits(chunk), strict=True):
                for index in sharing[row]:
                    answers[index] = _answer(logits_SV, requests[index][2])
        for index, (key, _, _) in enumerate(requests):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What goes into the model: all but the last token, cut on the left."""
        self.requests += 1
        self.truncated += len(context) + len(continuation) > self.max_length + 1
        if len(continuation) > self.max_length:
            raise UserError(f"an answer of {len(continuation)} tokens does not fit the model's {self.max_length}")
        return tuple((context + continuation)[-(self.max_length + 1) :][:-1])

    @torch.no_grad()
    def _logits(self, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Logits (S, V) of each row, without padding."""
        ids_BS, mask_BS = padded(rows, self.tokenizer.pad_token_id or 0, self.padding_side)
        inputs = model_inputs(self.model, ids_BS.to(self.device), mask_BS.to(self.device))
        logits_BSV = self.model(**inputs).logits
        if self.padding_side == "left":
            return [logits_BSV[row, -len(ids) :] for row, ids in enumerate(rows)]
        return [logits_BSV[row, : len(ids)] for row, ids in enumerate(rows)]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """As in lm-eval; one of our own models is told who decides, which by itself would be the twin."""
        if isinstance(self.model, CrosswaysForCausalLM):
            kwargs["causal_routing"] = self.causal
        self.requests += len(context)
        with torch.no_grad():
            return super()._model_generate(context, max_length, stop, **kwargs)


def _answer(logits_SV: Tensor, continuation: Sequence[int]) -> Answer:
    """Of a continuation whose last token is predicted by the last row of logits."""
    target_C = torch.tensor(continuation, device=logits_SV.device)
    log_CV = logits_SV[-len(continuation) :].float().log_softmax(-1)
    nats_C = log_CV.gather(-1, target_C[:, None])[:, 0]
    return float(nats_C.double().sum()), bool((log_CV.argmax(-1) == target_C).all())
