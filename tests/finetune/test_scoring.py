import math

import pytest
import torch

from crossways.errors import UserError
from crossways.finetune.examples import Example
from crossways.finetune.scoring import encode, score_answers
from crossways.finetune.settings import FinetuneRecipe
from crossways.surgery.checkpoint import load_causal_lm

EXAMPLES = [
    Example("the sum of\n", "two numbers is"),
    Example("a list\n", "returns"),
    Example("print the file name\n", "value of a text"),
]


@pytest.fixture
def loaded(routed_folder):
    return load_causal_lm(routed_folder)


def test_only_answers_count_and_they_end_with_end_of_text(loaded):
    _, tokenizer = loaded
    ids, labels = encode(tokenizer, EXAMPLES[0], 32)
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert [label for label in labels if label != -100] == tokenizer("two numbers is")["input_ids"] + [0]
    assert encode(tokenizer, EXAMPLES[0], 3) is None


def test_the_figure_is_the_mean_over_answer_tokens_whatever_the_batch(loaded):
    model, tokenizer = loaded
    total = tokens = 0
    for example in EXAMPLES:
        ids, labels = encode(tokenizer, example, 32)
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[i - 1, label]) for i, label in enumerate(labels) if label != -100)
        tokens += sum(label != -100 for label in labels)
    for batch_size in (1, 3):
        found = score_answers(model, tokenizer, EXAMPLES, max_length=32, batch_size=batch_size)
        assert found.tokens == tokens
        assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert found.budget == 2.0


def test_no_answer_within_reach_is_said(loaded):
    with pytest.raises(UserError, match="max_length"):
        score_answers(*loaded, EXAMPLES, max_length=2, batch_size=2)


def test_labels_are_those_that_trl_trains_on(loaded, recipe_fields, tmp_path):
    pytest.importorskip("trl")
    from crossways.finetune.run import _trainer

    model, tokenizer = loaded
    trainer = _trainer(
        FinetuneRecipe.model_validate(recipe_fields), model, tokenizer, EXAMPLES, tmp_path, 0, progress=False
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for row, example in enumerate(EXAMPLES):
        ids, labels = encode(tokenizer, example, 32)
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["labels"][row, : len(ids)].tolist() == labels
