"""`RoutedEncoder`: texts to vectors, one at a time as far as anyone can tell.

Legend: B batch, S sequence, N texts, D model width, W routing width, Z embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.embeddings.parts import Parts, Statistics, combined, standardised
from crossways.evaluation.embeddings.reader import read_last_token
from crossways.evaluation.embeddings.settings import EmbeddingSettings
from crossways.evaluation.executed import Executed, RoutingRecord, decided_by, rules_of
from crossways.evaluation.padding import padded
from crossways.evaluation.subject import subject_of
from crossways.router import Router
from crossways.sites import router_sites
from crossways.surgery.attach import attach_own


class RoutedEncoder:
    """Embeds texts with any causal language model: of crossways, of transformers, rerouted or not."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: EmbeddingSettings | None = None
    ) -> None:
        """
        Args:
            model: put in evaluation mode for each call; one of transformers that is not rerouted gets a handle with
                its own rule, which changes no output.
            tokenizer: the model's.
            settings: the protocol.

        Raises:
            UserError: for routing weights of a model that has none, or whose routing is not understood.
        """
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or EmbeddingSettings()
        self.statistics: Statistics | None = None
        attach_own(model, needed=self.settings.reads_routing)
        if self.settings.reads_routing and not router_sites(model):
            raise UserError("this model has no routed layer, so it has no routing weights; use kind hs")
        self.executed = Executed(model)
        self._causal = self.settings.causal

    def encode(self, texts: Sequence[str], instruction: str = "") -> Tensor:
        """Embeddings, float32 (N, Z), on the CPU.

        Args:
            texts: any strings; an empty one is embedded as a full stop.
            instruction: that of their task, put in front as the settings say.

        Raises:
            UserError: if the rule lets texts of one batch influence each other, and the batch size is not 1.
        """
        parts = self.parts(texts, instruction)
        return combined(standardised(parts, self.settings, self.statistics), self.settings)

    def fit(self, texts: Sequence[str], instruction: str = "") -> None:
        """Take the statistics of `standardise="fitted"` from these texts, at least two."""
        self.statistics = Statistics.of(self.parts(texts, instruction))

    def parts(self, texts: Sequence[str], instruction: str = "") -> Parts:
        """Hidden states (N, D) and routing weights (N, W), raw."""
        prefix = self.settings.instructed(instruction)
        prompts = [self.tokens(text, prefix) for text in texts]
        unique = sorted(dict.fromkeys(map(tuple, prompts)), key=len, reverse=True)
        if not unique:
            raise UserError("there is no text to embed")
        with decided_by(self.model, causal=self.settings.causal) as self._causal, self.executed.counting():
            self.require_independence(self.settings.batch_size, causal=self._causal)
            done = self._read(unique)
        row_of = {ids: row for row, ids in enumerate(unique)}
        return done[torch.tensor([row_of[tuple(ids)] for ids in prompts])]

    def record(self) -> RoutingRecord:
        """The routing so far."""
        return self.executed.record(causal=self._causal)

    @property
    def limit(self) -> int | None:
        """Most tokens of a prompt."""
        context = subject_of(self.model).context
        return min((each for each in (self.settings.max_length, context) if each is not None), default=None)

    @property
    def deciding(self) -> list[Router]:
        """The routers whose logits are read: all that do not repeat another's decision."""
        return [site.router for site in router_sites(self.model) if not site.reuses]

    @property
    def width(self) -> int:
        """Z."""
        routing = sum(router.num_experts for router in self.deciding)
        hidden = int(self.model.config.get_text_config().hidden_size)
        return {"hs": hidden, "rw": routing}.get(self.settings.kind, hidden + routing)

    @property
    def pad_id(self) -> int:
        """The token id of padding."""
        known = (self.settings.pad_id, self.tokenizer.pad_token_id, 0)
        return next(int(each) for each in known if each is not None)

    @torch.no_grad()
    def _read(self, prompts: Sequence[tuple[int, ...]]) -> Parts:
        was_training, size = self.model.training, self.settings.batch_size
        self.model.eval()
        try:
            done = [self._read_batch(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        finally:
            self.model.train(was_training)
        return Parts(torch.cat([p.hidden_ND for p in done]), torch.cat([p.routing_NW for p in done]))

    def _read_batch(self, prompts: Sequence[tuple[int, ...]]) -> Parts:
        ids_BS, mask_BS = padded(prompts, self.pad_id, "left")
        device = self.model.device
        return read_last_token(self.model, ids_BS.to(device), mask_BS.to(device), routing=self.settings.reads_routing)

    def tokens(self, text: str, prefix: str = "") -> list[int]:
        """Token ids of a text's prompt; the text loses its end where the prompt would be too long."""
        ids = self._ids(self.settings.render(text, prefix))
        limit = self.limit
        while limit is not None and len(ids) > limit:
            if not text:
                raise UserError(f"{limit} tokens do not hold the template alone ({len(ids)} tokens)")
            text = text[: int(len(text) * limit / len(ids))] if len(ids) > limit + 8 else text[:-1]
            ids = self._ids(self.settings.render(text, prefix))
        return ids

    def _ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt, return_attention_mask=False)["input_ids"])

    def require_independence(self, batch_size: int, *, causal: bool) -> None:
        """Raise `UserError` if texts of one batch would influence each other's embeddings."""
        if causal or batch_size == 1:
            return
        for rule in rules_of(self.model):
            if not rule.batch_invariant:
                raise UserError(
                    f"{rule.name} lets the texts of a batch influence each other, so an embedding would depend on "
                    "its neighbours; use batch_size 1, a rule per sequence, or the decode twin (causal)"
                )
