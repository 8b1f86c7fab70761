"""`crossways eval`: a saved model and a corpus in, a table and a JSON file out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossways.evaluation.evaluate import Evaluated, evaluate_model
from crossways.evaluation.settings import EvaluationSettings, fitted
from crossways.evaluation.subject import subject_of
from crossways.settings import Settings
from crossways.study.atomic import write_text_atomic
from crossways.study.load import apply_overrides, load_recipe, validated
from crossways.surgery.checkpoint import load_causal_lm
from crossways.surgery.handle import handle_of
from crossways.training.corpus import CorpusSettings, load_corpus


class EvaluationRequest(Settings):
    """The part of a recipe that an evaluation reads."""

    corpus: CorpusSettings = CorpusSettings()
    """The text; its validation documents are scored."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split into training and validation documents."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """The perplexity protocol."""

    def for_context(self, context: int | None) -> EvaluationRequest:
        """With a window that a model of this context can read; raises `UserError` if a longer one was asked for."""
        return self.model_copy(update={"evaluation": fitted(self.evaluation, context)})


def evaluate_checkpoint(
    checkpoint: Path,
    out: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    causal: bool = False,
    console: Console | None = None,
) -> Evaluated:
    """Evaluate a saved model, print the figures and write them to `out`.

    Args:
        checkpoint: folder made by `save_pretrained` of model and tokenizer.
        out: JSON file.
        recipe: where corpus and protocol come from; default the study the model was trained in, if it was.
        overrides: `dotted.key=value` for corpus, split_seed and evaluation.
        causal: route by the decode twin.
        console: where the table goes.

    Raises:
        UserError: no such model, an impossible protocol, an empty corpus.
    """
    request = requested(checkpoint, recipe, overrides)
    model, tokenizer = load_causal_lm(checkpoint)
    request = request.for_context(subject_of(model).context)
    causal = set_causal(model) if causal else bool(getattr(model.config, "causal_routing", False))
    corpus = load_corpus(request.corpus, request.split_seed)
    evaluated = evaluate_model(model.eval(), tokenizer, corpus, request.evaluation, out.parent / "cache")
    load = [router.model_dump(mode="json") for router in evaluated.expert_load]
    result = {
        "checkpoint": str(checkpoint),
        "settings": request.model_dump(mode="json"),
        "causal_routing": causal,
        "evaluation": evaluated.evaluation.model_dump(mode="json"),
        "load_imbalance": evaluated.load_imbalance,
        "expert_load": load,
    }
    write_text_atomic(out, json.dumps(result, indent=1) + "\n")
    console = console or Console()
    console.print(_table(evaluated, checkpoint))
    console.print(f"written to {out}", highlight=False, soft_wrap=True, markup=False)
    return evaluated


def set_causal(model: Any) -> bool:
    """Make a model route by its decode twins from now on; returns whether it has a routing to speak of."""
    handle = handle_of(model)
    if handle is not None:
        handle.always_causal = True
    elif hasattr(model.config, "causal_routing"):
        model.config.causal_routing = True
    return handle is not None or hasattr(model.config, "causal_routing")


def requested(
    checkpoint: Path, recipe: str | None, overrides: Sequence[str], command: str = "crossways eval"
) -> EvaluationRequest:
    """What to evaluate on: the recipe's, or that of the study the model was trained in, or the defaults; then
    `overrides`. Mistakes are reported in the name of `command`."""
    raw: dict[str, Any] = {}
    settings = checkpoint.parent / "settings.json"
    if recipe is not None:
        loaded = load_recipe(recipe)
        raw = {key: loaded.model_dump()[key] for key in EvaluationRequest.model_fields}
    elif settings.is_file():
        kept = json.loads(settings.read_text(encoding="utf-8"))
        raw = {key: kept[key] for key in EvaluationRequest.model_fields}
        raw["corpus"].pop("content", None)
    return validated(EvaluationRequest, apply_overrides(raw, overrides), command)


def _table(evaluated: Evaluated, checkpoint: Path) -> Table:
    figures, protocol = evaluated.evaluation, evaluated.evaluation.protocol
    disabled = figures.disabled
    rows: list[tuple[str, float | str | None]] = [
        ("rule", figures.rule),
        ("perplexity per token", figures.perplexity),
        ("bits per byte", figures.bits_per_byte),
        ("perplexity, causal decode rule", figures.causal_perplexity),
        ("bits per byte, causal decode rule", figures.causal_bits_per_byte),
        ("experts per token", figures.budget),
        ("perplexity, top-1 expert disabled", disabled.raw if disabled else None),
        ("perplexity, top-1 expert disabled, rescaled", disabled.renormalized if disabled else None),
        ("load imbalance", evaluated.load_imbalance),
        ("bits per byte of a unigram model", figures.unigram_bits_per_byte),
        ("may flatter, because", figures.leak_reason or None),
    ]
    caption = (
        f"{protocol.documents} documents, {protocol.tokens} tokens, {protocol.bytes} bytes; "
        f"window {protocol.window}, stride {protocol.stride}; {protocol.boundaries}; "
        f"{protocol.dtype}; batch {protocol.batch_size}"
    )
    table = Table(title=Text(str(checkpoint)), caption=caption, caption_justify="left", show_header=False)
    for name, value in rows:
        if value is not None:
            table.add_row(name, Text(value if isinstance(value, str) else f"{value:.4g}"))
    return table
