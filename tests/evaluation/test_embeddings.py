"""An embedding is what the model says at the last token of the prompt, and a function of its text alone."""

import pytest
import torch
from pydantic import ValidationError

import crossways as crossways_package
from crossways.errors import UserError
from crossways.evaluation.embeddings.encoder import RoutedEncoder
from crossways.evaluation.embeddings.parts import Parts, Statistics, standardised
from crossways.evaluation.embeddings.settings import EmbeddingSettings

TEXTS = ["A cat sat", "the dog ran far away, over the hills", "x", "", 'He said "no_one" knows!']
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def test_hidden_state_and_router_logits_are_those_of_the_model_itself(build, byte_tokenizer):
    model = build("olmoe")
    prompt = 'This sentence : "A cat sat." means in one word:"'
    ids = torch.tensor([byte_tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        said = model(ids, output_hidden_states=True, output_router_logits=True)
    hidden = RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(prompt="prompteol")).encode(TEXTS[:2])
    routing = RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(prompt="prompteol", kind="rw")).encode(TEXTS[:2])
    torch.testing.assert_close(hidden[0], said.hidden_states[-1][0, -1], **CLOSE)
    torch.testing.assert_close(routing[0], torch.cat([logits[-1] for logits in said.router_logits]), **CLOSE)
    assert hidden.shape == (2, 32)
    assert routing.shape == (2, 3 * 8)


RULES = [
    ("olmoe", None),
    ("olmoe", "usmoe"),
    ("qwen3", "usmoe"),
    ("qwen3", "expert-choice"),
    ("ours", None),
    ("cartesian", None),
    ("dense", None),
]


@pytest.mark.parametrize(("name", "rule"), RULES, ids=lambda value: str(value))
@pytest.mark.parametrize("causal", [False, True])
def test_the_batch_does_not_change_an_embedding(build, calibrated, byte_tokenizer, name, rule, causal):
    model = build(name)
    if rule:
        crossways_package.reroute(model, rule)
    if causal and (rule or name == "ours"):
        calibrated(model)
    kind = "hs" if name == "dense" else "moee-sum"

    def encode(texts, **fields):
        settings = EmbeddingSettings(kind=kind, causal=causal, **fields)
        return RoutedEncoder(model, byte_tokenizer, settings).encode(texts)

    together = encode(TEXTS)
    alone = torch.cat([encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, **CLOSE)
    torch.testing.assert_close(together, encode(TEXTS[::-1], batch_size=2).flip(0), **CLOSE)
    torch.testing.assert_close(
        together[:2], encode([*TEXTS[:2], "another neighbour, longer than all others " * 3])[:2], **CLOSE
    )
    torch.testing.assert_close(together, encode(TEXTS, pad_id=77), **CLOSE)
    assert len({tuple(row) for row in together.tolist()}) == len(TEXTS)


def test_the_rule_matters(build, byte_tokenizer):
    model = build("olmoe")
    before = RoutedEncoder(model, byte_tokenizer).encode(TEXTS)
    crossways_package.surgery.handle.handle_of(model).undo()
    crossways_package.reroute(model, "usmoe")
    assert (RoutedEncoder(model, byte_tokenizer).encode(TEXTS) - before).abs().max() > 1e-2


def test_texts_that_compete_across_rows_are_refused_unless_alone(build, byte_tokenizer):
    model = build("olmoe")
    crossways_package.reroute(model, "usmoe-batch")
    with pytest.raises(UserError, match="neighbours; use batch_size 1"):
        RoutedEncoder(model, byte_tokenizer).encode(TEXTS)
    alone = RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(batch_size=1)).encode(TEXTS)
    crossways_package.surgery.handle.handle_of(model).undo()
    crossways_package.reroute(model, "usmoe")
    torch.testing.assert_close(alone, RoutedEncoder(model, byte_tokenizer).encode(TEXTS), **CLOSE)


def test_prompts_are_those_of_the_published_code():
    none, eol = EmbeddingSettings(), EmbeddingSettings(prompt="prompteol", instruction="gritlm")
    assert none.render("A cat") == '"A cat."'
    assert none.render("A cat?") == '"A cat?"'
    assert none.render('say "no_one"') == "\"say 'no one'\""
    assert none.render("") == '"."'
    prefix = eol.instructed("Find it: ")
    assert prefix == "<|user|>\nFind it\n<|embed|>\n"
    assert eol.render("A cat", prefix) == (
        'This sentence : "<|user|>\nFind it\n<|embed|>\nA cat." means in one word:"'
    )
    assert eol.instructed("") == ""
    plain = EmbeddingSettings(prompt="bare", end_mark=False, single_quotes=False, underscores=False)
    assert plain.render(' a_"b" ') == 'a_"b"'
    assert EmbeddingSettings(prompt="{text} =").render("a") == "a. ="


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValidationError, match="did you mean 'prompteol'"):
        EmbeddingSettings(prompt="prompeol")
    with pytest.raises(ValidationError, match="did you mean 'gritlm'"):
        EmbeddingSettings(instruction="gritm")


def test_a_long_text_is_cut_and_its_template_is_not(build, byte_tokenizer):
    encoder = RoutedEncoder(build("olmoe"), byte_tokenizer, EmbeddingSettings(prompt="prompteol", max_length=60))
    prompt = byte_tokenizer.decode(encoder.tokens("word " * 200))
    assert prompt.startswith('This sentence : "word')
    assert prompt.endswith('" means in one word:"')
    assert 50 < len(encoder.tokens("word " * 200)) <= 60
    with pytest.raises(UserError, match="do not hold the template"):
        RoutedEncoder(build("olmoe"), byte_tokenizer, EmbeddingSettings(prompt="prompteol", max_length=20)).tokens(
            "a"
        )


def test_the_sum_of_similarities_is_a_dot_product(build, byte_tokenizer):
    model = build("olmoe")
    settings = EmbeddingSettings(kind="moee-sum", alpha=0.3)
    encoder = RoutedEncoder(model, byte_tokenizer, settings)
    embedding_NZ, parts = encoder.encode(TEXTS), encoder.parts(TEXTS)
    cosine = torch.nn.functional.cosine_similarity
    hidden = cosine(parts.hidden_ND[:, None], parts.hidden_ND[None], dim=-1)
    routing = cosine(parts.routing_NW[:, None], parts.routing_NW[None], dim=-1)
    torch.testing.assert_close(embedding_NZ @ embedding_NZ.T, hidden + 0.3 * routing, **CLOSE)
    assert encoder.width == embedding_NZ.shape[1] == 32 + 24


def test_standardising_by_batches_is_the_published_formula_and_depends_on_neighbours(build, byte_tokenizer):
    model = build("olmoe")
    settings = EmbeddingSettings(kind="moee", standardise="batch", standardise_over=3)
    encoder = RoutedEncoder(model, byte_tokenizer, settings)
    parts = encoder.parts(TEXTS)
    raw = torch.cat([parts.hidden_ND, parts.routing_NW], -1)
    expected = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-8) for x in (raw[:3], raw[3:])])
    torch.testing.assert_close(encoder.encode(TEXTS), expected, **CLOSE)
    assert not torch.allclose(encoder.encode(TEXTS[:2])[0], expected[0], atol=0.1)
    with pytest.raises(UserError, match="two texts or more"):
        encoder.encode(TEXTS[:1])
    joined = standardised(parts[slice(0, 4)], settings, None)
    assert joined.hidden_ND.isfinite().all()
    assert joined.hidden_ND.mean(0).abs().max() < 1e-5


def test_the_hidden_state_alone_is_never_standardised(build, byte_tokenizer):
    model = build("olmoe")
    plain = RoutedEncoder(model, byte_tokenizer).encode(TEXTS)
    assert torch.equal(
        RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(standardise="batch")).encode(TEXTS), plain
    )


def test_fitted_statistics_are_fixed(build, byte_tokenizer):
    encoder = RoutedEncoder(build("olmoe"), byte_tokenizer, EmbeddingSettings(kind="moee", standardise="fitted"))
    with pytest.raises(UserError, match="nothing was fitted"):
        encoder.encode(TEXTS)
    encoder.fit(TEXTS)
    together = encoder.encode(TEXTS)
    assert together.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(torch.cat([encoder.encode([text]) for text in TEXTS]), together, atol=1e-3, rtol=1e-3)


def test_statistics_of_a_constant_dimension_do_not_divide_by_zero():
    parts = Parts(torch.ones(3, 2), torch.tensor([[1.0], [2.0], [3.0]]))
    done = Statistics.of(parts).apply(parts)
    assert torch.equal(done.hidden_ND, torch.zeros(3, 2))
    torch.testing.assert_close(done.routing_NW[:, 0], torch.tensor([-1.0, 0.0, 1.0]))


def test_the_record_says_what_was_executed(build, calibrated, byte_tokenizer):
    model = build("olmoe")
    crossways_package.reroute(model, "usmoe", k=[1, 2, 1.5])
    encoder = RoutedEncoder(model, byte_tokenizer)
    encoder.encode(["abcdefghij"] * 3)  # thirteen tokens, read once
    routing = encoder.record()
    assert routing.tokens == 13
    assert [router.budget for router in routing.routers] == [1, 2, 1.5]
    assert [router.experts_per_token for router in routing.routers] == [1, 2, 20 / 13]
    assert (routing.causal, routing.leaky, routing.twin, routing.cutoffs_sha256) == (False, True, None, None)
    assert "later tokens" in routing.leak_reason
    calibrated(model)
    twin = RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(causal=True))
    twin.encode(TEXTS)
    routing = twin.record()
    assert (routing.causal, routing.leaky, routing.leak_reason) == (True, False, "")
    assert routing.twin.startswith("threshold(k=1")
    assert len(routing.cutoffs_sha256) == 64


def test_a_decision_that_is_repeated_is_read_once(tiny, byte_tokenizer):
    model = tiny(vocab_size=260, num_experts=8, max_position_embeddings=256, sharing={"name": "decision", "size": 3})
    encoder = RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(kind="rw"))
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 8)
    assert encoder.width == 8


def test_routing_weights_need_routing(build, byte_tokenizer):
    with pytest.raises(UserError, match="use kind hs"):
        RoutedEncoder(build("dense"), byte_tokenizer, EmbeddingSettings(kind="rw"))
    with pytest.raises(UserError, match="no text"):
        RoutedEncoder(build("dense"), byte_tokenizer).encode([])
