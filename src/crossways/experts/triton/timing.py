"""How long a candidate's block shape takes, for Triton's autotuner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from triton import knobs
from triton.testing import do_bench

_WARM_UP, _REPEAT = 10, 40
"""Milliseconds; Triton's own 25 and 100 would make a first training step of a dozen products a second longer."""


def milliseconds(run: Callable[[], object], quantiles: Sequence[float]) -> Sequence[float]:
    """Quantiles of how long `run` takes on the device.

    Some versions of Triton time even a single candidate; its interpreter, which is given no more than that, has no
    device to time it on.
    """
    if knobs.runtime.interpret:
        return [0.0] * len(quantiles)
    return do_bench(run, warmup=_WARM_UP, rep=_REPEAT, quantiles=quantiles)
