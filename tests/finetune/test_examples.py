import json

import pytest

from crossways.errors import UserError
from crossways.finetune.examples import docstring_examples, load_examples
from crossways.finetune.settings import ExampleSettings


def test_functions_become_instructions_and_their_docstrings_answers():
    source = 'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b\n\ndef bare():\n    return 1\n'
    (example,) = docstring_examples(source)
    assert example.completion == "Return the sum of a and b."
    assert "return a + b" in example.prompt
    assert "sum of" not in example.prompt
    assert example.prompt.endswith("### Response:\n")


def test_what_does_not_parse_or_is_too_long_gives_nothing():
    assert list(docstring_examples("def broken(:")) == []
    assert list(docstring_examples('def f():\n    """A docstring of some length."""\n    return 1', longest=10)) == []


def test_alpaca_rows_with_and_without_input(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": "Add.", "input": "1 2", "output": "3"},
                {"instruction": "Hi", "input": "", "output": "Ho"},
            ]
        )
    )
    examples = load_examples(ExampleSettings(source=str(path), validation_fraction=0.5))
    prompts = sorted(e.prompt for e in examples.train + examples.validation)
    assert ["### Input:\n1 2" in prompt for prompt in prompts] == [True, False]


def test_a_split_is_disjoint_and_repeatable(alpaca_file):
    settings = ExampleSettings(source=str(alpaca_file), validation_fraction=0.25)
    first, again = load_examples(settings), load_examples(settings)
    assert first == again
    assert not set(first.train) & set(first.validation)
    assert len(first.validation) == 9
    assert len(load_examples(ExampleSettings(source=str(alpaca_file), max_examples=10)).train) == 9


def test_repeated_examples_never_stand_on_both_sides(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' * 5)
    with pytest.raises(UserError, match="1 different"):
        load_examples(ExampleSettings(source=str(path)))


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "output": "b"}\n' * 2)
    with pytest.raises(UserError, match="instruction"):
        load_examples(ExampleSettings(source=str(path)))


def test_the_standard_library_has_examples():
    examples = load_examples(ExampleSettings(max_examples=50))
    assert len(examples.train) == 45
    assert all(len(e.completion) >= 20 for e in examples.train)
