"""All figures of one model: which are measured under which rule, and what the record says of them."""

import pytest
import torch

from crossways.errors import UserError
from crossways.evaluation.evaluate import evaluate_model, leak_reason, load_imbalance, rule_name
from crossways.evaluation.perplexity import score_batches
from crossways.evaluation.settings import EvaluationSettings
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.perturb import DisableTop, perturbed
from crossways.training.corpus import CorpusSettings, load_corpus, utf8_length
from crossways.training.tokenizer import TokenizerSettings, encode_documents, load_tokenizer
from crossways.training.windows import batch_windows, evaluation_windows


@pytest.fixture
def text(tiny_corpus, tmp_path):
    corpus = load_corpus(CorpusSettings(source=str(tiny_corpus)), 0)
    return corpus, load_tokenizer(TokenizerSettings(vocab_size=270), corpus, tmp_path)


def build(tokenizer, **changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    model = CrosswaysForCausalLM(CrosswaysConfig(**(fields | changes)))
    model.train()(torch.randint(0, len(tokenizer), (2, 16)))
    return model


def evaluate(text, tmp_path, model, **changes):
    corpus, tokenizer = text
    return evaluate_model(model, tokenizer, corpus, EvaluationSettings(window=16, **changes), tmp_path)


def test_a_causal_rule_needs_no_twin(text, tmp_path):
    seen = evaluate(text, tmp_path, build(text[1]))
    figures = seen.evaluation
    assert (figures.leaky, figures.leak_reason, figures.causal_perplexity) == (False, "", None)
    assert figures.rule == "top_k(k=2) of softmax()"
    assert figures.budget == pytest.approx(2)
    assert figures.disabled.raw != figures.disabled.renormalized
    assert figures.protocol.documents == len(text[0].validation)
    assert [router.router for router in seen.expert_load] == ["layer 1", "layer 2"]
    assert all(sum(router.load) == pytest.approx(1) for router in seen.expert_load)
    assert figures.unigram_bits_per_byte > 0


def test_a_leaky_rule_comes_with_its_twin_and_experts_are_disabled_under_the_twin(text, tmp_path):
    corpus, tokenizer = text
    model = build(tokenizer, select={"name": "top_c", "k": 1.5, "group": "batch"}, score="unified")
    figures = evaluate(text, tmp_path, model).evaluation
    assert figures.leaky
    assert "later tokens" in figures.leak_reason
    assert "other rows" in figures.leak_reason
    assert figures.budget == pytest.approx(1.5, rel=0.02)
    windows = evaluation_windows(
        encode_documents(tokenizer, corpus.validation),
        map(utf8_length, corpus.validation),
        16,
        16,
        tokenizer.eos_token_id,
    )
    batches = list(batch_windows(windows.windows, 16, tokenizer.eos_token_id))
    twin = score_batches(model, batches, causal=True)
    assert figures.causal_perplexity == pytest.approx(twin.perplexity)
    assert figures.causal_budget == pytest.approx(twin.budget)
    with perturbed(model, DisableTop()):
        disabled = score_batches(model, batches, causal=True)
    assert figures.disabled.raw == pytest.approx(disabled.perplexity)


def test_a_dense_model_has_no_routing_figures(text, tmp_path):
    seen = evaluate(text, tmp_path, build(text[1], moe_every=0))
    assert seen.evaluation.rule == "dense"
    assert (seen.evaluation.budget, seen.evaluation.disabled, seen.load_imbalance) == (None, None, None)
    assert seen.expert_load == ()


def test_routing_causally_by_configuration_is_not_leaky():
    rule = {"name": "top_c", "k": 2}
    assert leak_reason(CrosswaysConfig(select=rule, num_hidden_layers=1))
    assert not leak_reason(CrosswaysConfig(select=rule, num_hidden_layers=1, causal_routing=True))
    assert "top_c" in rule_name(CrosswaysConfig(select=rule, num_hidden_layers=1))


def test_imbalance_is_the_greatest_load_over_the_mean_averaged_over_routers():
    assert load_imbalance((torch.tensor([3, 1, 0, 0]), torch.tensor([2, 2, 2, 2]))) == pytest.approx((3 + 1) / 2)


def test_a_window_beyond_the_context_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"evaluation.window 16 exceeds the model's context of 8"):
        evaluate(text, tmp_path, build(text[1], max_position_embeddings=8))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "top_k(k=2) of softmax()"),
        ({"gate": {"name": "linear", "bias": True}}, "top_k(k=2) of softmax() of linear(bias=True)"),
        ({"gate": "random", "score": "sigmoid"}, "top_k(k=2) of sigmoid() of random(scale=1.0)"),
        ({"sharing": {"name": "block", "size": 4}}, "top_k(k=2) of softmax(), shared by block(size=4)"),
        (
            {"gate": {"name": "low_rank", "rank": 4}, "sharing": "all"},
            "top_k(k=2) of softmax() of low_rank(rank=4), shared by all()",
        ),
    ],
    ids=str,
)
def test_the_rule_names_gate_and_sharing_where_they_are_not_plain(fields, name):
    assert rule_name(CrosswaysConfig(num_hidden_layers=4, **fields)) == name
