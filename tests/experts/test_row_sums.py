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


def summed(mask_TE, dtype, row_multiple, padding=0.0, weighed=False):
    """The sums of random rows and of padding rows, and what they come to in float64 without the latter."""
    assignment = Assignment.from_mask(mask_TE, torch.ones(mask_TE.shape))
    plan = plan_tiles(assignment, 32, row_multiple)
    like_TD = torch.empty(len(mask_TE), 24, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    rows_PD = torch.randn(assignment.num_pairs, 24, generator=generator).to(dtype)
    weight_P = torch.randn(assignment.num_pairs, generator=generator).to(dtype) if weighed else None
    sums = RowSums(plan, like_TD, weight_P)
    rows_RD = torch.full((len(plan.token_R), 24), padding, dtype=dtype)
    rows_RD[plan.row_P if plan.row_P is not None else slice(None)] = rows_PD
    for tile in plan.tiles:
        sums.rows(tile).copy_(rows_RD[tile.start : tile.stop])
    expected_TD = torch.zeros(like_TD.shape, dtype=torch.float64)
    weighed_PD = rows_PD.double() * (1 if weight_P is None else weight_P.double()[:, None])
    return sums.total(), expected_TD.index_add_(0, assignment.token_P, weighed_PD)


@pytest.mark.parametrize("row_multiple", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighed", [False, True])
def test_sums_are_rounded_once(dtype, row_multiple, at_once, weighed):
    mask_TE = torch.rand(50, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    mask_TE[[0, 20, 49]] = False
    total_TD, expected_TD = summed(mask_TE, dtype, row_multiple, weighed=weighed)
    assert total_TD.dtype == dtype
    torch.testing.assert_close(total_TD, expected_TD.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=4e-5)
    assert not total_TD[[0, 20, 49]].any()
    assert torch.equal(total_TD, summed(mask_TE, dtype, row_multiple, weighed=weighed)[0])


def test_padding_is_not_read_at_once():
    mask_TE = torch.rand(50, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    total_TD, expected_TD = summed(mask_TE, torch.float32, 8, padding=torch.nan)
    torch.testing.assert_close(total_TD, expected_TD.float())


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_pairs(tokens, at_once):
    total_TD, expected_TD = summed(torch.zeros(tokens, 3, dtype=torch.bool), torch.bfloat16, 8)
    assert torch.equal(total_TD.double(), expected_TD)
