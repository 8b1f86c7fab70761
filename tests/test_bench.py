"""The benchmark's parts: its cases, what it finds right and wrong, its table and the rows it keeps. No timing."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from crossways.native import bits

ROOT = Path(__file__).parents[1]
MODULES = (
    *("bench", "contenders", "experts", "field", "measure", "problems", "routing", "table", "train_throughput"),
    *("reroute", "step_profile"),  # commands of their own; that they can be imported is all that is looked at here
)


@pytest.fixture
def bench(monkeypatch):
    """The modules of `benchmarks/`, which are scripts beside each other and not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = types.SimpleNamespace(**{name: __import__(name) for name in MODULES})
    yield found
    for name in MODULES:
        sys.modules.pop(name, None)


def test_shapes_are_read_and_refused(bench):
    case = bench.problems.case_of("64/32/8/2", 10, "hot")
    assert (case.width, case.expert_width, case.experts, case.k, str(case)) == (64, 32, 8, 2, "64/32/8/2/10 hot")
    assert case.flops() == 6 * 10 * 2 * 64 * 32
    assert case.flops(backward=True) == 3 * case.flops()
    for wrong in ("64/32/8", "64/32/8/2/10", "a/b/c/d", "64/32/8/0", "64/32/2/3"):
        with pytest.raises(ValueError, match=wrong):
            bench.problems.case_of(wrong, 1)


def test_bytes_by_hand(bench):
    case = bench.problems.case_of("2048/1024/64/8", 512)
    assert case.expert_bytes(itemsize=2) == 12_582_912  # 3 matrices of 2048 x 1024
    assert case.least_bytes(64, 2) == 64 * 12_582_912 + 2 * 2_097_152  # each once; x and y of 512 x 2048
    assert case.least_bytes(64, 2, backward=True) == 3 * 64 * 12_582_912 + 4 * 2_097_152
    assert case.least_bytes(10, 4) == 10 * 2 * 12_582_912 + 4 * 2_097_152


def test_floors_by_hand(bench):
    """Six experts of 3 x 64 x 32 numbers, three of them touched, 50 tokens with 2 experts each."""
    problem = bench.problems.build(bench.problems.case_of("64/32/6/2", 50, "empty"), torch.bfloat16)
    assert problem.touched == 3
    machine = bench.experts.Machine("cpu", {"bfloat16": 1e9}, bandwidth=1e9)
    products = 6 * 50 * 2 * 64 * 32
    assert machine.floor(problem, False) == (pytest.approx(products / 1e9), "products")
    assert machine.floor(problem, True) == (pytest.approx(3 * products / 1e9), "products")
    machine.flops["bfloat16"] = 1e12
    matrices, rows = 3 * 3 * 64 * 32 * 2, 50 * 64 * 2
    assert machine.floor(problem, False) == (pytest.approx((matrices + 2 * rows) / 1e9), "memory")
    assert machine.floor(problem, True) == (pytest.approx((3 * matrices + 4 * rows) / 1e9), "memory")


def test_the_reference_is_naive(bench):
    problem = bench.problems.build(bench.problems.case_of("16/8/6/2", 12, "empty"), torch.float32)
    plain = bench.problems.crossways_contender(problem, "naive")
    for backward in (False, True):
        expected = problem.expected(backward)
        for one, other in zip(problem.results(plain, backward), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert expected[3][3:].count_nonzero() == 0  # experts without tokens have gradients too
    assert len(problem.expected(backward=False)) == 5  # not computed again


def test_loads_are_as_they_are_called(bench):
    loads = {}
    for load in bench.problems.LOADS:
        case = bench.problems.case_of("8/8/10/2", 1000, load)
        weight_TK, index_TK = bench.problems.route(case, torch.Generator().manual_seed(0))
        assert all(len(set(row)) == 2 for row in index_TK.tolist())
        assert weight_TK.sum(-1).sub(1).abs().max() < 1e-5
        assert weight_TK.min() > 1e-4 or load == "even"  # nobody's errors are hidden by a weight of zero
        loads[load] = index_TK.flatten().bincount(minlength=10)
    assert loads["even"].min() > 100
    assert loads["hot"][0] >= 900
    assert loads["empty"][5:].sum() == 0
    assert loads["empty"][:5].min() > 100


@pytest.mark.parametrize("load", ["even", "empty"])
def test_who_is_right_takes_part_and_who_is_wrong_is_named(bench, monkeypatch, load):
    problem = bench.problems.build(bench.problems.case_of("32/16/6/2", 40, load), torch.float32)
    names = ("loop", "grouped_mm", "transformers:grouped_mm", "transformers:eager", "triton")
    field = bench.field.right(problem, names)
    assert list(field.taking_part) == ["dense", *names[:4]]
    assert 0 < max(field.errors.values()) < 1e-5
    assert set(field.left_out) == {"triton"}
    assert "CUDA" in field.left_out["triton"]
    assert all(list(seconds) == list(field.taking_part) for seconds in field.first.values())
    assert problem.reference == []

    def twice(problem, backend):
        made = bench.problems.crossways_contender(problem, backend)
        return bench.problems.Contender(lambda: 2 * made.run(), made.leaves)

    monkeypatch.setattr(bench.contenders, "ours", twice)
    field = bench.field.right(problem, ("loop",))
    assert list(field.taking_part) == ["dense"]
    assert field.left_out["loop"].startswith("WRONG: ")
    assert "1.0e+00" in field.left_out["loop"]
    monkeypatch.setattr(bench.contenders, "ours", lambda *_: 1 / 0)
    field = bench.field.right(problem, ("loop",))
    assert field.left_out["loop"] == "FAILED with ZeroDivisionError: division by zero"


@pytest.mark.parametrize("spoilt", [False, True])
def test_each_pass_that_is_timed_is_held_to_naive(bench, monkeypatch, spoilt):
    """A backend may take another path where no gradients are wanted: whoever is wrong in one of the two is out."""
    problem = bench.problems.build(bench.problems.case_of("32/16/6/2", 40), torch.float32)

    def wrong_in_one(problem, backend):
        made = bench.problems.crossways_contender(problem, backend)
        return bench.problems.Contender(
            lambda: made.run() * (1.5 if torch.is_grad_enabled() == spoilt else 1), made.leaves
        )

    monkeypatch.setattr(bench.contenders, "ours", wrong_in_one)
    assert "by 5.0e-01" in bench.field.right(problem, ("loop",)).left_out["loop"]
    assert bench.field.right(problem, ("loop",), passes=(not spoilt,)).left_out == {}
    assert bench.field.right(problem, ("loop",), passes=(spoilt,)).left_out.keys() == {"loop"}


def test_a_peer_whose_backward_would_take_minutes_is_timed_forward_only(bench, monkeypatch):
    monkeypatch.setattr(bench.contenders, "EAGER_LIMIT", 10)
    problem = bench.problems.build(bench.problems.case_of("32/16/6/2", 40), torch.float32)
    field = bench.field.right(problem, ("loop", "transformers:eager"))
    assert [list(field.first[backward]) for backward in (False, True)] == [
        ["dense", "loop", "transformers:eager"],
        ["dense", "loop"],
    ]
    assert list(field.left_out) == ["transformers:eager with backward"]
    assert list(bench.experts.timed(problem, field, 0.01, backward=True)) == ["dense", "loop"]
    assert "transformers:eager" in bench.experts.timed(problem, field, 0.01, backward=False)


class FakeEvent:
    """A CUDA event on a clock that whoever runs puts forward."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, stop):
        return 1e3 * (stop.at - self.at)


def test_on_a_gpu_nobody_is_judged_by_a_pass_in_which_it_compiled(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    problem = bench.problems.build(bench.problems.case_of("32/16/6/2", 40), torch.float32)
    problem.device = "cuda"
    cost = {"dense": 1.0, "scattermoe": 1.5}

    def contender(name):
        def run():
            FakeEvent.now += cost[name]
            return problem.leaves[0]

        return bench.problems.Contender(run, problem.leaves)

    everybody = {name: contender(name) for name in cost}
    field = bench.field.Field(everybody, {}, {}, {False: {"dense": 1.0, "scattermoe": 500.0}})
    monkeypatch.setattr(bench.experts, "resolve_backend", lambda *_: "triton")
    monkeypatch.setattr(bench.experts, "PEERS", {"cuda": ()})
    times = bench.experts.timed(problem, field, 0.01, backward=False)
    assert times["dense"][:3] == pytest.approx([1.0] * 3)
    assert times["scattermoe"][:3] == pytest.approx([1.5] * 3)


def test_one_wrong_number_among_the_gradients_is_seen(bench, monkeypatch):
    problem = bench.problems.build(bench.problems.case_of("32/16/6/2", 40), torch.float32)
    made = bench.problems.crossways_contender(problem, "loop")
    for number, name in enumerate(bench.problems.NAMES):
        results = [result.clone() for result in problem.results(made, backward=True)]
        results[number].view(-1)[-1] += results[number].norm()
        error, where = problem.error(made, results)
        assert (error, where) == (pytest.approx(1.0, rel=1e-3), name)


def test_a_result_that_is_no_number_is_wrong(bench):
    problem = bench.problems.build(bench.problems.case_of("32/16/6/2", 40), torch.float32)
    made = bench.problems.crossways_contender(problem, "loop")
    error, where = problem.error(made, [result * torch.nan for result in problem.results(made, backward=True)])
    assert not error <= 1e9
    assert where in bench.problems.NAMES


def reference_experts(x_TD, weight_TK, index_TK, gate_EFD, value_EFD, down_EDF):
    """What a peer computes, token by token."""
    rows = []
    for x_D, weight_K, index_K in zip(x_TD, weight_TK, index_TK, strict=True):
        hidden = [functional.silu(gate_EFD[e] @ x_D) * (value_EFD[e] @ x_D) for e in index_K]
        rows.append(sum(w * (down_EDF[e] @ h) for w, e, h in zip(weight_K, index_K, hidden, strict=True)))
    return torch.stack(rows)


class FakeGLUMLP(nn.Module):
    """ScatterMoE 0.3's layout: (E, 2F, D) with the gate in the second half, (E, D, F)."""

    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        self.experts, self.output_experts = nn.Module(), nn.Module()
        self.experts.weight = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, input_size))
        self.output_experts.weight = nn.Parameter(torch.empty(num_experts, input_size, hidden_size))

    def forward(self, x, expert_p, expert_idxs):
        value, gate = self.experts.weight.chunk(2, 1)
        return reference_experts(x, expert_p, expert_idxs, gate, value, self.output_experts.weight)


class FakeDropless(nn.Module):
    """MegaBlocks 0.10's layout: w1 (gate), v1 and w2 are (E F, D)."""

    def __init__(self, args):
        super().__init__()
        self.args, self.mlp = args, nn.Module()
        for name in ("w1", "v1", "w2"):
            matrix = torch.empty(args.moe_num_experts * args.ffn_hidden_size, args.hidden_size, dtype=torch.bfloat16)
            setattr(self.mlp, name, nn.Parameter(matrix))

    def forward_once(self, x, expert_weights, top_experts):
        shape = self.args.moe_num_experts, self.args.ffn_hidden_size, self.args.hidden_size
        gate, value, down = (matrix.view(shape) for matrix in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        return reference_experts(x, expert_weights, top_experts, gate, value, down.mT), None


def fake_routing_inputs(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, activation_type, is_inference_mode_enabled
):
    """SonicMoE's: w1 (2F, D, E) with gate and value rows in turn, w2 (D, F, E), pairs by token."""
    up, down = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    k = len(token_indices) // len(x)
    index = expert_indices.view(-1, k).long()
    return reference_experts(x, router_scores.view(-1, k), index, up[:, ::2], up[:, 1::2], down), None


@pytest.mark.parametrize("name", ["scattermoe", "megablocks", "sonicmoe"])
def test_peers_get_their_layout(bench, monkeypatch, name):
    """Against fakes of the signatures and layouts that their sources document; the packages need a GPU."""
    fakes = {
        "scattermoe.mlp": types.SimpleNamespace(GLUMLP=FakeGLUMLP),
        "megablocks.layers.dmoe": types.SimpleNamespace(ParallelDroplessMLP=FakeDropless),
        "megablocks.layers.arguments": types.SimpleNamespace(Arguments=types.SimpleNamespace),
        "sonicmoe.functional": types.SimpleNamespace(moe_general_routing_inputs=fake_routing_inputs),
        "sonicmoe.enums": types.SimpleNamespace(ActivationType=types.SimpleNamespace(SWIGLU="swiglu")),
    }
    monkeypatch.setattr(bench.contenders, "_import", fakes.__getitem__)
    dtype = torch.bfloat16 if name == "megablocks" else torch.float32
    problem = bench.problems.build(bench.problems.case_of("16/8/5/2", 12), dtype)
    field = bench.field.right(problem, (name,))
    assert field.left_out == {}
    assert name in field.taking_part


@pytest.mark.parametrize("name", ["scattermoe", "megablocks", "sonicmoe"])
def test_peers_that_are_not_installed_say_so(bench, monkeypatch, name):
    for package in ("scattermoe", "megablocks", "sonicmoe"):
        monkeypatch.setitem(sys.modules, package, None)
    problem = bench.problems.build(bench.problems.case_of("16/8/5/2", 12), torch.bfloat16)
    left_out = bench.field.right(problem, (name,)).left_out
    assert "Error" in left_out[name]
    assert name in left_out[name]


def test_contenders_in_turn(bench):
    log = []
    runs = {name: lambda name=name: log.append(name) for name in "ab"}
    times = bench.measure.in_turn(runs, seconds=0.0, least=3, warm=2, after=lambda: log.append("-"))
    assert {name: len(spent) for name, spent in times.items()} == {"a": 3, "b": 3}
    assert "".join(log) == "a-b-" * 5


def test_who_is_far_too_slow_runs_once(bench):
    clock = {"fast": 1.0, "slow": 100.0}
    times = bench.measure.in_turn(
        {name: lambda name=name: name for name in clock}, seconds=0.0, least=3, warm=2, clock=lambda run: clock[run()]
    )
    assert times == {"fast": [1.0] * 3, "slow": [100.0]}
    assert bench.measure.ratio(times["slow"], times["fast"]) == "100.0 once"
    assert bench.measure.ratio([2.0, 4.0, 6.0], [1.0, 1.0, 1.0]) == "4.00±2.00"


def test_who_does_not_matter_stops_early_and_the_others_go_on(bench, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(bench.measure.time, "perf_counter", lambda: float(next(now)))  # every round takes a second
    clock = {
        "dense": 1.0,
        "ours": 2.0,
        "peer": 3.0,
        "slower": 4.0,
        "slowest": 90.0,
        "dear": 300.0,
        "cold": 1.0,
        "seen late": 20.0,
    }

    def wanted(times):
        return {"dense", "ours", min({"peer", "slower", "slowest"} & times.keys(), key=lambda name: times[name][0])}

    known = {
        "dense": 1.0,
        "ours": 2.0,
        "peer": 80.0,
        "slower": 81.0,
        "slowest": 90.0,
        "dear": 300.0,
        "cold": 4.0,
    }  # not of all
    times = bench.measure.in_turn(
        {name: lambda name=name: name for name in clock},
        *(10.0, 3, 60, 0),
        clock=lambda run: clock[run()],
        known=known,
        wanted=wanted,
    )
    assert {name: len(spent) for name, spent in times.items()} == {
        **{"dense": 10, "ours": 10, "peer": 10},  # the fastest of the peers, though its first pass was far too slow
        **{"slower": 1, "slowest": 1, "dear": 1, "seen late": 1},
        "cold": 6,  # half of the time; 4 s in its first pass are not long
    }
    assert (times["dear"], times["seen late"]) == ([300.0], [20.0])
    assert bench.measure.ratio([2.0, 4.0, 60.0], [1.0, 1.0]) == bench.measure.ratio([2.0, 4.0], [1.0, 1.0])


def test_pages_that_cannot_be_kept_are_said_to_be_so(bench, monkeypatch):
    monkeypatch.setattr(bench.measure.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    case = bench.problems.case_of("16/8/5/2", 12)
    (row,) = bench.experts.with_kept_pages(case, "float32", "cpu", 0.01, bench.experts.Machine("cpu"))
    assert "C library" in row.notes["pages kept"]
    asked = []
    library = types.SimpleNamespace(mallopt=lambda *setting: asked.append(setting) or 1)
    monkeypatch.setattr(bench.measure.ctypes, "CDLL", lambda name: library)
    assert bench.measure.keep_pages()
    assert asked == [(-4, 0), (-1, -1)]


def test_a_rule_is_timed_once_for_all_dtypes(bench):
    case = bench.problems.case_of("16/8/16/2", 64)
    rule = bench.routing.rules(2, 16)["top-k"]
    rows = bench.routing.share("top-k", rule, case, ("float32", "bfloat16"), "cpu", 0.01)
    whats = ("routing forward", "routing forward+backward")
    assert [(row.what, row.dtype) for row in rows] == [(w, d) for w in whats for d in ("float32", "bfloat16")]
    assert all("2.0 a token" in row.cells["bound"] and len(row.cells) == 2 for row in rows)


def test_fast_and_plain_paths_of_every_rule_are_compared(bench, monkeypatch):
    case = bench.problems.case_of("16/8/16/2", 512)
    rules = bench.routing.rules(2, 16)
    assert len(rules) == 17
    for name, rule in rules.items():
        if name != "base":
            assert bench.routing.wrong(rule, *bench.routing.scores_for(rule, case, "cpu")) == ""
    if bench.routing.native.fits(torch.zeros(10**4)):
        right = bits.of_top_k
        monkeypatch.setattr(bits, "of_top_k", lambda choice, *others: right(choice.flip(0), *others))
        given = bench.routing.scores_for(rules["top-k"], case, "cpu")
        assert "tokens" in bench.routing.wrong(rules["top-k"], *given)


def row_of(bench, case, cells=None, notes=None):
    return bench.table.Row("forward", case, "float32", cells or {"bound": "1 ms"}, notes or {})


def test_one_failing_case_is_printed_and_the_others_go_on(bench, capsys, tmp_path):
    calls = []

    def job(case, run):
        return bench.table.Job("experts", case, "float32", run)

    def good():
        calls.append("good")
        cells = {"bound": "1 ms", "fused": "1.10±0.01"}
        return [row_of(bench, "good", cells, {"peer": "not installed", "other peer": "FAILED with KeyError: 1"})]

    def wrong():
        return [row_of(bench, "wrong", notes={"fused": "WRONG: x differs"})]

    jobs = [job("bad", lambda: 1 / 0), job("wrong", wrong), job("good", good)]
    store = bench.table.Store(tmp_path / "rows.jsonl", ["settings"])
    assert bench.table.print_table(jobs, ("fused", "peer"), store, peers=("other peer",)) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "| forward | good | float32 | 1 ms | - | 1.10±0.01 | - | - | - |" in lines
    assert "| experts | bad | float32 | FAILED | - | - | - | - | - |" in lines
    why = "FAILED with ZeroDivisionError: division by zero"
    assert f"without this row: {why} (1 of the cases, the first bad float32)" in lines
    assert "without peer: not installed (1 of the cases, the first good float32)" in lines
    # A second run measures again only what was not right.
    again = bench.table.Store(tmp_path / "rows.jsonl", ["settings"])
    assert bench.table.print_table(jobs, ("fused", "peer"), again, peers=("other peer",)) == 2
    assert calls == ["good"]
    assert capsys.readouterr().out.splitlines() == lines
    other = bench.table.Store(tmp_path / "rows.jsonl", ["other settings"])
    bench.table.print_table(jobs[2:], ("fused", "peer"), other)
    assert calls == ["good", "good"]


def test_a_line_that_a_kill_cut_short_is_left_out(bench, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    store = bench.table.Store(path, [])
    job = bench.table.Job("experts", "a", "float32", list)
    store.keep(job, [row_of(bench, "a")], 61.5)
    path.write_text(path.read_text() + json.dumps({"key": "b"})[:5])
    again, other = bench.table.Store(path, []), bench.table.Job("experts", "b", "float32", list)
    assert again.rows(job) == ([row_of(bench, "a")], 61.5)
    again.keep(other, [row_of(bench, "b")], 1.0)
    assert bench.table.Store(path, []).rows(other) == ([row_of(bench, "b")], 1.0)
    assert bench.table.print_table([job, other], (), bench.table.Store(path, [])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "took 1:02, of which 1:02 in earlier runs: experts 1:02"


def test_held_out_shapes_run_from_command_to_table(bench, capsys, tmp_path):
    command = ["--shape", "24/16/6/2", "--tokens", "4", "70", "--load", "hot", "--dtype", "float32"]
    assert bench.bench.main([*command, "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    whats = ["| peak", "| peak", "| forward", "| forward+backward", "| few tokens", "| few tokens, cold"]
    assert [row[0] for row in rows[2:]] == whats
    assert rows[-1][1] == "24/16/6/2/4 hot"
    assert "of peak" in rows[4][3]
    assert rows[4][4].endswith((" products", " memory"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--shape", "1/2/3"], "D/F/E/k"),
        (["--tokens", "5"], "--tokens goes with --shape"),
        (["--only", "nothing"], "invalid choice"),
    ],
)
def test_mistakes_on_the_command_line_end_with_two(bench, capsys, command, message):
    with pytest.raises(SystemExit) as ended:
        bench.bench.parse([*command, "--device", "cpu"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_the_gpu_table_without_a_gpu_says_so(bench, capsys):
    with pytest.raises(SystemExit):
        bench.bench.parse(["--device", "cuda"])
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_everything_is_on_the_list(bench):
    options = bench.bench.parse(["--device", "cpu"])
    jobs = list(bench.bench.jobs(options, bench.experts.Machine("cpu")))
    sections = [job.section for job in jobs]
    assert set(sections) == {"peak", *bench.bench.SECTIONS}
    assert len({(job.section, job.case, job.dtype) for job in jobs}) == len(jobs)
    cases = {job.case for job in jobs}
    assert {"512/512/16/2/16384", "2048/1024/64/8/2048", "512/256/256/8/2048", "512/256/64/8/4096 hot"} <= cases
    assert list(dict.fromkeys(sections)) == ["peak", *bench.bench.SECTIONS]  # the allocator's section last
    quick = list(bench.bench.jobs(bench.bench.parse(["--device", "cpu", "--quick"]), bench.experts.Machine("cpu")))
    assert set(sections) == {job.section for job in quick}
    assert len(quick) < len(jobs)
