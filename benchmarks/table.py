"""The one table: jobs that give its rows, rows that outlive a run that is cut short, and how they are printed."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
FIRST, LAST = ("what", "case", "dtype", "bound", "floor"), ("best peer / ours", "error")


@dataclass(frozen=True)
class Row:
    """One line."""

    what: str
    case: str
    dtype: str
    cells: dict[str, str]
    """Text by column: `bound`, `floor`, contenders by name, `best peer / ours`, `error`; a dash where none is."""
    notes: dict[str, str] = field(default_factory=dict)
    """Who is left out, and why. `FAILED` and `WRONG` at the start count as failures of the run if it is ours."""


@dataclass(frozen=True)
class Job:
    """What gives some rows: all passes of one case in one dtype."""

    section: str
    case: str
    dtype: str
    run: Callable[[], list[Row]]


class Store:
    """Rows of finished jobs in a file, kept as long as sources, machine, versions and settings stay the same."""

    def __init__(self, path: Path, settings: Sequence[object]) -> None:
        """
        Args:
            path: lines of JSON; made when the first job finishes.
            settings: what else must be the same.
        """
        self.path = path
        about = [platform.processor(), platform.node(), torch.__version__, transformers.__version__, sys.version]
        self.digest = _digest([*map(str, about), torch.get_num_threads(), *settings, _sources()])
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.kept = {entry["key"]: entry for entry in map(_entry, lines) if entry}

    def _key(self, job: Job) -> str:
        return _digest([self.digest, job.section, job.case, job.dtype])

    def rows(self, job: Job) -> tuple[list[Row], float] | None:
        """Of an earlier run, and the seconds that they took, or None."""
        kept = self.kept.get(self._key(job))
        return None if kept is None else ([Row(**row) for row in kept["rows"]], kept["seconds"])

    def keep(self, job: Job, rows: list[Row], seconds: float) -> None:
        """For the next run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": self._key(job), "rows": [asdict(row) for row in rows], "seconds": seconds}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")  # on a line of its own, whatever a killed run left


def _entry(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a run that was killed while it wrote
        return {}


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:20]


def _sources() -> str:
    paths = [path for folder in ("src", "benchmarks") for path in (ROOT / folder).rglob("*")]
    sources = sorted(path for path in paths if path.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def print_table(jobs: Iterable[Job], contenders: Sequence[str], store: Store, peers: Sequence[str] = ()) -> int:
    """Run what was not run before, print each row when it is there, and at the end who was left out and why, and how
    many minutes the sections took.

    Args:
        jobs: in the order of the table.
        contenders: names of the columns between `bound` and `best peer / ours`.
        store: of rows.
        peers: those of the contenders that are not ours.

    Returns:
        How many rows failed, or found ours wrong.
    """
    columns = (*FIRST, *contenders, *LAST)
    line(columns)
    line(["---"] * len(columns))
    notes: dict[str, list[str]] = {}
    spent: Counter[str] = Counter()
    earlier = failed = 0.0
    for job in jobs:
        kept = store.rows(job)
        rows, seconds = kept or _measured(job)
        if kept:
            earlier += seconds
        elif not any(_bad(row, peers) for row in rows):
            store.keep(job, rows, seconds)
        spent[job.section] += seconds
        failed += sum(_bad(row, peers) for row in rows)
        for row in rows:
            given = {"what": row.what, "case": row.case, "dtype": row.dtype, **row.cells}
            line([given.get(column, "-") for column in columns])
            for who, why in row.notes.items():
                notes.setdefault(f"{who}: {why}", []).append(f"{row.case} {row.dtype}")
    for note, cases in notes.items():
        where = dict.fromkeys(cases)
        print(f"without {note} ({len(where)} of the cases, the first {next(iter(where))})", flush=True)
    parts = ", ".join(f"{section} {_minutes(seconds)}" for section, seconds in spent.items())
    print(f"took {_minutes(spent.total())}, of which {_minutes(earlier)} in earlier runs: {parts}", flush=True)
    return int(failed)


def _minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{int(seconds) % 60:02d}"


def _measured(job: Job) -> tuple[list[Row], float]:
    start = time.perf_counter()
    try:
        rows = job.run()
    except Exception as error:  # one case must not cost the others; it is printed and fails the run
        why = f"FAILED with {type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        rows = [Row(job.section, job.case, job.dtype, {"bound": "FAILED"}, {"this row": why})]
    return rows, time.perf_counter() - start


def _bad(row: Row, peers: Sequence[str]) -> bool:
    return any(why.startswith(("FAILED", "WRONG")) and who not in peers for who, why in row.notes.items())


def line(cells: Sequence[object]) -> None:
    """Print one, of any table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
