"""What a study would do: the resolved recipe, and what each variant comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from crossways.study.publish import recipe_text
from crossways.study.recipe import Recipe
from crossways.study.resolve import ResolvedVariant, resolve


def describe_recipe(recipe: Recipe, only: Sequence[str] | None = None) -> str:
    """YAML: the recipe with all defaults, and under `resolved` the solved widths, parameters and operations.

    Raises:
        UserError: as `resolve` does.
    """
    variants = {name: v for name, v in resolve(recipe).items() if only is None or name in only}
    resolved = {name: _facts(recipe, variant) for name, variant in variants.items()}
    return recipe_text(recipe) + yaml.safe_dump({"resolved": resolved}, sort_keys=False, width=110)


def _facts(recipe: Recipe, variant: ResolvedVariant) -> dict[str, Any]:
    config, parameters = variant.config(), variant.parameters
    widths: dict[str, int] = {}
    if len(config.routed_layers) < config.num_hidden_layers:
        widths["intermediate_size"] = config.intermediate_size
    if config.routed_layers:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
        widths["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    training = variant.training
    windows = training.max_steps * training.batch_size * training.gradient_accumulation_steps
    tokens = windows * training.sequence_length
    return {
        "widths": widths,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "router": parameters.router,
            "total_non_embedding": parameters.total_non_embedding,
            "active_non_embedding": parameters.active_non_embedding,
        },
        "training_flops_per_token": round(variant.training_flops_per_token),
        "training_tokens_per_run": tokens,
        "training_flops_per_run": float(f"{variant.training_flops_per_token * tokens:.4g}"),
    }
