"""Spread and number formats, against hand-made numbers."""

import math

import pytest

from crossways.study.spread import Spread, fixed, gibibytes, scaled


def test_mean_and_sample_deviation_by_hand():
    spread = Spread((1.0, 2.0, 6.0))
    assert spread.mean == 3.0
    # Deviations -2, -1, 3: squares sum to 14, divided by n - 1 = 2.
    assert spread.deviation == pytest.approx(math.sqrt(7.0))


def test_one_seed_has_no_deviation_and_says_so():
    assert Spread((2.5,)).deviation is None
    assert Spread((2.5,)).describe(fixed(2)) == ("2.50", "n = 1")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((1.0, math.nan), "NaN"),
        ((1.0, math.inf), "∞"),
        ((math.inf, -math.inf), "NaN"),
        ((-math.inf, 0.0), "−∞"),
    ],
)
def test_a_value_that_is_not_finite_spoils_the_mean_and_is_said(values, shown):
    assert Spread(values).describe(fixed(2)) == (shown, "n = 2, not finite")


def test_a_small_spread_is_not_shown_as_none():
    assert Spread((2.0, 2.0001)).describe(fixed(2)) == ("2.00", "± <0.01")
    assert Spread((2.0, 2.0)).describe(fixed(2)) == ("2.00", "± 0.00")
    assert Spread((12_000_000, 12_000_001)).describe(scaled()) == ("12.0 M", "± <0.1 M")
    assert Spread((500.0, 500.001)).describe(fixed(0)) == ("500", "± <1")


def test_signs_belong_to_the_mean_alone():
    assert Spread((-0.02, -0.01)).describe(fixed(3), signed=True) == ("−0.015", "± 0.007")
    assert Spread((0.5,)).describe(fixed(1), signed=True) == ("+0.5", "n = 1")


def test_an_empty_spread_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        Spread(())


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (scaled(), 12_345_678, "12.3 M"),
        (scaled(), 999_600, "1.00 M"),
        (scaled(), 99_970, "100 k"),
        (scaled(), 7, "7"),
        (scaled("FLOP"), 4.56e9, "4.56 GFLOP"),
        (fixed(2), 3.14159, "3.14"),
        (fixed(2), 123.456, "123.5"),
        (fixed(2), 12345.6, "12,346"),
        (fixed(2), 3e9, "3.00e+09"),
        (gibibytes, 3 * 2**29, "1.50 GiB"),
        (gibibytes, math.nan, "NaN"),
        (scaled(), math.inf, "∞"),
    ],
)
def test_formats(show, value, text):
    assert show(value, value) == text
