"""One row per chosen pair is what the experts would compute of the rectangle."""

import pytest
import torch

from crossways.surgery.pair_rows import one_row_per_pair


@pytest.fixture
def weight_EDD():
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def experts(x_TD, index_TK, weight_TK, weight_EDD):
    """Experts of one matrix, every place taken."""
    y_TKD = torch.einsum("td,tkde->tke", x_TD, weight_EDD[index_TK])
    return (y_TKD * weight_TK[..., None]).sum(1)


def test_rows_sum_to_what_each_token_is_owed(weight_EDD):
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    index_TK = torch.tensor([[0, 2], [3, 1], [3, 3], [2, 3]])
    weight_TK = torch.rand(4, 2, dtype=torch.float64)
    rows, x_PD, index_P1, weight_P1 = one_row_per_pair(x, index_TK, weight_TK, 3)
    assert index_P1.flatten().tolist() == [0, 2, 1, 2]
    y = rows.summed(experts(x_PD, index_P1, weight_P1, weight_EDD))
    owed_TD = torch.zeros(4, 4, dtype=torch.float64)
    for token, place in (index_TK < 3).nonzero().tolist():
        product_D = x.flatten(0, 1)[token] @ weight_EDD[index_TK[token, place]]
        owed_TD[token] += weight_TK[token, place] * product_D
    torch.testing.assert_close(y, owed_TD.view(2, 2, 4))


def test_nothing_is_done_where_every_place_is_taken():
    assert one_row_per_pair(torch.ones(2, 4), torch.tensor([[0], [2]]), torch.ones(2, 1), 3) is None


def test_no_pair_at_all_is_zero(weight_EDD):
    x_TD = torch.ones(2, 4, dtype=torch.float64)
    rows, *given = one_row_per_pair(x_TD, torch.full((2, 2), 3), torch.ones(2, 2, dtype=torch.float64), 3)
    assert torch.equal(rows.summed(experts(*given, weight_EDD)), torch.zeros_like(x_TD))


def test_sixteen_bits_are_summed_in_float32():
    rows, x_PD, _, _ = one_row_per_pair(
        torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0, 1, 2, 9]]), torch.ones(1, 4), 3
    )
    y_TD = rows.summed(torch.tensor([[256.0], [1.0], [1.0]]).expand_as(x_PD).to(torch.bfloat16))
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.tolist() == [[258.0, 258.0]], "256 + 1 is 256 in bfloat16"
