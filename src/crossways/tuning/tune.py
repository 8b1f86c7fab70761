"""`tune`: measure, choose, confirm, save."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.settings import EvaluationSettings
from crossways.evaluation.subject import subject_of
from crossways.models import CrosswaysConfig
from crossways.study.lock import locked
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute
from crossways.training.corpus import Corpus
from crossways.tuning.bench import Bench
from crossways.tuning.check import check_in_fresh_process, save_text
from crossways.tuning.choose import choose, verdict_of, why_none
from crossways.tuning.compare import paired_difference
from crossways.tuning.cost import PairCosts, pair_costs
from crossways.tuning.families import FAMILIES, Family, OwnRouting, own_routing
from crossways.tuning.frontier import Point, all_settings, measure, own_setting, sensitivities_of
from crossways.tuning.page import write_page
from crossways.tuning.result import CHECKPOINT, PAGE, WINDOWS, Confirmation, TuningResult, write_evidence
from crossways.tuning.sensitivity import level_budgets
from crossways.tuning.settings import LossLimit, TuningSettings, loss_limit
from crossways.tuning.store import Store, model_digest
from crossways.tuning.texts import Texts, make_texts
from crossways.tuning.timing import time_both


def tune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    out: str | Path,
    *,
    max_loss: str = "1%",
    settings: TuningSettings | None = None,
    protocol: EvaluationSettings | None = None,
    verify: bool = True,
    console: Console | None = None,
) -> TuningResult:
    """Find the cheapest routing of a pretrained model within a stated loss of quality, and save it.

    1. Each layer's sensitivity: the loss when its budget alone is cut, on training text.
    2. The frontier: each family of rules, with uniform budgets and with budgets spent by those sensitivities, is
       calibrated on training text and scored on one half of the validation documents.
    3. The choice, on that text: of the settings that execute fewer expert FLOPs and whose loss is within the limit by
       its upper bound (paired bootstrap over documents), the cheapest. None may qualify.
    4. The confirmation, on the other half, which nothing was chosen by. A choice that it contradicts is not saved.
    5. Wall time, original against chosen; the checkpoint; and the checkpoint again, in a fresh process.

    Every measurement is kept in `out`, so that a killed run goes on where it stopped.

    Args:
        model: a routed model of transformers, changed only in between. A rerouted one is undone first, and stays so:
            the baseline is the family's own routing.
        tokenizer: its own.
        corpus: text to calibrate on and to hold out.
        out: folder for the checkpoint (`model`), `frontier.json`, `frontier.csv` and `report.html`.
        max_loss: how much worse the model may get, of perplexity (`1%`) or in nats per token (`0.01nats`).
        settings: what to try and how sure to be.
        protocol: windows and batches of the perplexity.
        verify: load the checkpoint in a fresh process and compare.
        console: where progress goes; default none.

    Raises:
        UserError: a model without routing that can be changed, a limit that cannot be read, too little text, budgets
            below the measured levels, another tuning at work in `out`.
    """
    settings, protocol = settings or TuningSettings(), protocol or EvaluationSettings()
    limit = loss_limit(max_loss)
    families = [FAMILIES[name] for name in settings.families]
    if all(family.leaky for family in families):
        raise UserError(f"tuning.families {settings.families} are all leaky, and none of them may be chosen; add one")
    out = Path(out)
    with locked(out, "tuning"):
        return _tune(model.eval(), tokenizer, corpus, out, limit, families, settings, protocol, verify, console)


def _tune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    out: Path,
    limit: LossLimit,
    families: Sequence[Family],
    settings: TuningSettings,
    protocol: EvaluationSettings,
    verify: bool,
    console: Console | None,
) -> TuningResult:
    own, costs = _read(model, protocol)
    texts = make_texts(tokenizer, corpus, protocol, settings)
    dtype = getattr(torch, protocol.dtype)
    common = {"model": model_digest(model), "dtype": protocol.dtype, "device": str(model.device)}
    with _bar(console, _steps(families, own, settings)) as advance:
        bench = Bench(model, Store(out / "measured", common), texts.calibration, dtype, advance)
        sensitivities = sensitivities_of(bench, families, own, settings, texts.sensitivity)
        original = measure(bench, own_setting(own), texts.tuning, costs, None, settings)
        tried = all_settings(families, own, settings, sensitivities, costs)
        points = [measure(bench, each, texts.tuning, costs, original.scored, settings) for each in tried]
        chosen = choose(points, original, limit)
        confirmation = _confirm(bench, original, chosen, texts, costs, limit, settings) if chosen else None
    result = TuningResult(
        model=str(getattr(model, "name_or_path", "") or type(model).__name__),
        own=own,
        limit=limit,
        costs=costs,
        original=original,
        points=tuple(points),
        sensitivities=sensitivities,
        chosen=chosen,
        reason=_reason(points, original, confirmation, limit),
        confirmation=confirmation,
        timing=None,
        checkpoint=None,
        reload=None,
        protocol=_protocol(model, texts, settings, protocol),
    )
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)  # of an earlier choice, which this one replaces
    if chosen is not None and not result.reason:
        result = _save(bench, tokenizer, texts, chosen, result, settings, out, verify=verify)
    write_evidence(result, out)
    write_page(result, out / PAGE)
    return result


def _read(model: Any, protocol: EvaluationSettings) -> tuple[OwnRouting, PairCosts]:
    """What the model does by itself; any rerouting is undone."""
    if isinstance(getattr(model, "config", None), CrosswaysConfig):
        raise UserError(
            "this is one of crossways' own models, whose budget is a setting of its configuration; convert it to a "
            "family of transformers first (crossways export)"
        )
    attached = handle_of(model)
    if attached is not None:
        attached.undo()
    context = subject_of(model).context
    if context is not None and protocol.window > context:
        raise UserError(f"evaluation.window {protocol.window} exceeds the model's context of {context}")
    with reroute(model, "own") as handle:
        return own_routing(handle), pair_costs(model)


def _confirm(
    bench: Bench,
    original: Point,
    chosen: Point,
    texts: Texts,
    costs: PairCosts,
    limit: LossLimit,
    settings: TuningSettings,
) -> Confirmation:
    before, after = (
        bench.score(point.setting.rule, point.estimates, texts.confirmation) for point in (original, chosen)
    )
    difference = paired_difference(
        after, before, confidence=settings.confidence, resamples=settings.resamples, seed=settings.seed
    )
    return Confirmation(
        original=before,
        chosen=after,
        difference=difference,
        original_flops=costs.per_token(before.executed_L),
        chosen_flops=costs.per_token(after.executed_L),
        verdict=verdict_of(difference, limit),
    )


def _reason(points: Sequence[Point], original: Point, confirmation: Confirmation | None, limit: LossLimit) -> str:
    if confirmation is None:
        return why_none(points, original, limit)
    if confirmation.verdict != "contradicted":
        return ""
    return (
        f"the choice was not borne out: on other text it loses {confirmation.difference.nats:.4f} nats per token, "
        f"beyond {limit.text} ({limit.nats:.4f}); choose on more text (tuning.tuning_tokens) or with more confidence"
    )


def _save(
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    chosen: Point,
    result: TuningResult,
    settings: TuningSettings,
    out: Path,
    *,
    verify: bool,
) -> TuningResult:
    rule, estimates = chosen.setting.rule, chosen.estimates
    timing = time_both(bench, rule, estimates, texts.confirmation, settings) if settings.rounds else None
    with bench.routed(rule, estimates):
        bench.model.save_pretrained(out / CHECKPOINT)
    tokenizer.save_pretrained(out / CHECKPOINT)
    save_text(texts.confirmation, out / WINDOWS)
    result = replace(result, timing=timing, checkpoint=out / CHECKPOINT)
    write_evidence(result, out)  # the fresh process reads it
    return replace(result, reload=check_in_fresh_process(out)) if verify else result


def _protocol(model: Any, texts: Texts, settings: TuningSettings, protocol: EvaluationSettings) -> dict[str, Any]:
    sizes = {
        name: {"documents": len(text.token_D), "tokens": text.tokens, "digest": text.digest}
        for name, text in vars(texts).items()
    }
    conditions = {
        "threads": torch.get_num_threads(),
        "experts": getattr(model.config, "_experts_implementation", None) or "eager",
        "device": str(model.device),
        "dtype": protocol.dtype,
    }
    return {
        "window": protocol.window,
        "stride": protocol.stride or protocol.window,
        "batch_size": protocol.batch_size,
        "boundaries": "each document alone, after one end-of-text token",
        "texts": sizes,
        "settings": settings.model_dump(mode="json"),
        "conditions": conditions,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _steps(families: Sequence[Family], own: OwnRouting, settings: TuningSettings) -> int:
    """About how many measurements there will be."""
    measured = dict.fromkeys(FAMILIES[family.sensitivities_of or family.name] for family in families)
    steps = 3  # the original, and two confirmations
    for family in measured:
        steps += 1 + family.calibrated + sum(len(level_budgets(family, k, settings.levels)) for k in own.k_L)
    cut = sum(share < 1 for share in settings.budgets)
    for family in families:
        uniform = max(own.k_L) - 1 if family.integral else len(settings.budgets)
        steps += (uniform + cut) * (1 + family.calibrated)
    return steps


@contextmanager
def _bar(console: Console | None, steps: int) -> Iterator[Any]:
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None or not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=steps)
        yield lambda: bar.advance(task)
        bar.update(task, completed=steps)
