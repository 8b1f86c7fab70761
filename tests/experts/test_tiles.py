import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts.tiles import Run, plan_tiles


def with_loads(*loads):
    expert_P = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    token_P = torch.cat([torch.arange(load) for load in loads])
    return Assignment.from_pairs(token_P, expert_P, torch.rand(len(token_P)), max(loads), len(loads))


def runs(plan):
    return [[(run.expert, run.experts, run.rows, run.first) for run in tile.runs] for tile in plan.tiles]


def test_without_call_cost_rows_are_pairs():
    assignment = with_loads(3, 0, 5)
    plan = plan_tiles(assignment, tile_rows=100)
    assert plan.row_P is None
    assert runs(plan) == [[(0, 1, 3, True), (2, 1, 5, True)]]
    assert plan.idle_experts == (1,)


def test_neighbours_join_while_padding_is_cheaper_than_a_call():
    plan = plan_tiles(with_loads(10, 9, 11, 30, 31), tile_rows=1000, call_rows=4)
    assert runs(plan) == [[(0, 3, 11, True), (3, 2, 31, True)]]


def test_a_hot_expert_is_cut_and_its_later_pieces_are_marked():
    plan = plan_tiles(with_loads(4, 50, 4), tile_rows=20)
    assert runs(plan) == [
        [(0, 1, 4, True)],
        [(1, 1, 20, True)],
        [(1, 1, 20, False)],
        [(1, 1, 10, False), (2, 1, 4, True)],
    ]
    assert plan.max_rows == 20


@pytest.mark.parametrize("row_multiple", [1, 4])
@pytest.mark.parametrize("call_rows", [0, 100])
def test_rows_hold_every_pair_once_and_padding_weighs_nothing(row_multiple, call_rows):
    assignment = with_loads(3, 0, 7, 5, 40)
    plan = plan_tiles(assignment, 16, row_multiple, call_rows)
    weight_R = plan.spread(assignment.weight_P)[:, 0]
    rows = sum(run.experts * run.rows for tile in plan.tiles for run in tile.runs)
    assert rows == len(plan.token_R) == len(weight_R)
    assert torch.equal(plan.collect(plan.token_R), assignment.token_P)
    assert torch.equal(plan.collect(weight_R), assignment.weight_P)
    assert int(weight_R.count_nonzero()) == assignment.num_pairs
    assert all(run.rows % row_multiple == 0 for tile in plan.tiles for run in tile.runs)


def test_run_is_one_product_by_default():
    assert Run(expert=0, experts=2, rows=3).first
