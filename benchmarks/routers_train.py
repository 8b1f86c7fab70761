"""Train every listed routing method for a few hundred steps on the embedded corpus and write one table.

    python benchmarks/routers_train.py            # all methods, into docs/routers.md
    python benchmarks/routers_train.py usmoe      # only these; the table keeps the others' rows

A smoke test, not a comparison: the models are tiny, sizes are not matched, and there is one seed. Each finished
method is kept in OUT/<method>.json and not trained again while its configuration and the settings below stay the
same, so the command may be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from crossways.calibrate import CalibrationReport, calibrate
from crossways.evaluation.documents import documents_batches
from crossways.evaluation.evaluate import evaluate_model
from crossways.evaluation.settings import EvaluationSettings
from crossways.methods import find_method, method_config, methods, reference_sizes
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.study.atomic import write_text_atomic
from crossways.training.corpus import Corpus, CorpusSettings, load_corpus
from crossways.training.run import train_model
from crossways.training.settings import TrainingSettings
from crossways.training.tokenizer import TokenizerSettings, load_tokenizer
from crossways.training.trainer import NonFiniteLossError

SEED = 0
CORPUS = CorpusSettings(source="stdlib", max_bytes=3_000_000, max_validation_documents=30)
TOKENIZER = TokenizerSettings(vocab_size=1024)
EVALUATION = EvaluationSettings(window=128, batch_size=16, max_tokens=20_000, disable_top=False)
START, END = "<!-- routers-table: start -->", "<!-- routers-table: end -->"
DEAD = 1e-3
"""An expert that gets less than this share of the mean load is counted as dead."""


def training_settings(steps: int) -> TrainingSettings:
    """The same for all methods."""
    return TrainingSettings(
        max_steps=steps,
        sequence_length=128,
        batch_size=8,
        learning_rate=2e-3,
        logging_steps=10,
        save_steps=10 * steps,
        report_to="none",
    )


def result_of(name: str, steps: int, out: Path) -> dict[str, Any]:
    """One method's row, from its file if that was made with the same settings."""
    corpus = load_corpus(CORPUS, SEED)
    tokenizer = load_tokenizer(TOKENIZER, corpus, out / "cache")
    config = method_config(find_method(name), vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    settings = training_settings(steps)
    # Of the method what the list says, not the whole configuration, so that a new field elsewhere repeats nothing.
    said = [reference_sizes(), find_method(name).model, settings.model_dump(), EVALUATION.model_dump()]
    said += [CORPUS.model_dump(), TOKENIZER.model_dump(), SEED]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
    path = out / f"{name}.json"
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["digest"] == digest:
        return kept
    row = _train(name, config, corpus, tokenizer, settings, out) | {"name": name, "steps": steps, "digest": digest}
    write_text_atomic(path, json.dumps(row, indent=1) + "\n")
    return row


def _train(
    name: str, config: CrosswaysConfig, corpus: Corpus, tokenizer: Any, settings: TrainingSettings, out: Path
) -> dict[str, Any]:
    folder = out / "runs" / name
    try:
        # The trainer prints its log entries; keep them beside the results.
        with (out / f"{name}.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            trained = train_model(
                config, corpus, tokenizer, settings, folder, SEED, cache_dir=out / "cache", progress=False
            )
    except NonFiniteLossError as error:
        return {"diverged": str(error)}
    evaluated = evaluate_model(trained.model.eval(), tokenizer, corpus, EVALUATION, out / "cache")
    figures = evaluated.evaluation
    calibrated = _calibrated(trained.model, corpus, tokenizer)
    shares = [share * len(router.load) for router in evaluated.expert_load for share in router.load]
    return {
        "diverged": "",
        "loss": sum(entry["loss"] for entry in trained.curve[-3:]) / len(trained.curve[-3:]),
        "perplexity": figures.perplexity,
        "causal_perplexity": figures.causal_perplexity,
        "leaky": figures.leaky,
        "budget": figures.budget,
        "causal_budget": figures.causal_budget,
        "dead": sum(share < DEAD for share in shares),
        "experts": len(shares),
        "imbalance": evaluated.load_imbalance,
        "calibrated_perplexity": calibrated.twin_perplexity if calibrated else None,
        "calibrated_budget": statistics.mean(r.twin for r in calibrated.routers) if calibrated else None,
        "seconds": trained.wall_seconds,
    }


def _calibrated(model: CrosswaysForCausalLM, corpus: Corpus, tokenizer: Any) -> CalibrationReport | None:
    """The decode twin with cutoffs set on training text; None for a model without cutoffs."""
    if not any(router.has_cutoff for router in model.model.routers):
        return None
    text, check = (
        documents_batches(documents, tokenizer, EVALUATION, EVALUATION.max_tokens)
        for documents in (corpus.train, corpus.validation)
    )
    return calibrate(model, text, check=check)


def table(rows: list[dict[str, Any]], kept: dict[str, str] | None = None) -> str:
    """Rows as Markdown, in the order of the list of methods; `kept` has lines to use where there is no row. A
    perplexity that may flatter is marked."""
    head = (
        "method",
        "final loss",
        "perplexity",
        "perplexity, decode twin",
        "calibrated twin",
        "experts per token",
        "of the twin",
        "calibrated",
        "dead experts",
        "load imbalance",
        "diverged",
    )
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 2) + "|---|"]
    by_name = (kept or {}) | {row["name"]: _line(row, len(head)) for row in rows}
    order = {name: position for position, name in enumerate(methods())}
    names = sorted(by_name, key=lambda name: order.get(name, len(order)))
    return "\n".join([*lines, *(by_name[name] for name in names)])


def _line(row: dict[str, Any], columns: int) -> str:
    """One row as a line of the table."""
    if row["diverged"]:
        return f"| {row['name']} |" + " |" * (columns - 2) + f" {row['diverged']} |"
    cells = [
        row["name"],
        f"{row['loss']:.3f}",
        f"{row['perplexity']:.2f}" + (" (leaky)" if row["leaky"] else ""),
        _cell(row["causal_perplexity"]),
        _cell(row["calibrated_perplexity"]),
        _cell(row["budget"]),
        _cell(row["causal_budget"]),
        _cell(row["calibrated_budget"]),
        f"{row['dead']} of {row['experts']}",
        _cell(row["imbalance"]),
        "no",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def insert(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table between the page's markers, with the old lines of listed methods that have no row; raises
    `ValueError` if the page has no markers."""
    text = page.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{page} lacks the markers {START} and {END}")
    before, after = text.split(START)[0], text.split(END)[1]
    old = text.split(START)[1].split(END)[0].splitlines()
    listed = {line.split("|")[1].strip(): line for line in old if line.startswith("|")}
    kept = {name: listed[name] for name in methods() if name in listed}
    write_text_atomic(page, f"{before}{START}\n\n{table(rows, kept)}\n\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/routers"))
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "routers.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.methods or methods():
        row = result_of(name, options.steps, options.out)
        print(f"{name}: {row['diverged'] or format(row['perplexity'], '.2f')}", flush=True)
    kept = [options.out / f"{name}.json" for name in methods()]
    insert(options.page, [json.loads(path.read_text(encoding="utf-8")) for path in kept if path.is_file()])


if __name__ == "__main__":
    main()
