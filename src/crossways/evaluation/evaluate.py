"""Evaluate a model on a corpus: perplexity with its protocol, the causal twin's beside it, and robustness.

Legend: R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crossways.evaluation.perplexity import Likelihood, score_batches
from crossways.evaluation.settings import EvaluationSettings, fitted
from crossways.evaluation.subject import subject_of
from crossways.experts import resolve_backend
from crossways.gates import Linear, build_gate
from crossways.models import CrosswaysConfig
from crossways.perturb import DisableTop, perturbed
from crossways.rules.registry import describe
from crossways.rules.score import Score, build_score
from crossways.rules.select import Selection, build_selection
from crossways.sharing import PerLayer, build_sharing
from crossways.study.record import DisabledExpert, Evaluation, ExpertLoad, Protocol
from crossways.surgery.handle import handle_of
from crossways.training.corpus import Corpus, utf8_length
from crossways.training.packing import token_counts
from crossways.training.tokenizer import encode_documents
from crossways.training.unigram import unigram_bits_per_byte
from crossways.training.windows import EvaluationWindows, batch_windows, evaluation_windows


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, and the loads seen while making it."""

    evaluation: Evaluation
    expert_load: tuple[ExpertLoad, ...]
    """Share of executed pairs per expert, for each of the R routers."""
    load_imbalance: float | None
    """Mean over routers of greatest load over mean load; 1 is even, E is one expert taking all. None if dense."""


def evaluate_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: EvaluationSettings,
    cache_dir: Path,
) -> Evaluated:
    """Score the corpus' validation documents under every condition the settings ask for.

    Args:
        model: a causal language model, dense or routed, of crossways or of transformers.
        tokenizer: the one it was trained with.
        corpus: validation documents to score; training documents give the unigram floor.
        settings: the protocol.
        cache_dir: where tokenised text is kept.

    Raises:
        UserError: a window longer than the model's context, or a decode twin that was never estimated.
    """
    subject = subject_of(model)
    settings = fitted(settings, subject.context)
    windows = _windows(tokenizer, corpus, settings)
    dtype = getattr(torch, settings.dtype)

    def score(*, causal: bool = False, disable: DisableTop | None = None) -> Likelihood:
        batches = batch_windows(windows.windows, settings.batch_size, pad_id=tokenizer.eos_token_id)
        with perturbed(model, disable) if disable else nullcontext():
            return score_batches(model, batches, causal=causal, dtype=dtype)

    normal = score()
    reason = leak_reason_of(model)
    twin = score(causal=True) if reason else None
    floor = unigram_bits_per_byte(
        token_counts(corpus, tokenizer, len(tokenizer), cache_dir),
        islice(encode_documents(tokenizer, corpus.validation), windows.num_documents),
        islice(map(utf8_length, corpus.validation), windows.num_documents),
    )
    return Evaluated(
        evaluation=Evaluation(
            protocol=_protocol(model, windows, settings),
            perplexity=normal.perplexity,
            bits_per_byte=normal.bits_per_byte(windows.num_bytes),
            rule=rule_of(model),
            leaky=bool(reason),
            leak_reason=reason,
            causal_perplexity=twin.perplexity if twin else None,
            causal_bits_per_byte=twin.bits_per_byte(windows.num_bytes) if twin else None,
            budget=normal.budget,
            causal_budget=twin.budget if twin else None,
            disabled=_disabled(score, causal=bool(reason)) if subject.routers and settings.disable_top else None,
            unigram_bits_per_byte=floor.bits_per_byte,
        ),
        expert_load=expert_loads(list(subject.routers), normal.expert_load),
        load_imbalance=load_imbalance(normal.expert_load),
    )


def _windows(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: EvaluationSettings) -> EvaluationWindows:
    return evaluation_windows(
        encode_documents(tokenizer, corpus.validation),
        map(utf8_length, corpus.validation),
        settings.window,
        settings.stride or settings.window,
        tokenizer.eos_token_id,
        settings.max_tokens,
    )


def _protocol(model: Any, windows: EvaluationWindows, settings: EvaluationSettings) -> Protocol:
    return Protocol(
        window=settings.window,
        stride=settings.stride or settings.window,
        documents=windows.num_documents,
        tokens=windows.num_tokens,
        bytes=windows.num_bytes,
        boundaries="each document alone, after one end-of-text token",
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        experts_backend=_backend(model, getattr(torch, settings.dtype)),
    )


def _disabled(score: Callable[..., Likelihood], *, causal: bool) -> DisabledExpert:
    # Under the decode twin where there is one, so that it compares with the honest figure, not the leaky one.
    raw, rescaled = (
        score(causal=causal, disable=DisableTop(renormalize=renormalize)).perplexity for renormalize in (False, True)
    )
    return DisabledExpert(raw=raw, renormalized=rescaled)


def _backend(model: Any, dtype: torch.dtype) -> str:
    """What computes the experts; of a model of transformers, its `experts_implementation`."""
    if isinstance(model.config, CrosswaysConfig):
        return resolve_backend(model.config.experts_backend, model.device, dtype)
    return f"transformers {getattr(model.config, '_experts_implementation', None) or 'eager'}"


def rule_of(model: Any) -> str:
    """The routing rule on one line, such as `top_k(k=2) of softmax()`; `dense` without routed layers."""
    if isinstance(model.config, CrosswaysConfig):
        return rule_name(model.config)
    handle = handle_of(model)
    return "dense, or its family's own" if handle is None else handle.describe()


def rule_name(config: CrosswaysConfig) -> str:
    """The routing rule of one of crossways' own models.

    A gate other than one plain matrix is named too, and so are layers that do not each have their own:
    `top_k(k=2) of softmax() of low_rank(rank=4), shared by all()`.
    """
    if not config.routed_layers:
        return "dense"
    gate, sharing = build_gate(config.gate), build_sharing(config.sharing)
    rule = f"{describe(_selection(config))} of {describe(build_score(config.score))}"
    if gate != Linear():
        rule += f" of {describe(gate)}"
    return rule if sharing == PerLayer() else f"{rule}, shared by {describe(sharing)}"


def leak_reason(config: CrosswaysConfig) -> str:
    """Why the rule's perplexity flatters, in words; empty for a causal, batch-invariant rule or a dense model."""
    if not config.routed_layers or config.causal_routing:
        return ""
    return _leak_of([_selection(config), build_score(config.score)])


def leak_reason_of(model: Any) -> str:
    """The same of any model."""
    if isinstance(model.config, CrosswaysConfig):
        return leak_reason(model.config)
    handle = handle_of(model)
    if handle is None or handle.always_causal:
        return ""
    routers = handle.routers.values()
    return _leak_of([rule for router in routers for rule in (router.select, router.score)])


def _leak_of(rules: Sequence[Selection | Score]) -> str:
    reasons = [] if all(rule.causal for rule in rules) else ["a token's experts depend on later tokens"]
    if not all(rule.batch_invariant for rule in rules):
        reasons.append("a token's experts depend on other rows of the batch")
    return "; ".join(reasons)


def _selection(config: CrosswaysConfig) -> Selection:
    return build_selection(config.select or "top_k")


def load_imbalance(expert_load: tuple[Tensor, ...]) -> float | None:
    """Mean over routers of greatest over mean load, from (E,) pair counts; None without routers."""
    if not expert_load:
        return None
    ratios = [float(load_E.max() / load_E.double().mean()) for load_E in expert_load]
    return sum(ratios) / len(ratios)


def expert_loads(names: Sequence[str], expert_load: tuple[Tensor, ...]) -> tuple[ExpertLoad, ...]:
    """Name each router's load and scale it to sum to one."""
    return tuple(
        ExpertLoad(router=name, load=tuple((load_E.double() / load_E.sum()).tolist()))
        for name, load_E in zip(names, expert_load, strict=True)
    )
