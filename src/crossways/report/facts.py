"""What the page says about the study as a whole: size, protocol, machines, and what does not match."""

from __future__ import annotations

from collections.abc import Sequence

from crossways.study.record import RunRecord
from crossways.study.spread import scaled


def meta_line(records: Sequence[RunRecord]) -> list[str]:
    """Short facts for under the title, such as "7 variants" and "14 runs, 2 seeds each"."""
    variants = len({record.variant for record in records})
    counts = sorted({sum(r.variant == record.variant for r in records) for record in records})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tokens = sorted({record.training.tokens for record in records})
    hours = sum(record.training.wall_seconds for record in records) / 3600
    show = scaled()
    spans = " to ".join(show(t, t) for t in dict.fromkeys((tokens[0], tokens[-1])))
    return [
        f"{variants} variant{'s' * (variants != 1)}",
        f"{len(records)} run{'s' * (len(records) != 1)}, {seeds} seed{'s' * (seeds != '1')} per variant",
        f"{spans} training tokens per run",
        f"{hours * 60:.0f} min of training" if hours < 2 else f"{hours:.1f} h of training",
    ]


def warnings(records: Sequence[RunRecord]) -> list[str]:
    """What makes the figures of this page hard to compare; empty when nothing does."""
    found = []
    if len({record.evaluation.protocol for record in records}) > 1:
        found.append("The runs were evaluated under different protocols; compare only those of the same protocol.")
    if len({record.training.tokens for record in records}) > 1:
        found.append("The runs did not see the same number of training tokens.")
    seeds: dict[str, set[int]] = {}
    for record in records:
        seeds.setdefault(record.variant, set()).add(record.seed)
    if len(set(map(frozenset, seeds.values()))) > 1:
        found.append("Not every variant has a finished run for every seed.")
    return found


def protocols(records: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each distinct protocol with the variants it was used for, as (name, value) pairs."""
    labels: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for record in records:
        p = record.evaluation.protocol
        facts = (
            ("Window, stride", f"{p.window:,} tokens, {p.stride:,} tokens"),
            ("Text", f"{p.documents:,} documents, {p.tokens:,} tokens, {p.bytes:,} bytes"),
            ("Document boundaries", p.boundaries),
            ("Batch", f"{p.batch_size} windows, {p.dtype}, experts computed by {p.experts_backend}"),
        )
        known = labels.setdefault(facts, [])
        if record.label not in known:
            known.append(record.label)
    return [(", ".join(names), list(facts)) for facts, names in labels.items()]


def environments(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Each environment entry with its distinct values over the runs, and each recipe digest."""
    values: dict[str, list[str]] = {}
    for record in records:
        for key, value in (*record.environment.items(), ("recipe digest", record.recipe_digest)):
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    return [(key, _few(known)) for key, known in values.items()]


def _few(values: Sequence[str], most: int = 4) -> str:
    shown = "; ".join(values[:most])
    return shown if len(values) <= most else f"{shown}; and {len(values) - most} more"
