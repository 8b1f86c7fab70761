"""Sharing plans: which router uses which gate."""

from __future__ import annotations

import pytest

from crossways.errors import UserError
from crossways.sharing import All, Decision, PerBlock, PerLayer, Sharing, build_sharing, sharing_catalogue


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


def test_all_is_one_block_of_any_depth():
    assert All().plan(3) == PerBlock(3).plan(3) == [(0,)] * 3
    assert All().plan(2, 2) == [(0, 1), (0, 1)]


def test_blocks_of_unequal_sizes():
    plan = PerBlock([2, 1, 3])
    assert plan.plan(6) == [(0,), (0,), (1,), (2,), (2,), (2,)]
    assert plan.plan(6, 2)[2:4] == [(2, 3), (4, 5)]
    assert [plan.position(layer) for layer in range(6)] == [0, 1, 0, 0, 1, 2]
    assert hash(plan) == hash(PerBlock((2, 1, 3)))


def test_unequal_blocks_must_fill_the_model():
    PerBlock([2, 1]).check(3)
    for layers in (2, 4):
        with pytest.raises(UserError, match=f"blocks of \\[2, 1\\] are 3 layers, the model routes {layers}"):
            Decision([2, 1]).check(layers)
    PerBlock(100).check(3)


def test_one_decision_per_block():
    plan = Decision(2)
    assert plan.plan(5) == PerBlock(2).plan(5)
    assert [plan.reuses_decision(layer) for layer in range(5)] == [False, True, False, True, False]
    assert [Decision([1, 2]).reuses_decision(layer) for layer in range(3)] == [False, False, True]
    assert not any(PerBlock(2).reuses_decision(layer) for layer in range(5))


def test_layers_that_ask_each_gate():
    assert PerBlock(2).deciding(5) == [2, 2, 1]
    assert PerBlock([1, 4]).deciding(5) == [1, 4]
    assert Decision(2).deciding(5) == [1, 1, 1]
    assert All().deciding(5) == [5]
    assert PerLayer().deciding(2) == [1, 1]
    assert All().deciding(0) == []


def test_a_plan_defined_elsewhere_is_found():
    class Alternating(Sharing):
        name = "alternating"

        def block(self, layer):
            return layer % 2

    assert sharing_catalogue()["alternating"] is Alternating
    assert build_sharing("alternating").plan(4) == [(0,), (1,), (0,), (1,)]


@pytest.mark.parametrize("kind", ["block", "decision"])
@pytest.mark.parametrize("size", [0, -1, 1.5, True, "two", None, [], [2, 0], [2, "2"], [1.5], {"2": 2}])
def test_impossible_block_sizes_are_refused(kind, size):
    with pytest.raises(UserError, match=f"sharing '{kind}': size must be"):
        build_sharing({"name": kind, "size": size})


def test_whole_floats_are_accepted():
    assert build_sharing({"name": "block", "size": 4.0}) == PerBlock(4)
    assert isinstance(PerBlock(4.0).block(5), int)  # type: ignore[arg-type]


def test_unknown_names_and_fields_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'block'"):
        build_sharing("blok")
    with pytest.raises(UserError, match="did you mean 'size'"):
        build_sharing({"name": "block", "siz": 4})
