import json
import warnings

import pytest
import torch

import crossways
from crossways.cli import main
from crossways.errors import UserError
from crossways.finetune.grid import run_grid
from crossways.finetune.load import load_finetune_recipe, shipped_finetune_recipes
from crossways.finetune.settings import FinetuneRecipe
from crossways.surgery.handle import handle_of
from crossways.surgery.rule import build_rule


def test_every_shipped_recipe_is_valid_and_its_rules_exist():
    assert set(shipped_finetune_recipes()) == {"smollm2-docstrings", "usmoe-alpaca"}
    for name in shipped_finetune_recipes():
        recipe = load_finetune_recipe(name)
        for rule in recipe.rules.values():
            assert build_rule(rule.rule, **rule.model_dump(exclude={"rule"}))


def test_full_fine_tuning_learns_and_is_not_repeated(recipe_fields, tmp_path):
    pytest.importorskip("trl")
    recipe = FinetuneRecipe.model_validate(recipe_fields)
    records = run_grid(recipe, tmp_path)
    assert [(r.rule, r.trained_on) for r in records] == [
        ("token-choice", "clean"),
        ("token-choice", "corrupted"),
        ("usmoe", "clean"),
        ("usmoe", "corrupted"),
    ]
    for record in records:
        own = "clean" if record.trained_on == "clean" else "corrupted"
        assert record.after[own].perplexity < record.before[own].perplexity
        assert record.after["clean"].experts_per_token == pytest.approx(2.0, abs=0.05)
    assert [r.leaky for r in records] == [False, False, True, True]
    assert records[0].after["clean"].causal_perplexity is None
    assert records[2].after["clean"].causal_perplexity > 0
    stamp = (tmp_path / "usmoe/clean/seed-0/record.json").stat().st_mtime_ns
    assert run_grid(recipe, tmp_path) == records
    assert (tmp_path / "usmoe/clean/seed-0/record.json").stat().st_mtime_ns == stamp
    assert "(leaky)" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="tuning"):
        run_grid(recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"max_steps": 5})}), tmp_path)
    model = crossways.from_pretrained(tmp_path / "usmoe/clean/seed-0/model")
    assert handle_of(model).routers["model.layers.0.mlp"].select.name == "top_c"
    assert all(handle_of(model).estimates())
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_leaves_what_it_names_and_warns_of_nothing(recipe_fields, tmp_path, recompute):
    pytest.importorskip("trl")
    recipe_fields["tuning"] |= {"max_steps": 1, "gradient_checkpointing": recompute}
    recipe_fields |= {"rules": {"own": {"rule": "token-choice"}}, "train_on": ["clean"]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_grid(FinetuneRecipe.model_validate(recipe_fields), tmp_path)
    assert [str(w.message) for w in told if issubclass(w.category, FutureWarning)] == []
    assert sorted(path.name for path in (tmp_path / "own/clean/seed-0").iterdir()) == ["model", "record.json"]


@pytest.mark.parametrize("parameters", [None, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]])
def test_adapters_train_alone_and_are_merged(recipe_fields, tmp_path, parameters):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    recipe_fields |= {
        "rules": {"usmoe": {"rule": "usmoe", "k": 1.5}},
        "train_on": ["clean"],
        "lora": {"r": 2, "alpha": 4, "target_parameters": parameters},
    }
    (record,) = run_grid(FinetuneRecipe.model_validate(recipe_fields), tmp_path)
    model = crossways.from_pretrained(tmp_path / "usmoe/clean/seed-0/model")
    assert record.trainable_parameters < sum(p.numel() for p in model.parameters()) / 3
    assert record.after["clean"].perplexity < record.before["clean"].perplexity
    assert record.after["clean"].experts_per_token == pytest.approx(1.5, abs=0.05)
    assert handle_of(model) is not None


def test_mistakes_are_one_line_and_exit_code_two(recipe_fields, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.yaml"
    for change, expected in (
        ({"model": str(tmp_path / "nothing")}, "does not exist"),
        ({"rules": {"x": {"rule": "usmo"}}}, "did you mean 'usmoe'"),
        ({"tunning": {}}, "tuning"),
    ):
        path.write_text(json.dumps(recipe_fields | change))
        monkeypatch.setattr("sys.argv", ["crossways", "finetune", str(path), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
