"""`crossways routers` and `crossways calibrate` from the command line."""

from __future__ import annotations

import json

import pytest
import torch

from crossways import cli
from crossways.methods import methods
from crossways.models.checkpoint import load_checkpoint


@pytest.fixture
def crossways(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["crossways", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out = capsys.readouterr()
        return exit_.value.code or 0, out.out, out.err

    return run


def test_the_list_names_every_method_with_properties_and_recipe_lines(crossways):
    code, out, _ = crossways("routers")
    assert code == 0
    for name, method in methods().items():
        assert f"{name}  {method.title}" in out
        assert f"{method.paper}: {method.equation}" in out
    assert (
        "not causal, batch-invariant, exact budget, generates by threshold(k=2, per_expert=False, value=None)" in out
    )
    assert "    model:\n      select: {name: top_k, k: 2}" in out


def test_one_method_is_explained_by_its_parts(crossways):
    code, out, _ = crossways("routers", "usmoe")
    assert code == 0
    assert "no  causal" in out
    assert "yes batch-invariant" in out
    assert "select: top_c(k=2, group='sequence')" in out
    assert "proposition 3.1: the optimum of max sum" in out
    assert "score: unified(" in out


def test_an_unknown_method_is_one_line(crossways):
    code, out, err = crossways("routers", "usmo")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown method 'usmo' (did you mean 'usmoe'?)")
    assert err.count("\n") == 1


def test_calibrate_writes_a_model_whose_twin_meets_the_budget(crossways, write_recipe, tmp_path):
    recipe = write_recipe()
    assert crossways("train", recipe, "--variant", "routed", "--out", tmp_path / "runs")[0] == 0
    trained = tmp_path / "runs" / "routed" / "seed-0" / "model"
    code, out, _ = crossways("calibrate", trained, "--out", tmp_path / "new", "--tokens", 3000, "--passes", 2)
    assert code == 0
    assert "layer 2" in out
    report = json.loads((tmp_path / "new" / "calibration.json").read_text())
    assert [router["target"] for router in report["routers"]] == [2, 2]
    assert all(abs(router["twin"] - 2) < 0.25 for router in report["routers"])
    before, after = (load_checkpoint(folder)[0] for folder in (trained, tmp_path / "new"))
    for old, new in zip(before.model.routers, after.model.routers, strict=True):
        assert not torch.equal(old.cutoff, new.cutoff)
    assert all(torch.equal(before.state_dict()[name], value) for name, value in after.named_parameters())
    assert crossways("eval", tmp_path / "new", "--recipe", recipe, "--causal")[0] == 0


def test_calibrate_refuses_in_one_line(crossways, write_recipe, tmp_path):
    recipe = write_recipe(variants__routed={"label": "Routed"})
    assert crossways("train", recipe, "--variant", "routed", "--out", tmp_path / "runs")[0] == 0
    trained = tmp_path / "runs" / "routed" / "seed-0" / "model"
    for arguments, message in (
        ((trained,), "nothing to calibrate"),
        ((trained, "--set", "evaluation.window=1000"), "exceeds the model's context"),
        ((tmp_path / "nowhere",), "no saved model"),
        ((trained, "--corpus", tmp_path / "nowhere.txt"), "nowhere.txt"),
    ):
        code, _, err = crossways("calibrate", *arguments, "--out", tmp_path / "new")
        assert code == 2, message
        assert err.startswith("error: "), message
        assert message in err
    assert not (tmp_path / "new").exists()
