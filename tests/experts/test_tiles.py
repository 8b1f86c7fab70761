import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts.tiles import Run, plan_tiles, round_up


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
    plan = plan_tiles(with_loads(10, 9, 11, 10, 31, 30), tile_rows=1000, call_rows=4)
    assert runs(plan) == [[(0, 4, 11, True), (4, 2, 31, True)]]


def test_an_expert_alone_joins_where_its_own_product_is_shared_badly():
    loads = with_loads(100, 90, 110, 60)
    assert runs(plan_tiles(loads, tile_rows=1000)) == [
        [(0, 1, 100, True), (1, 1, 90, True), (2, 1, 110, True), (3, 1, 60, True)]
    ]
    assert runs(plan_tiles(loads, tile_rows=1000, alone=1.2)) == [
        [(0, 2, 100, True), (2, 1, 110, True), (3, 1, 60, True)]
    ]


def test_a_tile_of_padding_is_not_made_of_idle_experts():
    plan = plan_tiles(with_loads(0, 0, 0, 0, 5, 0, 6, 0), tile_rows=1000, call_rows=3)
    assert runs(plan) == [[(4, 1, 5, True), (6, 1, 6, True)]]
    assert plan.idle_experts == (0, 1, 2, 3, 5, 7)


def test_a_hot_expert_does_not_make_its_neighbours_as_long_as_itself():
    plan = plan_tiles(with_loads(90, 1, 2, 1), tile_rows=1000, call_rows=10_000)
    assert runs(plan) == [[(0, 2, 90, True), (2, 2, 2, True)]]


def test_batches_hold_a_power_of_two_experts_but_for_the_last_and_fit_a_tile():
    plan = plan_tiles(with_loads(*[5] * 23), tile_rows=40, call_rows=100)
    assert [[run[1] for run in tile] for tile in runs(plan)] == [[8], [8], [7]]


def test_loads_are_rounded_to_an_eighth_of_a_power_of_two():
    loads = (0, 1, 16, 17, 128, 129, 257, 1000, 1025)
    assert [round_up(rows, 16) for rows in loads] == [0, 16, 16, 32, 128, 144, 288, 1024, 1152]
    assert [round_up(rows, 1) for rows in (0, 7, 1025)] == [0, 7, 1025]


def test_padding_alone_is_cleared():
    plan = plan_tiles(with_loads(3, 9, 6), 16, row_multiple=4)
    for index, tile in enumerate(plan.tiles):
        rows = torch.full((tile.stop - tile.start, 2), torch.nan)
        plan.clear(index, rows)
        used_R = plan.spread(torch.ones(18))[tile.start : tile.stop, 0] > 0
        assert torch.equal(rows.isnan().all(1), used_R)


@pytest.mark.parametrize("row_multiple", [1, 4])
def test_rows_by_token(row_multiple):
    assignment = with_loads(3, 0, 7, 5)
    plan = plan_tiles(assignment, 16, row_multiple)
    row_P, first_T, order_P = plan.by_token
    assert torch.equal(assignment.token_P[order_P], assignment.token_P.sort().values)
    assert torch.equal(plan.token_R[row_P], assignment.token_P.sort().values)
    assert first_T.tolist() == [0, 3, 6, 9, 11, 13, 14]


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
