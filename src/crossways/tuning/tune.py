"""`tune`: measure, choose, confirm, save."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.settings import EvaluationSettings, fitted
from crossways.evaluation.subject import subject_of
from crossways.models import CrosswaysConfig
from crossways.study.lock import locked
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute
from crossways.training.corpus import Corpus
from crossways.tuning.bench import Bench
from crossways.tuning.check import check_in_fresh_process, save_text
from crossways.tuning.choose import choose, why_none
from crossways.tuning.confirm import confirm, why_not
from crossways.tuning.cost import PairCosts, pair_costs
from crossways.tuning.families import FAMILIES, Family, OwnRouting, own_routing
from crossways.tuning.frontier import all_settings, measure, own_setting, sensitivities_of
from crossways.tuning.page import write_page
from crossways.tuning.result import CHECKPOINT, PAGE, WINDOWS, TuningResult, write_evidence
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
    families = tuple(FAMILIES[name] for name in settings.families)
    out = Path(out)
    with locked(out, "tuning"), _evaluating(model):
        own, costs = _read(model)
        protocol = fitted(protocol, subject_of(model).context)
        families = tuple(family for family in families if family.applies(own))
        if all(family.leaky for family in families):
            raise UserError(
                f"of tuning.families {settings.families} none may be chosen: USMoE's global budget looks at later "
                "tokens, and weights are kept anyway by a model that does not scale them to sum to one; add another"
            )
        texts = make_texts(tokenizer, corpus, protocol, settings)
        job = _Job(model, tokenizer, texts, families, own, costs, limit, settings, protocol, out)
        bench, result = _measure(job, console)
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)  # of an earlier choice, which this one replaces
        if result.chosen is not None and not result.reason:
            result = _save(job, bench, result, verify=verify)
        write_evidence(result, out)
        write_page(result, out / PAGE)
        return result


@dataclass(frozen=True)
class _Job:
    """What a tuning works on."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    families: tuple[Family, ...]
    own: OwnRouting
    costs: PairCosts
    limit: LossLimit
    settings: TuningSettings
    protocol: EvaluationSettings
    out: Path


def _measure(job: _Job, console: Console | None) -> tuple[Bench, TuningResult]:
    """Everything but times and the checkpoint."""
    settings, texts, costs = job.settings, job.texts, job.costs
    common = {"model": model_digest(job.model), "dtype": job.protocol.dtype, "device": str(job.model.device)}
    store = Store(job.out / "measured", common)
    with _progress(console, _steps(job)) as advance:
        bench = Bench(job.model, store, texts.calibration, getattr(torch, job.protocol.dtype), advance)
        sensitivities = sensitivities_of(bench, job.families, job.own, settings, texts.sensitivity)
        original = measure(bench, own_setting(job.own), texts.tuning, costs, None, settings)
        tried = all_settings(job.families, job.own, settings, sensitivities, costs)
        points = tuple(measure(bench, each, texts.tuning, costs, original.scored, settings) for each in tried)
        chosen = choose(points, original, job.limit)
        reason, confirmation = why_none(points, original, job.limit) if chosen is None else "", None
        if chosen is not None:
            confirmation = confirm(bench, original, chosen, texts.confirmation, costs, job.limit, settings)
            reason = why_not(confirmation, job.limit)
    return bench, TuningResult(
        model=str(getattr(job.model, "name_or_path", "") or type(job.model).__name__),
        own=job.own,
        limit=job.limit,
        costs=costs,
        original=original,
        points=points,
        sensitivities=sensitivities,
        chosen=chosen,
        reason=reason,
        confirmation=confirmation,
        timing=None,
        checkpoint=None,
        reload=None,
        protocol=_facts(job),
    )


def _save(job: _Job, bench: Bench, result: TuningResult, *, verify: bool) -> TuningResult:
    """Time the choice, write it, and let a fresh process load it."""
    assert result.chosen is not None
    rule, estimates = result.chosen.setting.rule, result.chosen.estimates
    text = job.texts.confirmation
    timing = time_both(bench, rule, estimates, text, job.settings) if job.settings.rounds else None
    with bench.routed(rule, estimates):
        job.model.save_pretrained(job.out / CHECKPOINT)
    job.tokenizer.save_pretrained(job.out / CHECKPOINT)
    save_text(text, job.out / WINDOWS)
    result = replace(result, timing=timing, checkpoint=job.out / CHECKPOINT)
    write_evidence(result, job.out)  # the fresh process reads it
    return replace(result, reload=check_in_fresh_process(job.out)) if verify else result


def _read(model: Any) -> tuple[OwnRouting, PairCosts]:
    """What the model does by itself; any rerouting is undone."""
    if isinstance(getattr(model, "config", None), CrosswaysConfig):
        raise UserError(
            "this is one of crossways' own models, whose budget is a setting of its configuration; convert it to a "
            "family of transformers first (crossways export)"
        )
    attached = handle_of(model)
    if attached is not None:
        attached.undo()
    with reroute(model, "own") as handle:
        return own_routing(handle), pair_costs(model)


def _facts(job: _Job) -> dict[str, Any]:
    """How it is measured."""
    model, protocol = job.model, job.protocol
    sizes = {
        name: {"documents": len(text.token_D), "tokens": text.tokens, "digest": text.digest}
        for name, text in vars(job.texts).items()
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
        "settings": job.settings.model_dump(mode="json"),
        "conditions": conditions,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _steps(job: _Job) -> int:
    """About how many measurements there will be."""
    own, settings = job.own, job.settings
    steps = 3  # the original, and two confirmations
    for family in dict.fromkeys(FAMILIES[family.sensitivities_of or family.name] for family in job.families):
        steps += 1 + family.calibrated + sum(len(level_budgets(family, k, settings.levels)) for k in own.k_L)
    cut = sum(share < 1 for share in settings.budgets)
    for family in job.families:
        uniform = max(own.k_L) - 1 if family.integral else len(settings.budgets)
        steps += (uniform + cut) * (1 + family.calibrated)
    return steps


@contextmanager
def _progress(console: Console | None, steps: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; in a log, a line for each tenth."""
    terminal = console is not None and console.is_terminal
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not terminal) as bar:
        task, done = bar.add_task("measuring", total=steps), 0

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if console is not None and not terminal and 10 * done // steps > 10 * (done - 1) // steps:
                console.print(f"{done} of about {steps} measurements", highlight=False)

        yield advance
        bar.update(task, completed=steps)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
