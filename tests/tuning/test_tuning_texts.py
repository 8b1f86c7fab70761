"""The texts of a tuning and the likelihood of their documents."""

import dataclasses

import numpy as np
import pytest
import torch

from crossways.errors import UserError
from crossways.evaluation.documents import documents_batches
from crossways.evaluation.perplexity import score_batches
from crossways.evaluation.settings import EvaluationSettings
from crossways.surgery.reroute import reroute
from crossways.tuning.check import load_text, save_text
from crossways.tuning.score import score_text
from crossways.tuning.texts import make_texts


@pytest.fixture
def texts(tokenizer, corpus, protocol, settings):
    return make_texts(tokenizer, corpus, protocol, settings)


def documents(text):
    """The tokens of each document, put together from its windows."""
    found = {}
    for window, document in zip(text.window_W, text.document_W, strict=True):
        found.setdefault(int(document), []).extend(window.input_ids[window.context :].tolist())
    return [found[number] for number in sorted(found)]


def test_no_document_is_in_two_texts(texts):
    calibration, tuning, confirmation = (
        {tuple(ids) for ids in documents(text)} for text in (texts.calibration, texts.tuning, texts.confirmation)
    )
    assert len(tuning) == len(confirmation) == 30
    assert not calibration & tuning
    assert not calibration & confirmation
    assert not tuning & confirmation


def test_the_sensitivity_text_is_the_front_of_the_calibration_text(tokenizer, corpus, protocol, settings):
    shorter = settings.model_copy(update={"sensitivity_tokens": 400})
    texts = make_texts(tokenizer, corpus, protocol, shorter)
    assert documents(texts.calibration)[:10] == documents(texts.sensitivity)


def test_long_documents_are_cut(tokenizer, corpus, protocol, settings):
    cut = make_texts(tokenizer, corpus, protocol, settings.model_copy(update={"document_tokens": 15}))
    assert set(cut.tuning.token_D.tolist()) == {15}
    assert {len(window.input_ids) for window in cut.tuning.window_W} == {16}


def test_the_digest_tells_texts_and_batchings_apart(tokenizer, corpus, protocol, settings, texts):
    again = make_texts(tokenizer, corpus, protocol, settings)
    other = make_texts(tokenizer, corpus, EvaluationSettings(window=48, batch_size=4), settings)
    assert again.tuning.digest == texts.tuning.digest
    assert len({texts.tuning.digest, texts.confirmation.digest, other.tuning.digest}) == 3


def test_too_few_documents_are_refused(tokenizer, corpus, protocol, settings):
    few = dataclasses.replace(corpus, validation=list(corpus.validation)[:3])
    with pytest.raises(UserError, match="3 validation documents, which leaves 1 to confirm on"):
        make_texts(tokenizer, few, protocol, settings)
    with pytest.raises(UserError, match="leaves 1 to choose on"):
        make_texts(tokenizer, corpus, protocol, settings.model_copy(update={"tuning_tokens": 1}))


@pytest.mark.parametrize("window", [48, 17])
def test_documents_add_up_to_the_perplexity_of_the_evaluation(olmoe, tokenizer, corpus, settings, window):
    protocol = EvaluationSettings(window=window, batch_size=8)
    text = make_texts(tokenizer, corpus, protocol, settings).tuning
    batches = documents_batches(list(corpus.validation)[::2], tokenizer, protocol, 1_200)
    with reroute(olmoe, "usmoe", k=2):
        found, expected = score_text(olmoe, text), score_batches(olmoe, batches)
    assert found.nats == pytest.approx(expected.nats / expected.tokens, abs=1e-12)
    assert found.budget == pytest.approx(expected.budget)
    assert sum(found.tokens_D) == expected.tokens


def test_each_document_gets_its_own_likelihood(olmoe, tokenizer, corpus, settings):
    text = make_texts(tokenizer, corpus, EvaluationSettings(window=17, batch_size=8), settings).tuning
    whole = make_texts(tokenizer, corpus, EvaluationSettings(window=48, stride=48, batch_size=8), settings).tuning
    with reroute(olmoe, "own"):
        found = score_text(olmoe, whole)
        assert score_text(olmoe, text).tokens_D == found.tokens_D
    ids = torch.tensor([0, *documents(whole)[7]])[None]
    with torch.no_grad():
        alone = olmoe(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert found.nats_D[7] == pytest.approx(alone, rel=1e-5)


def test_a_model_that_is_not_watched_is_refused(olmoe, texts):
    with pytest.raises(ValueError, match="no executed pairs were recorded"):
        score_text(olmoe, texts.tuning)


def test_a_text_survives_its_file(texts, tmp_path):
    save_text(texts.confirmation, tmp_path / "text.npz")
    again = load_text(tmp_path / "text.npz")
    assert again.digest == texts.confirmation.digest
    assert np.array_equal(again.token_D, texts.confirmation.token_D)
