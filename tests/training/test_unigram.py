"""The unigram floor, by hand."""

import math

import numpy as np
import pytest

from crossways.training.unigram import unigram_bits_per_byte


def test_by_hand():
    # Smoothed: 4/8, 2/8, 2/8, so the three tokens cost 1, 2 and 2 bits.
    score = unigram_bits_per_byte(np.array([3, 1, 1]), [[0, 1], [2]], [6, 4])
    assert score.bits_per_byte == pytest.approx(5 / 10)
    assert score.perplexity == pytest.approx(2 ** (5 / 3))


def test_uniform_counts_give_the_vocabulary_size():
    score = unigram_bits_per_byte(np.full(50, 10), [[3, 4, 5]], [3])
    assert score.perplexity == pytest.approx(50)
    assert score.bits_per_byte == pytest.approx(math.log2(50))


def test_unseen_tokens_cost_a_finite_number_of_bits():
    assert math.isfinite(unigram_bits_per_byte(np.array([5, 0]), [[1]], [1]).bits_per_byte)


def test_nothing_to_score():
    with pytest.raises(ValueError, match="nothing to score: 0 tokens, 0 bytes"):
        unigram_bits_per_byte(np.array([1]), [], [])
    with pytest.raises(ValueError, match="zip"):
        unigram_bits_per_byte(np.array([1]), [[0]], [])
