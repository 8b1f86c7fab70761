"""A module of sentence-transformers. Imports that library: import this file only where it is installed.

Legend: B batch, S sequence, Z embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.embeddings.encoder import RoutedEncoder
from crossways.evaluation.embeddings.parts import Statistics, combined, standardised
from crossways.evaluation.embeddings.reader import read_last_token
from crossways.evaluation.embeddings.settings import EmbeddingSettings
from crossways.evaluation.executed import decided_by
from crossways.evaluation.padding import padded
from crossways.surgery.checkpoint import load_causal_lm

SETTINGS_FILE = "crossways_embedding.json"
STATISTICS_FILE = "crossways_embedding_statistics.safetensors"


class RoutedEmbedding(InputModule):
    """The whole of an embedding model: `SentenceTransformer(modules=[RoutedEmbedding(model, tokenizer, settings)])`.

    Saved, it is the model's own checkpoint with the settings and statistics beside it. `load_sentence_transformer`
    loads that; `SentenceTransformer(folder)` wants `trust_remote_code=True`, as for any module that is not its own.
    """

    save_in_root = True

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: EmbeddingSettings | None = None
    ) -> None:
        """
        Args:
            model: as for `RoutedEncoder`.
            tokenizer: the model's.
            settings: the protocol; the batch size is that of `SentenceTransformer.encode`.

        Raises:
            UserError: for `standardise="batch"`: sentence-transformers sorts texts by length into batches of its own,
                so such statistics would mean nothing.
        """
        super().__init__()
        settings = settings or EmbeddingSettings()
        if settings.standardise == "batch" and settings.kind != "hs":
            raise UserError("an embedding module cannot standardise by batches; fit statistics, or use none")
        self.model, self.tokenizer = model, tokenizer
        self.encoder = RoutedEncoder(model, tokenizer, settings)

    def fit(self, texts: list[str]) -> None:
        """Take statistics for `standardise="fitted"`; they are saved with the module."""
        self.encoder.fit(texts)

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Token ids and attention mask of prompts, left-padded; a prompt of sentence-transformers precedes the text
        inside the template."""
        prompts = [self.encoder.tokens(text, prompt or "") for text in inputs]
        ids_BS, mask_BS = padded(prompts, self.encoder.pad_id, "left")
        return {"input_ids": ids_BS, "attention_mask": mask_BS}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`, float32 (B, Z). For inference: no gradient reaches the model."""
        encoder, settings = self.encoder, self.encoder.settings
        with torch.no_grad(), decided_by(self.model, causal=settings.causal) as causal:
            encoder.require_independence(len(features["input_ids"]), causal=causal)
            parts = read_last_token(
                self.model, features["input_ids"], features["attention_mask"], routing=settings.reads_routing
            )
        embedding_BZ = combined(standardised(parts, settings, encoder.statistics), settings)
        return features | {"sentence_embedding": embedding_BZ.to(features["input_ids"].device)}

    def get_embedding_dimension(self) -> int:
        """Z."""
        return self.encoder.width

    @property
    def max_seq_length(self) -> int | None:
        """Most tokens of a prompt; None for no limit."""
        return self.encoder.limit

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the model's checkpoint, rule included, its tokenizer, the settings and any statistics."""
        self.model.save_pretrained(output_path)
        self.encoder.tokenizer.save_pretrained(output_path)
        folder = Path(output_path)
        (folder / SETTINGS_FILE).write_text(self.encoder.settings.model_dump_json(indent=1), encoding="utf-8")
        if self.encoder.statistics is not None:
            save_file(self.encoder.statistics.state(), folder / STATISTICS_FILE)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:  # type: ignore[override]
        """What `save` wrote, from a folder."""
        folder = Path(model_name_or_path) / subfolder
        if not (folder / SETTINGS_FILE).is_file():
            raise UserError(f"{folder} holds no saved embedding model: there is no {SETTINGS_FILE} in it")
        text = (folder / SETTINGS_FILE).read_text(encoding="utf-8")
        module = cls(*load_causal_lm(folder), EmbeddingSettings.model_validate_json(text))
        if (folder / STATISTICS_FILE).is_file():
            module.encoder.statistics = Statistics(**load_file(folder / STATISTICS_FILE))
        return module


def sentence_transformer(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: EmbeddingSettings | None = None
) -> SentenceTransformer:
    """A `SentenceTransformer` of one module, compared by cosine."""
    return SentenceTransformer(
        modules=[RoutedEmbedding(model, tokenizer, settings)],
        similarity_fn_name="cosine",
        device=str(model.device),
    )


def load_sentence_transformer(folder: str | Path, device: str | None = None) -> SentenceTransformer:
    """A saved one, without running code that the folder names."""
    return SentenceTransformer(
        modules=[RoutedEmbedding.load(str(folder))], similarity_fn_name="cosine", device=device
    )
