"""A model from disk, made ready to be measured: loaded, rerouted if asked, calibrated if asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from crossways.calibrate import calibrate
from crossways.errors import UserError
from crossways.evaluation.documents import documents_batches
from crossways.evaluation.settings import EvaluationSettings, fitted
from crossways.evaluation.subject import subject_of
from crossways.models import CrosswaysConfig
from crossways.rules.registry import nearest
from crossways.surgery.checkpoint import load_causal_lm
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute
from crossways.training.corpus import CorpusSettings, load_corpus

DTYPES = ("float32", "bfloat16", "float16")
"""Of weights."""


def prepared(
    name: str,
    *,
    rule: str | None = None,
    k: float | Sequence[float] | None = None,
    calibrate_on: str | None = None,
    calibrate_tokens: int = 100_000,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model and its tokenizer.

    Args:
        name: folder or hub name: of crossways, of transformers, rerouted or not.
        rule: reroute by this preset; None keeps the rule it was saved with.
        k: experts per token of that preset, one number or one per routed layer.
        calibrate_on: source of text to set the cutoffs of decode twins on.
        calibrate_tokens: how much of it, in whole documents.
        dtype: of the weights, such as bfloat16; None as saved.
        device: where to put the model; None leaves it on the CPU.

    Raises:
        UserError: no such model, or a rule that it cannot have.
    """
    if k is not None and rule is None:
        raise UserError("-k is for --rule: give a preset as well")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{nearest(dtype, list(DTYPES))}; known: {', '.join(DTYPES)}")
    model, tokenizer = load_causal_lm(name, **({"dtype": getattr(torch, dtype)} if dtype else {}))
    if rule is not None:
        if isinstance(model.config, CrosswaysConfig):
            raise UserError(
                f"{name} is one of crossways' own models: its rule is in its configuration; leave out --rule"
            )
        attached = handle_of(model)
        if attached is not None:
            attached.undo()
        reroute(model, rule, k=k)
    model = model.to(device).eval() if device else model.eval()
    if calibrate_on is not None:
        calibrate_model(model, tokenizer, calibrate_on, calibrate_tokens)
    return model, tokenizer


def calibrate_model(model: Any, tokenizer: PreTrainedTokenizerBase, source: str, tokens: int) -> None:
    """Set the cutoffs of a model's decode twins on the training documents of a corpus."""
    text = load_corpus(CorpusSettings(source=source), 0)
    protocol = fitted(EvaluationSettings(), subject_of(model).context)
    batches = documents_batches(text.train, tokenizer, protocol, tokens)
    check = documents_batches(text.validation, tokenizer, protocol, protocol.window)
    calibrate(model, batches, check=check)


def numbers(text: str | None) -> float | list[float] | None:
    """One number, or several with commas, of an option."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"-k {text!r}: expected a number, or numbers separated by commas") from error
    return found if "," in text else found[0]
