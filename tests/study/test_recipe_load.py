"""Recipes: found, parsed, overridden, and every mistake named in one line."""

import pytest

from crossways.errors import UserError
from crossways.study.load import apply_overrides, find_recipe, load_recipe, parse_yaml, shipped_recipes, validated
from crossways.study.problems import dotted_keys
from crossways.study.publish import recipe_text
from crossways.study.recipe import Recipe

RAW = """
title: A study
model: {num_experts: 8, select: {name: top_k, k: 2}}
variants:
  a: {model: {num_experts: 4}}
  b: {training: {learning_rate: 1e-3}}
"""


def load(*overrides):
    return validated(Recipe, apply_overrides(parse_yaml(RAW, "r"), overrides), "r")


MISTAKES = {
    "trainin.max_steps=1": ("'trainin'", "'training'"),
    "training.max_step=1": ("'training.max_step'", "'training.max_steps'"),
    "max_steps=1": ("'max_steps'", "'training.max_steps'"),
    "model.num_expert=1": ("'model.num_expert'", "'model.num_experts'"),
    "variants.a.model.hiden_size=1": ("'variants.a.model.hiden_size'", "'variants.a.model.hidden_size'"),
    "variants.b.training.learning_rat=1": ("'variants.b.training.learning_rat'", "learning_rate'"),
    "variants.c.label=x": ("'variants.c'", "a, b"),
    "corpus.sorce=x": ("'corpus.sorce'", "'corpus.source'"),
    "training.max_steps=0": ("training.max_steps = 0", "greater than or equal to 1"),
    "training.max_steps=many": ("training.max_steps = 'many'", "integer"),
    "training.dtype=int8": ("'int8'", "'float32', 'bfloat16' or 'float16'"),
    "model.num_experts=few": ("model.num_experts = 'few'", "integer"),
    "model.score=5": ("model.score = 5", "string"),
    "seeds=[1,1]": ("seeds must differ", "[1, 1]"),
    "seeds=[]": ("seeds = []", "at least 1"),
    "match.reference=bb": ("match.reference", "did you mean 'b'"),
    "variants.a.match.knobs=[width]": ("variants.a.match.knobs.0 = 'width'", "'moe_intermediate_size'"),
    "training.max_steps": ("training.max_steps", "dotted.key=value"),
    "training.max_steps.x=1": ("training.max_steps = {'x': 1}", "integer"),
    "title.x=1": ("title is 'A study'", "no keys"),
    "seeds=[0": ("seeds=[0", "YAML"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_with_key_value_and_what_is_accepted(override):
    with pytest.raises(UserError) as caught:
        load(override)
    for part in MISTAKES[override]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_every_depth_and_are_yaml():
    recipe = load("training.max_steps=7", "variants.a.model.num_experts=6", "seeds=[3, 4]", "corpus.max_bytes=null")
    assert recipe.training.max_steps == 7
    assert recipe.variants["a"].model.model_dump(exclude_unset=True) == {"num_experts": 6}
    assert recipe.seeds == (3, 4)
    assert load("variants.b.training.learning_rate=2e-4").variants["b"].training.learning_rate == 2e-4
    assert load("model.select.k=3").model.select == {"name": "top_k", "k": 3}


def test_a_number_with_an_exponent_is_a_number():
    assert parse_yaml("x: 1e-3", "r") == {"x": 0.001}
    assert parse_yaml("x: 3E5", "r") == {"x": 300000.0}
    assert parse_yaml("x: e5", "r") == {"x": "e5"}


def test_yaml_errors_name_the_line():
    with pytest.raises(UserError, match="r, line 3: "):
        parse_yaml("a: 1\nb: 2\nc: : 1\n", "r")
    with pytest.raises(UserError, match="line 3: key 'a' is given twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n", "r")
    with pytest.raises(UserError, match="expected a mapping"):
        parse_yaml("- 1", "r")


def test_a_missing_recipe_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find_recipe("quickstrat")
    with pytest.raises(UserError, match="give a YAML file"):
        load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_survives_being_written_out(name):
    recipe = load_recipe(name)
    again = validated(Recipe, parse_yaml(recipe_text(recipe), "written"), "written")
    assert again.model_dump(mode="json") == recipe.model_dump(mode="json")
    assert again.variants.keys() == recipe.variants.keys()


def test_missing_keys_are_named():
    with pytest.raises(UserError, match="'title' is missing"):
        validated(Recipe, {"variants": {"a": {}}}, "r")


def test_every_known_key_is_listed_once():
    keys = dotted_keys(Recipe)
    assert len(keys) == len(set(keys))
    assert {"training.max_steps", "variants.*.model.select", "comparisons.*.baseline"} <= set(keys)
