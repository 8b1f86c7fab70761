"""The encoder that mteb evaluates. Imports mteb: import this file only where that is installed.

Legend: N texts, Z embedding width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from crossways.evaluation.embeddings.encoder import RoutedEncoder

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class MtebEncoder(AbsEncoder):
    """`RoutedEncoder` by mteb's `EncoderProtocol`: `mteb.evaluate(MtebEncoder(encoder), tasks)`."""

    def __init__(self, encoder: RoutedEncoder, name: str = "crossways/model", revision: str = "local") -> None:
        """
        Args:
            encoder: what embeds.
            name: how results call the model; mteb wants an organization and a slash in it.
            revision: likewise.
        """
        self.encoder = self.model = encoder
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name if "/" in name else f"local/{name}",
                "revision": revision,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Embeddings float32 (N, Z) of the texts of a data loader, in its order.

        Batches are the encoder's own, not the loader's, and so is the batch size. The task's instruction is used if
        the encoder's settings say how.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = "" if self.encoder.settings.instruction == "none" else self.asked(task_metadata, prompt_type)
        return self.encoder.encode(texts, instruction).numpy()

    def asked(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The task's instruction; empty for a task that is not mteb's and names none."""
        if task_metadata.prompt is None and task_metadata.dataset["path"] == "local":
            return ""
        return self.get_instruction(task_metadata, prompt_type)
