"""Recomputation under the name that the installed transformers has."""

import warnings

import pytest
from transformers import TrainingArguments

from crossways.training.recompute import recompute_arguments


@pytest.mark.parametrize("on", [False, True])
def test_it_is_what_was_asked_for_and_no_deprecated_name(tmp_path, on):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **recompute_arguments(on))
    assert arguments.gradient_checkpointing is on  # the old name mirrors the new one where there is one
    assert (arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}) is on
