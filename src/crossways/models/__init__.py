"""The Hugging Face native model. `register` makes the Auto classes know it."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from crossways.models.configuration import CrosswaysConfig
from crossways.models.modeling import CrosswaysForCausalLM, CrosswaysModel

__all__ = ["CrosswaysConfig", "CrosswaysForCausalLM", "CrosswaysModel", "register"]


def register() -> None:
    """Register config and model classes with transformers' Auto classes. Idempotent."""
    AutoConfig.register(CrosswaysConfig.model_type, CrosswaysConfig, exist_ok=True)
    AutoModel.register(CrosswaysConfig, CrosswaysModel, exist_ok=True)
    AutoModelForCausalLM.register(CrosswaysConfig, CrosswaysForCausalLM, exist_ok=True)
