"""Two processes that train one model together: the same balancing as one process that sees the text of both."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.processes import Processes, balance_over

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "initializer_range": 0.3,
}
GLOBAL = {"score": "sigmoid", "bias_update_rate": 0.1, "load_balance_coef": 1.0, "load_balance_scope": "global"}
CASES = {
    "bias": GLOBAL,
    "quantile": {"quantile_balancing": True},
    "cutoff": {"select": {"name": "top_c", "k": 2}},
    "normaliser": {"score": "token_softmax", "select": {"name": "top_c", "k": 2}},
    "alone": GLOBAL,
    "own_group": {
        "score": "sigmoid",
        "bias_update_rate": 0.1,
        "load_balance_coef": 1.0,
        "load_balance_scope": "global",
    },
}
PROGRAM = """
import sys
import torch
from torch import distributed
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.processes import balance_over

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
cases, sizes, ids_PBS = torch.load(f"{folder}/cases.pt")
own = [distributed.new_group([one]) for one in range(2)][rank]
found = {}
for name, fields in cases.items():
    torch.manual_seed(0)
    model = CrosswaysForCausalLM(CrosswaysConfig(**sizes, **fields)).train()
    if name in ("alone", "own_group"):
        balance_over(model, **({"alone": True} if name == "alone" else {"group": own}))
    model.model.pass_is_step = False
    said = []
    for ids_BS in ids_PBS:
        out = model(ids_BS[rank::2], labels=ids_BS[rank::2])
        out.loss.backward()
        losses = (out.aux_losses or {}) | {"loss": out.loss}
        said.append({key: value.detach() for key, value in losses.items()})
    model.model.finish_step()
    buffers = {key: value for key, value in model.named_buffers() if ".router." in key}
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    found[name] = {"said": said, "buffers": buffers, "grads": grads}
torch.save(found, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def text():
    """Two passes of four rows; a process takes every other row."""
    return torch.randint(1, 37, (2, 4, 8), generator=torch.Generator().manual_seed(0))


def between():
    """ReMoE with a target between the density of one process' text and that of both."""
    fields = {"score": "relu", "select": "positive"}
    densities = []
    for rank in range(2):
        _, said = one_process(fields | {"sparsity_budget": 2.0}, slice(rank, None, 2))
        densities.append(float(torch.stack([r.density() for out in said for r in out.routings]).mean()))
    target = (3 * min(densities) + max(densities)) / 4
    return fields | {"sparsity_budget": SIZES["num_experts"] * target}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save((CASES | {"sparsity": between()}, SIZES, text()), folder / "cases.pt")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(folder / "program.py"), str(folder), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def one_process(fields, rows=slice(None)):
    """The same in this process, with the rows of both or of one; it needs no gathering."""
    torch.manual_seed(0)
    scope = {"load_balance_scope": "step"} if "load_balance_scope" in fields else {}
    model = CrosswaysForCausalLM(CrosswaysConfig(**SIZES, **(fields | scope))).train()
    model.model.pass_is_step = False
    said = []
    for ids_BS in text():
        out = model(ids_BS[rows], labels=ids_BS[rows], output_routings=True)
        out.loss.backward()
        said.append(out)
    model.model.finish_step()
    return model, said


def buffers_of(model):
    return {key: value for key, value in model.named_buffers() if ".router." in key}


@pytest.mark.parametrize("name", ["bias", "sparsity"])
def test_what_moves_with_the_step_moves_by_the_text_of_both(both, name):
    fields = between() if name == "sparsity" else CASES[name]
    model, _ = one_process(fields)
    for found in both:
        for key, value in buffers_of(model).items():
            torch.testing.assert_close(found[name]["buffers"][key], value, rtol=1e-5, atol=1e-12, msg=key)
    # Not vacuous: a process by itself would have moved otherwise.
    assert any(
        not torch.equal(value, buffers_of(model)[key])
        for rank in range(2)
        for key, value in buffers_of(one_process(fields, slice(rank, None, 2))[0]).items()
    )


def test_loss_and_gradient_are_those_of_one_process(both):
    model, said = one_process(CASES["bias"])
    for number, out in enumerate(said):
        for key, value in (out.aux_losses | {"loss": out.loss}).items():
            mean = torch.stack([found["bias"]["said"][number][key] for found in both]).mean(0)
            torch.testing.assert_close(mean, value.detach(), msg=key)
    for key, parameter in model.named_parameters():
        mean = torch.stack([found["bias"]["grads"][key] for found in both]).mean(0)
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["quantile", "cutoff", "normaliser"])
def test_prices_and_estimates_are_means_over_processes(both, name):
    for key, value in both[0][name]["buffers"].items():
        torch.testing.assert_close(both[1][name]["buffers"][key], value, msg=key)
    if name == "quantile":
        alone = [buffers_of(one_process(CASES[name], slice(rank, None, 2))[0]) for rank in range(2)]
        for key, value in both[0][name]["buffers"].items():
            torch.testing.assert_close(value, (alone[0][key] + alone[1][key]) / 2, msg=key)
        return
    # The first router's estimates: 0.99 of the first pass' mean, 0.01 of the second's.
    said = [one_process(CASES[name], slice(rank, None, 2))[1] for rank in range(2)]
    field = "cutoff_C" if name == "cutoff" else "normaliser_E"
    seen = [torch.stack([getattr(said[rank][p].routings[0], field) for rank in range(2)]).mean(0) for p in range(2)]
    estimate = both[0][name]["buffers"][f"model.layers.0.mlp.router.{name}"]
    torch.testing.assert_close(estimate, 0.99 * seen[0] + 0.01 * seen[1])


@pytest.mark.parametrize("name", ["alone", "own_group"])
def test_a_process_by_itself_counts_its_own(both, name):
    for rank, found in enumerate(both):
        model, said = one_process(CASES[name], slice(rank, None, 2))
        for key, value in buffers_of(model).items():
            assert torch.equal(found[name]["buffers"][key], value)
        for number, out in enumerate(said):
            torch.testing.assert_close(found[name]["said"][number]["load_balance"], out.aux_losses["load_balance"])


def test_one_process_without_a_group():
    x_E = torch.tensor([1.0, torch.nan])
    assert len(Processes()) == 1
    assert Processes().sum(x_E) is x_E
    assert Processes().mean(x_E) is x_E


def test_a_model_with_a_choice_of_processes_is_copied_and_pickled():
    model = CrosswaysForCausalLM(CrosswaysConfig(**SIZES))
    balance_over(model, alone=True)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(router.processes.alone for router in duplicate.model.routers)


def test_the_chosen_group_is_the_one_that_is_asked(monkeypatch):
    asked, group = [], object()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda given: asked.append(given) or 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, group: asked.append(group))
    Processes(group).sum(torch.ones(1))
    assert asked == [group, group]
    assert len(Processes(group, alone=True)) == 1
