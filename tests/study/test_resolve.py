"""From a recipe to models of equal size."""

import pytest

from crossways.errors import UserError
from crossways.study.dry_run import describe_recipe
from crossways.study.load import load_recipe, parse_yaml, shipped_recipes
from crossways.study.resolve import resolve

# A recipe that starts from a saved model has that model's sizes, and cannot be resolved before it is there.
FRESH = [name for name in shipped_recipes() if not load_recipe(name).init_from]


@pytest.mark.parametrize("name", FRESH)
def test_every_shipped_recipe_has_variants_of_equal_size(name):
    recipe = load_recipe(name)
    variants = resolve(recipe)
    reference = variants[recipe.match.reference].parameters
    for variant in variants.values():
        assert variant.parameters.active == pytest.approx(reference.active, rel=0.01), variant.name
        if variant.config().routed_layers:
            assert variant.parameters.total == pytest.approx(reference.total, rel=0.01), variant.name


@pytest.mark.parametrize("name", FRESH)
def test_a_dry_run_is_yaml_with_widths_parameters_and_operations(name):
    recipe = load_recipe(name)
    described = parse_yaml(describe_recipe(recipe), "dry run")
    assert list(described["resolved"]) == list(recipe.variants)
    for variant in described["resolved"].values():
        assert variant["widths"]
        assert variant["parameters"]["total"] >= variant["parameters"]["active"] > 0
        assert variant["training_flops_per_token"] > 0


def test_quickstart_compares_what_it_says():
    recipe = load_recipe("quickstart")
    configs = {name: variant.config() for name, variant in resolve(recipe).items()}
    assert configs["dense"].routed_layers == []
    assert configs["smoe-share"].load_balance_coef == 0.01
    assert configs["indep-no-balance"].load_balance_coef == 0
    assert configs["fine-grained"].num_experts == 2 * configs["smoe-share"].num_experts
    assert configs["cartesian"].factors == 2
    assert configs["pathmoe"].sharing == {"name": "block", "size": 4}
    assert configs["usmoe"].score == {"name": "unified", "alpha": 0.5}
    assert configs["expert-choice"].select["name"] == "expert_choice"
    together = configs["composition"]
    assert (together.layer, together.sharing["name"], together.score["name"]) == ("cartesian", "block", "unified")
    assert "not evidence" in recipe.notice or "no evidence" in recipe.notice


def test_only_the_fields_given_differ(write_recipe):
    variants = resolve(load_recipe(str(write_recipe(variants__dense__training={"learning_rate": 0.5}))))
    assert variants["dense"].training.learning_rate == 0.5
    assert variants["routed"].training.learning_rate == 0.001
    assert variants["dense"].training.batch_size == variants["routed"].training.batch_size == 2
    assert variants["dense"].model["vocab_size"] == 270


def test_without_a_reference_widths_stay_as_declared(write_recipe):
    variants = resolve(load_recipe(str(write_recipe(match__reference=None))))
    assert variants["dense"].config().intermediate_size == 32


MISTAKES = {
    "more experts per token than experts": (
        {"variants__routed__model": {"select": {"name": "top_k", "k": 9}}},
        "variants.routed.model: selection 'top_k': k must lie in (0, number of experts], got k = 9 with 4 experts",
    ),
    "unknown rule": ({"model__select": {"name": "top_z"}}, "unknown selection 'top_z'"),
    "heads": ({"model__num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    "budget": (
        {"variants__other": {"model": {"num_experts": 2, "select": {"name": "top_k", "k": 2}}}},
        "variant 'other' cannot be brought within 5.0% of 'routed'",
    ),
    "window": ({"evaluation__window": 65}, "evaluation.window = 65 exceeds the context"),
    "sequence": ({"training__sequence_length": 65}, "training.sequence_length = 65 exceeds the context"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_impossible_model_is_one_line(name, write_recipe):
    changes, expected = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        resolve(load_recipe(str(write_recipe(**changes))))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
