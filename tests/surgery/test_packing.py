"""Several sequences packed into one row, told apart by their positions.

Legend: B batch, S sequence, E experts, T tokens.
"""

from __future__ import annotations

import pytest
import torch

from crossways import reroute
from crossways.surgery.packing import find_packing
from crossways.trace import traced

LENGTHS = (5, 9, 1, 3)


def sequences(rows=1):
    generator = torch.Generator().manual_seed(2)
    total = sum(LENGTHS)
    ids_BS = torch.randint(3, 64, (rows, total), generator=generator)
    position_S = torch.cat([torch.arange(n) for n in LENGTHS])
    return ids_BS, position_S[None]


def test_places_and_back():
    packing = find_packing(sequences()[1], rows=2, length=sum(LENGTHS))
    assert (packing.rows, packing.length) == (8, 9)
    assert packing.valid_NL().sum(1).tolist() == [*LENGTHS, *LENGTHS]
    assert (packing.place_T.diff() > 0).all()
    value_TX = torch.randn(36, 3)
    assert torch.equal(packing.gather(packing.spread(value_TX)), value_TX)
    assert torch.equal(packing.spread(value_TX).view(8, 9, 3)[4, :5], value_TX[18:23])


@pytest.mark.parametrize(
    "positions",
    [None, torch.arange(18)[None], torch.arange(18).expand(2, 18) + 4, torch.zeros(3, 2, 18), torch.arange(5)[None]],
)
def test_rows_of_one_sequence_are_not_packed(positions):
    assert find_packing(positions, rows=2, length=18) is None


@pytest.mark.parametrize("rule", ["usmoe", "expert-choice", "top-c"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "dbrx", "inkling", "zaya", "llama4_text", "jetmoe"])
def test_each_packed_sequence_is_routed_as_if_alone(make, name, rule):
    """In the first routed layer, whose input does not depend on how a family's attention takes packed rows."""
    model = make(name)
    ids_BS, position_BS = sequences()
    with reroute(model, rule, k=1.5 if rule == "usmoe" else None) as handle, torch.no_grad():
        site = handle.blocks[0]
        model(input_ids=ids_BS, position_ids=position_BS, use_cache=False)
        together = site.routing
        logits_NLE = together.logits_TE.view(4, 9, -1)
        mask_NLE = together.assignment.to_mask().view(logits_NLE.shape)
        weight_NLE = together.assignment.to_dense().view(logits_NLE.shape)
        for row, length in enumerate(LENGTHS):
            assert not mask_NLE[row, length:].any()
            alone = decided(site, logits_NLE[row : row + 1, :length])
            assert torch.equal(alone.to_mask(), mask_NLE[row, :length])
            if not site.reading.shared:
                torch.testing.assert_close(alone.to_dense(), weight_NLE[row, :length])


def decided(site, logits_BSE):
    """The site's own router, by itself, on one sequence."""
    from crossways.routing import Context

    bias = site._context(None, torch.device("cpu")).bias_E
    return site.router(logits_BSE, Context(bias_E=bias)).assignment


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "granitemoe"])
def test_packed_sequences_come_to_what_they_come_to_alone(make, name):
    """Where attention keeps them apart as well, that is without a cache and without a mask."""
    model = make(name)
    ids_BS, position_BS = sequences()
    with reroute(model, "usmoe", k=1.5), torch.no_grad():
        packed = model(input_ids=ids_BS, position_ids=position_BS, use_cache=False).logits
        start = 0
        for length in LENGTHS:
            alone = model(input_ids=ids_BS[:, start : start + length], use_cache=False).logits
            torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-3, atol=1e-4)
            start += length


def test_what_is_seen_of_packed_rows(make):
    model = make("olmoe")
    ids_BS, position_BS = sequences(rows=2)
    with torch.no_grad(), traced(model) as trace:
        model(input_ids=ids_BS, position_ids=position_BS, use_cache=False)
    assert trace.num_tokens == 36
    assert (trace.load_RE.sum(1) == 72).all()


def test_own_rule_and_training(make):
    model = make("olmoe")
    ids_BS, position_BS = sequences(rows=2)
    inputs = {"input_ids": ids_BS, "position_ids": position_BS, "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
        with reroute(model, "own"):
            assert torch.equal(model(**inputs).logits, before)
    with reroute(model.train(), "usmoe", k=1.5) as handle:
        model(**inputs, labels=ids_BS).loss.backward()
        assert all("cutoff" in known for known in handle.estimates())
        expected = 2 * sum(int(1.5 * length + 0.5) for length in LENGTHS)
        assert [int(load_E.sum()) for load_E in handle.loads()] == [expected] * 2
        assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
