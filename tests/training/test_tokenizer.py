"""The tokenizer loses nothing, sees training text only, and is the same whoever wins the race."""

import concurrent.futures

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.training.corpus import Corpus
from crossways.training.tokenizer import TokenizerSettings, encode_documents, load_tokenizer

TRAIN = ["the cat sat on the mat. " * 20, "def f(x):\n    return x + 1\n" * 20]


def corpus_of(train, validation=("validation",)) -> Corpus:
    return Corpus(train=train, validation=list(validation), fingerprint=str(abs(hash(tuple(train)))))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(TokenizerSettings(vocab_size=280), corpus_of(TRAIN), tmp_path_factory.mktemp("cache"))


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(next(encode_documents(tokenizer, [text]))) == text


@pytest.mark.parametrize(
    "text",
    [" a  .", "'s n't .", "\r\n\t\x00", "e\u0301é", "\u202e\U0001f468\u200d\U0001f469", "<|endoftext|>"],
)
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(next(encode_documents(tokenizer, [text]))) == text


def test_text_cannot_forge_special_tokens(tokenizer):
    ids = next(encode_documents(tokenizer, ["a<|endoftext|>b<|padding|>"]))
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_special_tokens_and_size(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|padding|>")
    assert len(tokenizer) == 280
    assert len(next(encode_documents(tokenizer, [TRAIN[0]]))) < len(TRAIN[0]) / 2


def test_encoding_keeps_order_over_many_batches(tokenizer):
    documents = [str(i) for i in range(150)]
    assert [tokenizer.decode(ids) for ids in encode_documents(tokenizer, documents)] == documents


def test_learns_from_training_documents_only(tmp_path):
    vocab = load_tokenizer(
        TokenizerSettings(vocab_size=400), corpus_of(TRAIN, ["zygote " * 500]), tmp_path
    ).get_vocab()
    assert [token for token in vocab if "z" in token] == ["z"]  # a byte, never part of a merge
    assert "Ġcat" in vocab


def test_deterministic_and_cached(tmp_path):
    choice = TokenizerSettings(vocab_size=300)
    first = load_tokenizer(choice, corpus_of(TRAIN), tmp_path / "a")
    assert first.get_vocab() == load_tokenizer(choice, corpus_of(TRAIN), tmp_path / "b").get_vocab()
    (file,) = (tmp_path / "a" / "tokenizers").iterdir()
    written = file.stat().st_mtime_ns
    assert load_tokenizer(choice, corpus_of(TRAIN), tmp_path / "a").get_vocab() == first.get_vocab()
    assert file.stat().st_mtime_ns == written
    load_tokenizer(TokenizerSettings(vocab_size=301), corpus_of(TRAIN), tmp_path / "a")
    load_tokenizer(choice, corpus_of(TRAIN[:1]), tmp_path / "a")
    assert len(list((tmp_path / "a" / "tokenizers").iterdir())) == 3  # and no left-overs


def test_racing_for_the_cache(tmp_path):
    choice = TokenizerSettings(vocab_size=300)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(load_tokenizer, choice, corpus_of(TRAIN), tmp_path) for _ in range(8)]
    vocabularies = [job.result().get_vocab() for job in jobs]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_training_text_can_be_limited(tmp_path):
    limited = TokenizerSettings(vocab_size=400, max_training_bytes=len(TRAIN[0]))
    vocab = load_tokenizer(limited, corpus_of(TRAIN), tmp_path).get_vocab()
    assert "Ġcat" in vocab
    assert "Ġreturn" not in vocab


def test_named_tokenizer_is_loaded_as_it_is(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    named = load_tokenizer(TokenizerSettings(name=str(tmp_path / "saved")), corpus_of(["x"]), tmp_path / "cache")
    assert named.get_vocab() == tokenizer.get_vocab()
    assert named.eos_token_id == tokenizer.eos_token_id
    assert [*encode_documents(named, TRAIN)] == [*encode_documents(tokenizer, TRAIN)]
    assert not (tmp_path / "cache").exists()


def test_impossible_tokenizers_are_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match="vocab_size=257 is too small"):
        load_tokenizer(TokenizerSettings(vocab_size=257), corpus_of(TRAIN), tmp_path)
    with pytest.raises(UserError, match="cannot load tokenizer") as caught:
        load_tokenizer(TokenizerSettings(name=str(tmp_path / "missing")), corpus_of(TRAIN), tmp_path)
    assert "\n" not in str(caught.value)
    type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        load_tokenizer(TokenizerSettings(name=str(tmp_path / "no_eos")), corpus_of(TRAIN), tmp_path)


def test_smallest_vocabulary_is_the_bytes(tmp_path):
    smallest = load_tokenizer(TokenizerSettings(vocab_size=258), corpus_of(TRAIN), tmp_path)
    assert len(smallest) == 258
    assert len(next(encode_documents(smallest, ["héé"]))) == 5


def test_each_setting_is_documented():
    assert [name for name, field in TokenizerSettings.model_fields.items() if not field.description] == []
