"""Save and load a trace."""

from __future__ import annotations

import zipfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from crossways.errors import UserError
from crossways.trace.path_counts import PathCounts
from crossways.trace.sums import KEPT, SUMS, Trace, TraceSettings


def save_trace(trace: Trace, path: Path) -> None:
    """Write everything to one file in numpy's `.npz` format."""
    arrays: dict[str, Any] = {name: getattr(trace, name) for name in (*SUMS, *KEPT)}
    for index, counts in enumerate([trace.paths, *trace.block_paths]):
        arrays |= {f"paths.{index}.{name}": array for name, array in counts.state().items()}
    settings = [value or 0 for value in astuple(trace.settings)]
    arrays["shape"] = np.array([*trace.shape, trace.num_tokens, *settings])
    with Path(path).open("wb") as file:  # numpy would append its suffix to a bare name
        np.savez_compressed(file, **arrays)


def load_trace(path: Path) -> Trace:
    """What `save_trace` wrote; raises `UserError` for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return _rebuilt(arrays)
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a saved trace: {error}") from error


def _rebuilt(arrays: dict[str, Any]) -> Trace:
    experts, routers, factors, tokens, limit, block, keep = (int(value) for value in arrays["shape"])
    trace = Trace(experts, routers, factors, TraceSettings(limit, block or None, keep))
    trace.num_tokens = tokens
    for name in (*SUMS, *KEPT):
        setattr(trace, name, arrays[name])
    saved = [
        PathCounts.from_state({name: arrays[f"paths.{index}.{name}"] for name in ("path", "count", "sums")})
        for index in range(1 + len(trace.block_paths))
    ]
    trace.paths, trace.block_paths = saved[0], saved[1:]
    return trace
