"""The rank sketch: exact while small, and true about its own cutoffs when not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.rank_sketch import RankSketch


def sketch_of(*batches, limit=2**16):
    sketch = RankSketch(limit)
    for batch in batches:
        sketch.add(torch.tensor(batch))
    return sketch


def test_small_streams_are_exact_by_hand():
    sketch = sketch_of([0.3, 0.1], [0.7, 0.5])
    cutoffs = [sketch.cutoff(wanted) for wanted in (1, 2, 3, 4)]
    assert [round(cutoff.value, 6) for cutoff in cutoffs] == [0.7, 0.5, 0.3, 0.1]
    assert [cutoff.reached for cutoff in cutoffs] == [1, 2, 3, 4]
    nobody = sketch.cutoff(0)
    assert nobody.reached == 0
    assert 0.7 < nobody.value < 0.700001


def test_ties_pass_together_on_the_nearer_side():
    sketch = sketch_of([0.5] * 5 + [0.2])
    assert (sketch.cutoff(2).reached, sketch.cutoff(3).reached) == (0, 5)
    assert sketch.cutoff(2).value > 0.5 == sketch.cutoff(3).value
    assert sketch.cutoff(6).value == pytest.approx(0.2)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(2, 70),
    st.integers(0, 160),
)
def test_the_count_at_the_cutoff_is_true_whatever_the_memory(batches, limit, wanted):
    sketch = sketch_of(*batches, limit=limit)
    values_N = torch.tensor([value for batch in batches for value in batch])
    wanted = min(wanted, len(values_N))
    cutoff = sketch.cutoff(wanted)
    if not math.isinf(cutoff.value):
        assert int((values_N >= cutoff.value).sum()) == cutoff.reached
    assert len(sketch._key_K) <= limit
    if sketch.shift == 0:
        true = values_N.sort(descending=True).values
        nearest = min(abs(int((values_N >= value).sum()) - wanted) for value in [*true.tolist(), math.inf])
        assert abs(cutoff.reached - wanted) <= nearest or math.isinf(cutoff.value)


def test_short_memory_costs_little():
    values_N = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    sketch = RankSketch(limit=1000)
    for part_N in values_N.split(1000):
        sketch.add(part_N)
    for wanted in (10, 1000, 50_000):
        cutoff = sketch.cutoff(wanted)
        exact = float(values_N.sort(descending=True).values[wanted - 1])
        assert cutoff.value == pytest.approx(exact, rel=2.0 ** (sketch.shift - 23))
        assert cutoff.reached == int((values_N >= cutoff.value).sum())
        assert abs(cutoff.reached - wanted) <= 400


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        sketch_of([0.5, math.nan])
    with pytest.raises(ValueError, match="5 of 1"):
        sketch_of([0.5]).cutoff(5)
    with pytest.raises(ValueError, match="0 of 0"):
        RankSketch().cutoff(0)
    with pytest.raises(UserError, match="at least 2"):
        RankSketch(1)


def test_both_zeros_are_one_and_negative_values_are_in_order():
    sketch = sketch_of([-2.0, -0.0, 0.0, -1.0])
    assert (sketch.cutoff(2).value, sketch.cutoff(2).reached) == (0.0, 2)
    assert sketch.cutoff(3).value == -1.0
