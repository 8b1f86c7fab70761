"""Differences from the baseline: paired by seed, honest, and no more confident than the spread."""

import math

import pytest

from crossways.report.compare import differences, unigram_bits
from crossways.study.record import Comparison
from crossways.study.table import group_by_variant

QUESTION = Comparison(title="t", question="q", variants=("base", "moe", "absent"), baseline="base")


def found(*records):
    return differences(group_by_variant(records), QUESTION)


def test_differences_are_paired_by_seed(make_record):
    records = [make_record("base", s, bits=b) for s, b in ((0, 2.0), (1, 2.5), (2, 9.0))]
    records += [make_record("moe", s, bits=b) for s, b in ((0, 1.9), (1, 2.3))]
    (moe,) = found(*records)
    assert moe.spread.values == pytest.approx((-0.1, -0.2))
    assert moe.texts == ("−0.150", "± 0.071")
    assert moe.verdict == "better by more than the spread"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((2.1, 2.1), "worse by more than the spread"),
        ((1.9, 2.2), "within the spread"),
        ((1.9,), "better with the one seed there is; its spread is unknown"),
        ((math.nan, 2.0), "not finite"),
    ],
)
def test_the_verdict_claims_no_more_than_the_spread(make_record, values, verdict):
    records = [make_record("base", s) for s in (0, 1)]
    records += [make_record("moe", s, bits=b) for s, b in enumerate(values)]
    assert found(*records)[0].verdict == verdict


def test_a_leaky_variant_is_compared_by_its_twin(make_record):
    (moe,) = found(make_record("base"), make_record("moe", leaky=True, bits=2.1))
    assert moe.spread.values == pytest.approx((0.1,))


def test_without_a_common_seed_there_is_no_difference(make_record):
    (moe,) = found(make_record("base", 0), make_record("moe", 1))
    assert moe.spread is None
    assert moe.texts == ("–", "")
    assert "no seed" in moe.verdict


def test_the_unigram_line_leaves_out_what_is_not_finite(make_record):
    good = make_record()
    bad = good.model_copy(
        update={"evaluation": good.evaluation.model_copy(update={"unigram_bits_per_byte": math.inf})}
    )
    assert unigram_bits([good, bad]) == 3.5
    assert unigram_bits([bad]) is None
