"""A figure over seeds: mean, sample standard deviation, number of seeds, and how to print them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

Show = Callable[[float, float], str]
"""Formats a value in the scale of a reference, so that a mean and its deviation share unit and decimals."""


@dataclass(frozen=True)
class Spread:
    """The values of one figure, one per seed, in the order of the seeds. At least one value."""

    values: tuple[float, ...]
    """Any floats; one that is not finite makes mean and deviation not finite too, never silently left out."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a Spread needs at least one value, got none; use None for a missing figure")

    @property
    def n(self) -> int:
        """Number of values."""
        return len(self.values)

    @property
    def finite(self) -> bool:
        """Whether every value is finite."""
        return all(map(math.isfinite, self.values))

    @property
    def mean(self) -> float:
        """Arithmetic mean; not finite if any value is not."""
        return statistics.fmean(self.values) if self.finite else sum(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (divisor n - 1); None for one value, NaN if any value is not finite."""
        if self.n == 1:
            return None
        return statistics.stdev(self.values) if self.finite else math.nan

    def describe(self, show: Show, signed: bool = False) -> tuple[str, str]:
        """The mean and the spread as text, such as ("12.30", "± 0.04"); ("12.30", "n = 1") for one value.

        `signed` gives the mean an explicit plus sign, and a true minus sign, for differences.
        """
        mean = show(abs(self.mean), self.mean) if signed else show(self.mean, self.mean)
        if signed and not math.isnan(self.mean):
            mean = ("−" if self.mean < 0 else "+") + mean
        if self.deviation is None:
            return mean, "n = 1"
        if math.isnan(self.deviation):
            return mean, f"n = {self.n}, not finite"
        text = show(self.deviation, self.mean)
        if self.deviation > 0 and not text.strip("0.,kMGTPi B"):
            # A spread too small for the decimals shown is not no spread.
            digits = text.split(" ")[0]
            text = "<" + digits[:-1] + "1" + text[len(digits) :]
        return mean, f"± {text}"


def fixed(decimals: int) -> Show:
    """Plain numbers: `decimals` below 100, one fewer up to 1000, none above; scientific from ten million."""

    def show(value: float, reference: float) -> str:
        size = abs(reference) if math.isfinite(reference) else 0.0
        if not math.isfinite(value):
            return _not_finite(value)
        if size >= 1e7:
            return f"{value:.2e}"
        kept = decimals if size < 100 else max(decimals - 1, 0) if size < 1000 else 0
        return f"{value:,.{kept}f}"

    return show


def scaled(unit: str = "") -> Show:
    """Three significant digits with a decimal prefix, "12.3 M"; whole numbers under 1000 stay whole."""
    prefixes = ("", "k", "M", "G", "T", "P")

    def show(value: float, reference: float) -> str:
        if not math.isfinite(value):
            return _not_finite(value)
        size, power = abs(reference) if math.isfinite(reference) else 0.0, 0
        # 999.5 would print as 1000, which belongs to the next prefix.
        while size >= 999.5 and power < len(prefixes) - 1:
            size, power = size / 1000.0, power + 1
        whole = size >= 99.95 or (power == 0 and size == int(size))
        number = f"{value / 1000.0**power:.{0 if whole else 1 if size >= 9.995 else 2}f}"
        suffix = prefixes[power] + unit
        return f"{number} {suffix}" if suffix else number

    return show


def gibibytes(value: float, reference: float) -> str:
    """Bytes in GiB with two decimals, whatever their size, so that a column has one unit."""
    return f"{value / 2**30:.2f} GiB" if math.isfinite(value) else _not_finite(value)


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
