"""Path counts: exact below the limit, bounded memory and a true error above it."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.trace import PathCounts


def counts_of(rows, limit=100):
    counts = PathCounts(len(rows[0]), limit)
    counts.add(np.array(rows))
    return counts


def test_exact_counts_by_hand():
    counts = counts_of([[1, 2], [3, -1], [1, 2], [0, 0], [1, 2], [0, 0]])
    path_NR, count_N = counts.most_common()
    assert path_NR.tolist() == [[1, 2], [0, 0], [3, -1]]
    assert count_N.tolist() == [3, 2, 1]
    assert (counts.total, counts.error, len(counts)) == (6, 0, 3)
    assert counts.most_common(1)[0].tolist() == [[1, 2]]


def test_ties_are_in_the_order_of_the_indices():
    assert counts_of([[2, 0], [0, 5], [0, 3]]).most_common()[0].tolist() == [[0, 3], [0, 5], [2, 0]]


def test_the_subtraction_by_hand():
    """Limit 1: three paths exceed twice the limit, so the second greatest count, 2, is taken off all."""
    counts = counts_of([[0]] * 5 + [[1]] * 2 + [[2]], limit=1)
    assert (counts.most_common()[0].tolist(), counts.most_common()[1].tolist()) == ([[0]], [3])
    assert (counts.total, counts.error) == (8, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=30), min_size=1, max_size=8),
    st.integers(1, 6),
    st.integers(0, 7),
)
def test_the_stated_error_holds(batches, limit, split):
    """Counted in batches on two processes and merged."""
    true = collections.Counter(value for batch in batches for value in batch)
    halves = [PathCounts(1, limit), PathCounts(1, limit)]
    for index, batch in enumerate(batches):
        halves[index >= split].add(np.array(batch)[:, None])
        assert len(halves[index >= split]) <= 2 * limit
    counts = halves[0]
    counts.merge(halves[1])
    assert len(counts) <= 2 * limit
    assert counts.total == true.total()
    assert counts.error <= counts.total / (limit + 1)
    held = {int(path[0]): int(count) for path, count in zip(*counts.most_common(), strict=True)}
    for path, count in true.items():
        assert count - counts.error <= held.get(path, 0) <= count


def test_the_state_is_everything():
    counts = counts_of([[value, value % 3] for value in range(9)] * 2 + [[0, 0]] * 4, limit=3)
    again = PathCounts.from_state(counts.state())
    for mine, theirs in zip(counts.most_common(), again.most_common(), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert (again.total, again.error, again.limit) == (counts.total, counts.error, 3)


def test_an_empty_summary_has_no_paths():
    path_NR, count_N = PathCounts(3).most_common(5)
    assert path_NR.shape == (0, 3)
    assert count_N.shape == (0,)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="2 routers"):
        PathCounts(2).add(np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="2 and 3"):
        PathCounts(2).merge(PathCounts(3))
    with pytest.raises(UserError, match="at least 1"):
        PathCounts(2, limit=0)
