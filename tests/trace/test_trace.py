"""The trace: sums by hand, what was executed and nothing else, merging, saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.perturb import DisableTop, perturbed
from crossways.routing import Routing
from crossways.trace import Trace, TraceSettings, load_trace, save_trace, traced
from crossways.trace.sums import KEPT, SUMS, run_positions


def routing_of(weight_rows, valid=None):
    """A routing that executes the non-zero weights; scores are the weights."""
    weight_TE = torch.tensor(weight_rows)
    return Routing(
        logits_TE=weight_TE,
        scores_TE=weight_TE,
        assignment=Assignment.from_mask(weight_TE > 0, weight_TE),
        valid_T=None if valid is None else torch.tensor(valid),
    )


FIRST = routing_of([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 0.0]])
SECOND = routing_of([[0.0, 0.9, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def trace_of(*routings, factors=1, **settings):
    trace = Trace(3, len(routings), factors, TraceSettings(**settings))
    trace.record(routings)
    return trace


def test_the_sums_by_hand():
    trace = trace_of(FIRST, SECOND)
    assert trace.num_tokens == 3
    assert trace.load_RE.tolist() == [[2, 2, 0], [1, 1, 2]]
    assert trace.budget_RK.tolist() == [[1, 0, 2, 0], [0, 2, 1, 0]]
    # tops: token 0: 0 (the first of two equal ones) and 1; token 1: 1 and 2; token 2: nobody and 0
    assert trace.top_pairs_HEE.tolist() == [[[0, 1, 0], [0, 0, 1], [0, 0, 0]]]
    assert trace.paths.most_common()[0].tolist() == [[-1, 0], [0, 1], [1, 2]]
    # sets: {0, 1} {1, 2}: 1 of 3; {0, 1} {2}: 0 of 3; {} {0}: 0 of 1
    assert trace.pairs_HEE.tolist() == [[[0, 1, 2], [0, 1, 2], [0, 0, 0]]]
    assert trace.jaccard_H.tolist() == pytest.approx([1 / 3])
    assert trace.sizes_H.tolist() == [8]
    expected = [np.log(2) - (0.2 * np.log(0.2) + 0.8 * np.log(0.8)), -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))]
    assert trace.entropy_R.tolist() == pytest.approx(expected, rel=1e-6)


def test_two_empty_sets_do_not_overlap():
    empty = routing_of([[0.0, 0.0, 0.0]])
    assert trace_of(empty, empty).jaccard_H.tolist() == [0.0]


def test_padding_is_excluded_everywhere():
    valid = [True, False, True]
    weights = [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.3, 0.0]]
    padded = routing_of(weights, valid)
    alone = routing_of([weights[0], weights[2]])
    one, two = trace_of(padded, padded, keep_tokens=5), trace_of(alone, alone, keep_tokens=5)
    assert one.num_tokens == 2
    for name in (*SUMS, *KEPT):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    assert one.paths.most_common()[0].tolist() == two.paths.most_common()[0].tolist()


def test_runs_by_hand():
    top_TL = np.array([[1, 1, 1, 1, 2], [0, -1, -1, 3, 3], [2, 2, 0, 2, 2], [1, 1, 1, 1, 1]])
    #  run of 4 and 1;  1, nobody twice, 2;  2, 1, 2;  5
    assert run_positions(top_TL).tolist() == [2, 3, 6, 0, 4, 5]
    assert run_positions(np.zeros((0, 3), int)).tolist() == [0, 0, 0, 0]
    assert run_positions(np.array([[5], [5]])).tolist() == [0, 2]  # a run ends with its token


def test_factors_neighbour_the_same_factor_of_the_next_layer():
    a0, b0, a1, b1 = (routing_of([row]) for row in ([1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]))
    trace = trace_of(a0, b0, a1, b1, factors=2, block=1)
    assert [np.argwhere(pairs).tolist() for pairs in trace.top_pairs_HEE] == [[[0, 0]], [[1, 2]]]
    assert [np.argwhere(pairs).tolist() for pairs in trace.pairs_HEE] == [[[0, 0]], [[1, 2]]]
    assert trace.jaccard_H.tolist() == [1.0, 0.0]
    assert trace.run_L1.tolist() == [0, 2, 2]
    assert trace.paths.most_common()[0].tolist() == [[0, 1, 0, 2]]
    assert [counts.most_common()[0].tolist() for counts in trace.block_paths] == [[[0, 1]], [[0, 2]]]


def test_blocks_may_be_cut_short():
    rows = [routing_of([row]) for row in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])]
    trace = trace_of(*rows, block=2)
    assert [counts.most_common()[0].tolist() for counts in trace.block_paths] == [[[0, 1]], [[2]]]


def test_the_first_tokens_are_kept_raw():
    trace = Trace(3, 2, settings=TraceSettings(keep_tokens=4))
    trace.record((FIRST, SECOND), torch.tensor([7, 8, 9]))
    trace.record((SECOND, FIRST))
    assert trace.kept_id_N.tolist() == [7, 8, 9, -1]
    assert trace.kept_mask_NRE[1].tolist() == [[True, True, False], [False, False, True]]
    np.testing.assert_allclose(trace.kept_weight_NRE[3], [[0.0, 0.9, 0.1], [0.5, 0.5, 0.0]], rtol=1e-6)


def test_executed_assignments_are_recorded(tiny, ids_BS):
    for fields in ({}, {"layer": "cartesian"}, {"select": {"name": "top_c", "k": 1.5}}):
        model = tiny(**fields)
        with traced(model, TraceSettings(keep_tokens=99)) as trace:
            outputs = model(ids_BS, output_routings=True)
        routings = outputs.routings
        assert trace.num_tokens == 16
        assert trace.load_RE.tolist() == [load_E.tolist() for load_E in outputs.expert_load]
        masks = torch.stack([routing.assignment.to_mask() for routing in routings], 1)
        assert torch.equal(torch.from_numpy(trace.kept_mask_NRE), masks)
        assert trace.kept_id_N.tolist() == ids_BS.flatten().tolist()
        tops = {tuple(path) for path in torch.stack([r.assignment.top_expert_T() for r in routings], 1).tolist()}
        assert {tuple(path) for path in trace.paths.most_common()[0].tolist()} == tops


def test_not_what_the_logits_say_but_what_was_executed(tiny, ids_BS):
    model = tiny(select={"name": "top_k", "k": 1})
    with traced(model) as free:
        model(ids_BS)
    with traced(model) as disturbed, perturbed(model, DisableTop()):
        model(ids_BS)
    assert not np.array_equal(free.load_RE[0], disturbed.load_RE[0])


def test_generation_and_padding(tiny, ids_BS):
    model = tiny(eos_token_id=None)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :3] = 0
    with traced(model) as trace:
        model.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=3, do_sample=False)
    assert trace.num_tokens == 13 + 2 * 2  # the prompt, and all but the last new token of two rows


def test_repeated_decisions_of_gradient_checkpointing_count_once(tiny, ids_BS):
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with traced(model) as trace:
        model(ids_BS, labels=ids_BS).loss.backward()
    assert trace.num_tokens == 16
    assert trace.budget_RK[:, 2].tolist() == [16, 16, 16]


def test_a_trace_that_received_nothing_is_an_error(tiny, ids_BS):
    model = tiny()
    with pytest.raises(ValueError, match="received nothing"), traced(model):
        pass
    with pytest.raises(ValueError, match="received nothing"), traced(model):
        model.model(ids_BS)
    with pytest.raises(ValueError, match="no router"), traced(tiny(moe_every=0)):
        pass
    with pytest.raises(KeyError), traced(model):
        raise KeyError("inside")
    assert not model._forward_hooks
    assert not any(router._forward_hooks for router in model.model.routers)


def test_a_failed_pass_leaves_the_next_one_right(tiny, ids_BS):
    model = tiny()
    with traced(model) as trace:
        with pytest.raises(IndexError):
            model(ids_BS + 1000)
        model(ids_BS)
    assert trace.num_tokens == 16


def equal(one, two):
    for name in (*SUMS, *KEPT):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-5, err_msg=name)
    assert one.num_tokens == two.num_tokens
    for mine, theirs in zip([one.paths, *one.block_paths], [two.paths, *two.block_paths], strict=True):
        assert mine.state()["path"].tolist() == theirs.state()["path"].tolist()
        assert mine.state()["count"].tolist() == theirs.state()["count"].tolist()
        assert mine.state()["sums"].tolist() == theirs.state()["sums"].tolist()


def test_merged_traces_equal_one_trace(tiny, ids_BS, tmp_path):
    model, settings = tiny(), TraceSettings(block=2, keep_tokens=12)
    with traced(model, settings) as whole:
        model(ids_BS[:1])
        model(ids_BS[1:])
    parts = []
    for row in (ids_BS[:1], ids_BS[1:]):
        with traced(model, settings) as part:
            model(row)
        save_trace(part, tmp_path / "part")
        parts.append(load_trace(tmp_path / "part"))
        equal(parts[-1], part)
    equal(parts[0].merge(parts[1]), whole)
    with traced(model, into=load_trace(tmp_path / "part")) as more:
        model(ids_BS[:1])
    assert more.num_tokens == 16


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be merged"):
        Trace(3, 2).merge(Trace(4, 2))
    with pytest.raises(ValueError, match="cannot be merged"):
        Trace(3, 2).merge(Trace(3, 2, settings=TraceSettings(block=1)))
    with pytest.raises(ValueError, match="2 routers, got 1"):
        Trace(3, 2).record([FIRST])
    (tmp_path / "text").write_text("not a trace")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("text", "other.npz", "missing"):
        with pytest.raises(UserError, match="not a saved trace"):
            load_trace(tmp_path / name)
