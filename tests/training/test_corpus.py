"""The split is by document, deterministic and without leaks; every bad corpus is one clear line."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.training import corpus as corpus_module
from crossways.training import sources
from crossways.training.corpus import Corpus, CorpusSettings, load_corpus, utf8_length


def write_lines(path, texts, field="text"):
    path.write_text("".join(json.dumps({"number": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def load(tmp_path, texts, seed=0, **options) -> Corpus:
    source = write_lines(tmp_path / "corpus.jsonl", texts)
    return load_corpus(CorpusSettings(source=source, **options), seed, cache_dir=tmp_path / "cache")


def texts_of(corpus: Corpus) -> list[str]:
    return [*corpus.train, *corpus.validation]


TEXTS = [f"document {i} é" for i in range(40)]


@pytest.fixture
def hub_has_it(monkeypatch):
    monkeypatch.setattr(sources, "ask_hub", lambda name, kind: "there")


@pytest.mark.parametrize("streaming", [False, True], ids=["sequence", "stream"])
def test_split_covers_each_document_once_and_repeats(tmp_path, streaming):
    options = {"streaming": streaming, "max_documents": 1000, "validation_fraction": 0.25}
    first, again, other = (load(tmp_path, TEXTS, seed, **options) for seed in (0, 0, 1))
    assert sorted(texts_of(first)) == sorted(TEXTS)
    assert (list(first.train), list(first.validation)) == (list(again.train), list(again.validation))
    assert first.fingerprint == again.fingerprint
    assert set(first.validation) != set(other.validation)
    assert first.fingerprint != other.fingerprint
    assert list(first.train) == list(first.train)  # can be read again


def test_validation_fraction_counts_documents(tmp_path):
    assert len(load(tmp_path, TEXTS, validation_fraction=0.25).validation) == 10
    assert len(load(tmp_path, TEXTS, validation_fraction=0.001).validation) == 1
    assert len(load(tmp_path, TEXTS[:2], validation_fraction=0.99).train) == 1
    assert len(load(tmp_path, TEXTS, validation_fraction=0.25, max_validation_documents=3).validation) == 3


@given(
    texts=st.lists(st.sampled_from(["a", "b", "c", "d", "e", " ", ""]), min_size=5, max_size=30),
    seed=st.integers(0, 5),
    fraction=st.floats(0.05, 0.95),
)
def test_duplicates_never_stand_on_both_sides(texts, seed, fraction):
    settings = CorpusSettings(validation_fraction=fraction)
    distinct = {text for text in texts if text.strip()}
    if len(distinct) < 2:
        return
    corpus = corpus_module._split_sequence(texts, settings, seed)
    assert set(corpus.train).isdisjoint(corpus.validation)
    assert sorted(texts_of(corpus)) == sorted(distinct)


def test_duplicates_in_a_stream_never_stand_on_both_sides(tmp_path):
    corpus = load(tmp_path, TEXTS * 3, streaming=True, max_documents=120, validation_fraction=0.3)
    assert len(list(corpus.train)) == 3 * (40 - len(corpus.validation))
    assert set(corpus.train).isdisjoint(corpus.validation)
    assert len(set(corpus.validation)) == len(corpus.validation)


@pytest.mark.parametrize("streaming", [False, True], ids=["sequence", "stream"])
def test_limits(tmp_path, streaming):
    size = utf8_length(TEXTS[10])
    options = {"streaming": streaming, "validation_fraction": 0.4}
    documents = texts_of(load(tmp_path, TEXTS[10:], max_documents=12, **options))
    assert len(documents) == 12
    for limit, expected in [(12 * size, 12), (13 * size - 1, 12)]:
        documents = texts_of(load(tmp_path, TEXTS[10:], max_bytes=limit, **options))
        assert len(documents) == expected
    assert set(documents) != set(TEXTS[10:22])  # of the shuffled order, not of the file's


def test_stream_reads_no_further_than_it_must(hub_has_it, monkeypatch):
    read = []

    def rows():
        for i in range(10**6):
            read.append(i)
            yield {"text": f"row {i}"}

    fake = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: fake)
    settings = CorpusSettings(source="owner/huge", streaming=True, max_documents=50, shuffle_buffer=20)
    corpus = load_corpus(settings, 0)
    assert len(texts_of(corpus)) == 50
    assert max(read) < 100
    read.clear()
    texts_of(load_corpus(settings.model_copy(update={"shuffle_buffer": 0}), 0))
    assert max(read) == 49
    settings = settings.model_copy(update={"max_documents": 10**6, "max_validation_documents": 4})
    read.clear()
    corpus = load_corpus(settings, 0)
    assert len(corpus.validation) == 4
    assert max(read) < 200
    next(iter(corpus.train))
    assert max(read) < 200


def test_text_files_can_be_streamed(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    settings = CorpusSettings(source=str(tmp_path), streaming=True, max_documents=10, validation_fraction=0.3)
    corpus = load_corpus(settings, 3)
    assert corpus.streaming
    assert len(texts_of(corpus)) == 10


def test_embedded_corpus():
    corpus = load_corpus(CorpusSettings(max_bytes=300_000), seed=0)
    assert 100_000 < sum(map(utf8_length, texts_of(corpus))) <= 300_000
    assert "import" in "".join(corpus.train)


def test_parquet_and_other_field(tmp_path):
    datasets.Dataset.from_dict({"content": TEXTS}).to_parquet(tmp_path / "a.parquet")
    settings = CorpusSettings(source=str(tmp_path), text_field="content")
    assert sorted(texts_of(load_corpus(settings, 0, tmp_path / "cache"))) == sorted(TEXTS)


def test_hub_dataset_gets_name_and_split(hub_has_it, monkeypatch):
    asked = {}

    def fake(path, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    corpus = load_corpus(CorpusSettings(source="owner/name", name="small", split="train[:1%]"), 0)
    assert sorted(texts_of(corpus)) == sorted(TEXTS)
    expected = {"path": "owner/name", "name": "small", "split": "train[:1%]", "streaming": False}
    assert expected.items() <= asked.items()


@pytest.mark.parametrize(("answer", "words"), [("absent", "has none of that name"), ("silent", "cannot be reached")])
def test_a_name_that_is_not_there_is_told_before_anything_is_tried(tmp_path, monkeypatch, answer, words):
    monkeypatch.setattr(sources, "ask_hub", lambda name, kind: answer)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("tried"))
    with pytest.raises(UserError, match=rf"^no dataset 'stdlb' \(did you mean 'stdlib'\?\): .* {words}"):
        load_corpus(CorpusSettings(source="stdlb"), 0, tmp_path)


def test_offline_what_was_prepared_before_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ask_hub", lambda name, kind: "silent")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": TEXTS}))
    (tmp_path / "owner___big_code_2").mkdir()  # as `datasets` names the folder of owner/BigCode-2
    corpus = load_corpus(CorpusSettings(source="owner/BigCode-2"), 0, tmp_path)
    assert sorted(texts_of(corpus)) == sorted(TEXTS)


def test_hub_failure_is_one_line(hub_has_it, monkeypatch):
    def offline(path, **options):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"^cannot load dataset 'owner/name': ConnectionError: .* the Hub$"):
        load_corpus(CorpusSettings(source="owner/name"), 0)


@pytest.mark.parametrize("streaming", [False, True], ids=["sequence", "stream"])
def test_wrong_text_field_names_those_there_are(tmp_path, streaming):
    source = write_lines(tmp_path / "c.jsonl", TEXTS, field="content")
    settings = CorpusSettings(source=source, text_field="contents", streaming=streaming, max_documents=9)
    with pytest.raises(UserError, match=r"no text field 'contents'; .* number, content; did you mean 'content'\?"):
        load_corpus(settings, 0, tmp_path / "cache")
    with pytest.raises(UserError, match=r"field 'number' of .* holds int, not text"):
        load_corpus(settings.model_copy(update={"text_field": "number"}), 0, tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True], ids=["sequence", "stream"])
def test_broken_json_is_one_line(tmp_path, streaming):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    settings = CorpusSettings(source=str(path), streaming=streaming, max_documents=9)
    with pytest.raises(UserError, match=r"cannot (load|read) dataset '.*c\.jsonl'") as caught:
        load_corpus(settings, 0, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["sequence", "stream"])
def test_nulls_are_empty_documents(tmp_path, streaming):
    options = {"streaming": streaming, "max_documents": 40, "validation_fraction": 0.3}
    assert sorted(texts_of(load(tmp_path, [*TEXTS, None, "", " \n"], **options))) == sorted(TEXTS)


def test_duplicates_do_not_use_up_the_limits(tmp_path):
    limits = {"max_documents": 3, "max_bytes": 3}
    assert sorted(texts_of(load(tmp_path, [*"aaaaaaaaaaaabc"], **limits))) == ["a", "b", "c"]


def test_too_little_text_is_one_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty: 1 "):
        load_corpus(CorpusSettings(source=str(path)), 0)
    path.write_text("text")
    with pytest.raises(UserError, match=r"one distinct document, which cannot be split"):
        load_corpus(CorpusSettings(source=str(path)), 0)
    with pytest.raises(UserError, match=r"max_bytes=3 holds 0 whole"):
        load_corpus(CorpusSettings(source=str(path), max_bytes=3), 0)
    with pytest.raises(UserError, match="no file matches"):
        load_corpus(CorpusSettings(source=str(tmp_path / "missing.jsonl")), 0)


def test_stream_needs_a_limit_and_both_sides(tmp_path):
    with pytest.raises(UserError, match=r"needs corpus\.max_documents or corpus\.max_bytes"):
        load(tmp_path, TEXTS, streaming=True)
    with pytest.raises(UserError, match="gave 2 training and 0 validation"):
        load(tmp_path, TEXTS, streaming=True, max_documents=2, validation_fraction=1e-9)


def test_each_setting_is_documented():
    fields = CorpusSettings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []
