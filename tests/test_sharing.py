"""Sharing plans: which router uses which gate."""

from __future__ import annotations

import pytest

from crossways.errors import UserError
from crossways.sharing import PerBlock, PerLayer, build_sharing


def test_per_layer_gives_every_router_its_own_gate():
    assert PerLayer().plan(3) == [(0,), (1,), (2,)]
    assert PerLayer().plan(2, num_factors=2) == [(0, 1), (2, 3)]


def test_block_of_two_with_a_shorter_last_block():
    assert PerBlock(2).plan(5) == [(0,), (0,), (1,), (1,), (2,)]


def test_factors_share_with_the_same_factor_only():
    assert PerBlock(2).plan(3, num_factors=2) == [(0, 1), (0, 1), (2, 3)]


def test_block_of_one_is_independent_routing():
    assert PerBlock(1).plan(4, 2) == PerLayer().plan(4, 2)


def test_block_larger_than_the_model_is_one_gate():
    assert PerBlock(100).plan(3) == [(0,)] * 3


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "two"])
def test_impossible_block_sizes_are_refused(size):
    with pytest.raises(UserError, match="block"):
        build_sharing({"name": "block", "size": size})


def test_whole_floats_are_accepted():
    assert build_sharing({"name": "block", "size": 4.0}) == PerBlock(4)
    assert isinstance(PerBlock(4.0).block(5), int)  # type: ignore[arg-type]


def test_unknown_names_and_fields_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'block'"):
        build_sharing("blok")
    with pytest.raises(UserError, match="did you mean 'size'"):
        build_sharing({"name": "block", "siz": 4})
