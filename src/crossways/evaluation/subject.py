"""What can be measured: crossways' own models and rerouted ones of transformers, behind one interface.

Legend: B batch, S sequence, V vocabulary, E experts, R routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from crossways.models import CrosswaysForCausalLM
from crossways.router import Router
from crossways.surgery.handle import Handle, handle_of


class Subject(Protocol):
    """A causal language model whose routing can be run, read and calibrated."""

    model: Any

    @property
    def routers(self) -> Mapping[str, Router]:
        """Its R routers by name, in the order of a forward pass; empty for a dense model, and for one of transformers
        that is not rerouted."""

    def run(self, batch: Mapping[str, Tensor], *, causal: bool) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, S, V) of a batch of `input_ids` and `attention_mask`, and the executed pairs of each expert,
        int64 (E,), for each router. `causal` routes by the decode twins."""

    @property
    def context(self) -> int | None:
        """The longest sequence it takes, None if it does not say."""

    def calibrated(self) -> None:
        """Called after the routers' estimates were set."""


class CrosswaysSubject:
    """One of crossways' own models."""

    def __init__(self, model: CrosswaysForCausalLM) -> None:
        self.model = model

    @property
    def routers(self) -> Mapping[str, Router]:
        return dict(zip(self.model.config.router_names, self.model.model.routers, strict=True))

    def run(self, batch: Mapping[str, Tensor], *, causal: bool) -> tuple[Tensor, list[Tensor]]:
        outputs = self.model(
            input_ids=batch["input_ids"],
            attention_mask=_mask(batch["attention_mask"]),
            causal_routing=causal,
            use_cache=False,
        )
        return outputs.logits, list(outputs.expert_load)

    @property
    def context(self) -> int | None:
        return self.model.config.max_position_embeddings

    def calibrated(self) -> None:
        return None


class TransformersSubject:
    """A model of transformers, rerouted or not."""

    def __init__(self, model: Any, handle: Handle | None) -> None:
        self.model, self.handle = model, handle

    @property
    def routers(self) -> Mapping[str, Router]:
        return self.handle.routers if self.handle is not None else {}

    def run(self, batch: Mapping[str, Tensor], *, causal: bool) -> tuple[Tensor, list[Tensor]]:
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": _mask(batch["attention_mask"]),
            "use_cache": False,
        }
        if self.handle is None:
            return self.model(**inputs).logits, []
        with self.handle.causal(on=causal):
            return self.model(**inputs).logits, self.handle.loads()

    @property
    def context(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def calibrated(self) -> None:
        if self.handle is not None:
            self.handle.write_config()


def subject_of(model: Any) -> Subject:
    """The interface to a model."""
    if isinstance(model, CrosswaysForCausalLM):
        return CrosswaysSubject(model)
    return TransformersSubject(model, handle_of(model))


def _mask(attention_mask_BS: Tensor) -> Tensor | None:
    return None if bool(attention_mask_BS.all()) else attention_mask_BS
