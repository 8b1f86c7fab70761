"""Training windows hold every token once, in an order that only the seed decides."""

import concurrent.futures

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from crossways.errors import UserError
from crossways.training.corpus import Corpus
from crossways.training.packing import (
    PackedWindows,
    StreamedWindows,
    TokenizedDocuments,
    token_counts,
    tokenize_train,
    training_windows,
)
from crossways.training.tokenizer import TokenizerSettings, encode_documents, load_tokenizer

EOS = 99
TEXTS = [f"text {i} " * (i % 7 + 1) for i in range(30)]


def tokenized(documents) -> TokenizedDocuments:
    ended = [[*ids, EOS] for ids in documents]
    starts = np.cumsum([0, *map(len, ended)])
    return TokenizedDocuments(np.array([i for ids in ended for i in ids], dtype=np.int32), starts)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(TEXTS, ["validation"], fingerprint="train")


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return load_tokenizer(TokenizerSettings(vocab_size=280), corpus, tmp_path_factory.mktemp("cache"))


@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=12),
    length=st.integers(2, 7),
    seed=st.integers(0, 3),
)
def test_windows_are_the_shuffled_documents_end_to_end(documents, length, seed):
    data = tokenized(documents)
    if len(data.tokens) < length:
        with pytest.raises(UserError, match=rf"have {len(data.tokens)} tokens, one window needs {length}"):
            PackedWindows(data, length, seed)
        return
    windows = PackedWindows(data, length, seed)
    order = np.random.default_rng(seed).permutation(len(documents))
    expected = [token for i in order for token in [*documents[i], EOS]]
    found = torch.cat([windows[i]["input_ids"] for i in range(len(windows))]).tolist()
    assert found == expected[: len(expected) // length * length]
    assert torch.equal(windows[-1]["labels"], windows[len(windows) - 1]["input_ids"])
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_seed_decides_the_order():
    data = tokenized([[i] * 3 for i in range(20)])
    first, again, other = (PackedWindows(data, 8, seed)[0]["input_ids"].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_labels_do_not_share_memory_with_inputs():
    window = PackedWindows(tokenized([[1, 2, 3]]), 4, 0)[0]
    window["labels"][0] = -100
    assert window["input_ids"].tolist() == [1, 2, 3, EOS]
    assert window["input_ids"].dtype == torch.int64


def test_tokens_are_mapped_from_disk_and_found_again(corpus, tokenizer, tmp_path):
    data = tokenize_train(corpus, tokenizer, tmp_path)
    assert isinstance(data.tokens, np.memmap)
    expected = [[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, TEXTS)]
    assert [data.tokens[a:b].tolist() for a, b in zip(data.starts, data.starts[1:], strict=False)] == expected
    unread = Corpus(train=iter(()), validation=[], fingerprint="train")  # would give no tokens if it were read
    assert np.array_equal(tokenize_train(unread, tokenizer, tmp_path).tokens, data.tokens)
    other = Corpus(TEXTS[:5], ["validation"], fingerprint="other")
    assert len(tokenize_train(other, tokenizer, tmp_path).starts) == 6
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # and no left-overs


def test_another_tokenizer_gets_other_tokens(corpus, tokenizer, tmp_path):
    bytes_only = load_tokenizer(TokenizerSettings(vocab_size=258), corpus, tmp_path)
    data = tokenize_train(corpus, tokenizer, tmp_path)
    assert len(tokenize_train(corpus, bytes_only, tmp_path).tokens) > len(data.tokens)


def test_racing_for_the_tokens(corpus, tokenizer, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(tokenize_train, corpus, tokenizer, tmp_path) for _ in range(8)]
    assert len({job.result().tokens.tobytes() for job in jobs}) == 1
    assert len(list((tmp_path / "tokens").iterdir())) == 1


@pytest.mark.parametrize("streaming", [False, True], ids=["sequence", "stream"])
def test_token_counts(tokenizer, tmp_path, streaming):
    corpus = Corpus(["aab", "b"], ["validation"], "x", streaming)
    counts = token_counts(corpus, tokenizer, 300, tmp_path)
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert {i: int(counts[i]) for i in counts.nonzero()[0]} == {a: 2, b: 2, tokenizer.eos_token_id: 2}
    assert counts.shape == (300,)


@pytest.mark.parametrize("length", [2, 7, 64])
def test_stream_gives_the_same_windows_as_unshuffled_packing(tokenizer, length):
    expected = [i for ids in encode_documents(tokenizer, TEXTS) for i in [*ids, tokenizer.eos_token_id]]
    stream = StreamedWindows(TEXTS, tokenizer, length)
    for _ in range(2):  # each iteration starts afresh
        found = torch.cat([window["input_ids"] for window in stream]).tolist()
        assert found == expected[: len(expected) // length * length]


def test_workers_share_a_stream(tokenizer):
    stream = StreamedWindows(TEXTS, tokenizer, 16)
    alone = sorted(tuple(window["labels"].tolist()) for window in stream)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(tuple(window["labels"].tolist()) for window in loader) == alone


def test_training_windows_pick_the_kind(corpus, tokenizer, tmp_path):
    assert isinstance(training_windows(corpus, tokenizer, 8, 0, tmp_path), PackedWindows)
    streaming = Corpus(TEXTS, ["validation"], "x", streaming=True)
    assert isinstance(training_windows(streaming, tokenizer, 8, 0, tmp_path), StreamedWindows)


def test_too_short_is_one_line(tokenizer):
    with pytest.raises(UserError, match=r"stream has \d+ tokens, one window needs 9999"):
        next(iter(StreamedWindows(TEXTS[:1], tokenizer, 9999)))
    with pytest.raises(UserError, match="sequence_length=1"):
        PackedWindows(tokenized([[1, 2]]), 1, 0)
