"""Paired differences and their bounds."""

import numpy as np
import pytest

from crossways.tuning.compare import paired_difference
from crossways.tuning.score import Scored


def scored(nats, tokens=None, pairs=(10,)):
    return Scored(tuple(nats), tuple(tokens or [10] * len(nats)), tuple(pairs), 10)


def test_the_difference_is_per_token_and_weighs_documents_by_length():
    found = paired_difference(scored([12.0, 30.0], [10, 20]), scored([10.0, 34.0], [10, 20]))
    assert found.nats == pytest.approx((2.0 - 4.0) / 30)
    assert found.documents == 2
    assert found.lower <= found.nats <= found.upper


def test_nothing_changed_is_no_difference_and_no_doubt():
    same = scored([3.0, 5.0, 4.0])
    assert paired_difference(same, same).upper == paired_difference(same, same).lower == 0.0


def test_what_makes_documents_hard_for_both_cancels():
    hard = np.random.default_rng(0).normal(50, 20, 40)
    found = paired_difference(scored(hard + 0.1), scored(hard))
    assert found.lower == pytest.approx(0.01)
    assert found.upper == pytest.approx(0.01)


def test_the_bounds_cover_as_often_as_they_say():
    draw = np.random.default_rng(1)
    below = 0
    for number in range(300):
        noise = draw.normal(1.0, 2.0, 60)
        found = paired_difference(scored(noise), scored([0.0] * 60), confidence=0.9, resamples=400, seed=number)
        below += found.upper >= 0.1
    assert 0.84 < below / 300 < 0.95


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="same documents; 2 and 3"):
        paired_difference(scored([1.0, 2.0]), scored([1.0, 2.0, 3.0]))
