import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import row_sums
from crossways.experts.row_sums import RowSums
from crossways.experts.tiles import plan_tiles


@pytest.fixture(params=[True, False], ids=["at once", "some at a time"])
def at_once(request, monkeypatch):
    """Whether all rows are added at once; if not, those of a tile or two."""
    if not request.param:
        monkeypatch.setattr(row_sums, "_MOST_BYTES", -1)
        monkeypatch.setattr(row_sums, "_SOME_BYTES", 80 * 24 * 4)
    return request.param


def summed(mask_TE, dtype, row_multiple, padding=0.0):
    """The sums of random rows and of padding rows, and what they come to in float64 without the latter."""
    assignment = Assignment.from_mask(mask_TE, torch.ones(mask_TE.shape))
    plan = plan_tiles(assignment, 32, row_multiple)
    like_TD = torch.empty(len(mask_TE), 24, dtype=dtype)
    sums = RowSums(plan, like_TD)
    rows_PD = torch.randn(assignment.num_pairs, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows_RD = torch.full((len(plan.token_R), 24), padding, dtype=dtype)
    rows_RD[plan.row_P if plan.row_P is not None else slice(None)] = rows_PD
    for tile in plan.tiles:
        sums.rows(tile).copy_(rows_RD[tile.start : tile.stop])
    expected_TD = torch.zeros(like_TD.shape, dtype=torch.float64)
    return sums.total(), expected_TD.index_add_(0, assignment.token_P, rows_PD.double())


@pytest.mark.parametrize("row_multiple", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(dtype, row_multiple, at_once):
    mask_TE = torch.rand(50, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    mask_TE[[0, 20, 49]] = False
    total_TD, expected_TD = summed(mask_TE, dtype, row_multiple)
    assert total_TD.dtype == dtype
    torch.testing.assert_close(total_TD, expected_TD.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=4e-5)
    assert not total_TD[[0, 20, 49]].any()
    assert torch.equal(total_TD, summed(mask_TE, dtype, row_multiple)[0])


def test_padding_is_not_read_at_once():
    mask_TE = torch.rand(50, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    total_TD, expected_TD = summed(mask_TE, torch.float32, 8, padding=torch.nan)
    torch.testing.assert_close(total_TD, expected_TD.float())


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_pairs(tokens, at_once):
    total_TD, expected_TD = summed(torch.zeros(tokens, 3, dtype=torch.bool), torch.bfloat16, 8)
    assert torch.equal(total_TD.double(), expected_TD)
