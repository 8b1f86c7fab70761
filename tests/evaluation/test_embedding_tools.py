"""mteb and sentence-transformers get the encoder's vectors, from local files and without network."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import crossways as crossways_package
from crossways.errors import UserError
from crossways.evaluation.embeddings.encoder import RoutedEncoder
from crossways.evaluation.embeddings.run import evaluate_embeddings, find_task
from crossways.evaluation.embeddings.settings import EmbeddingSettings
from crossways.evaluation.task_lists import ListedTask, find_tasks, shipped_lists

pytest.importorskip("mteb", reason="the extra `eval` is not installed: mteb")
pytest.importorskip("sentence_transformers", reason="the extra `eval` is not installed: sentence-transformers")

WORDS = ("a cat", "the dog", "rain", "nine", "a bird sings")


@pytest.fixture
def folder(tmp_path):
    """Task files of all four types, and their data."""
    pairs = [(a, b, float((i + 2 * j) % 6)) for i, a in enumerate(WORDS) for j, b in enumerate(WORDS)]
    rows = {
        "sts.json": [{"sentence1": a, "sentence2": b, "score": score, "id": 1} for a, b, score in pairs],
        "pairs.json": [{"sentence1": a, "sentence2": b, "label": int(score > 3)} for a, b, score in pairs],
        "labelled.json": [{"text": f"{word} {n}", "label": i % 2} for i, word in enumerate(WORDS) for n in range(6)],
    }
    for name, data in rows.items():
        (tmp_path / name).write_text(json.dumps(data))
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows["labelled.json"])) + "\n")
    files = {
        "sts.yaml": "{name: Sts, type: STS, data: sts.json, instruction: Find the same.}",
        "pairs.yaml": "{name: Pairs, type: PairClassification, data: pairs.json}",
        "classes.yaml": "{name: Classes, type: Classification, data: labelled.jsonl, train: labelled.json}",
        "clusters.yaml": "{name: Clusters, type: Clustering, data: labelled.json}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_local_tasks_of_all_types(build, byte_tokenizer, folder):
    model = build("olmoe")
    crossways_package.reroute(model, "usmoe")
    encoder = RoutedEncoder(model, byte_tokenizer, EmbeddingSettings(kind="rw", prompt="prompteol"))
    names = ",".join(str(folder / f"{name}.yaml") for name in ("sts", "pairs", "classes", "clusters"))
    record = evaluate_embeddings(encoder, find_tasks(names, "mteb")[0], name="tiny")
    assert [(task.task, task.type, task.metric) for task in record.tasks] == [
        ("Sts", "STS", "cosine_spearman"),
        ("Pairs", "PairClassification", "max_ap"),
        ("Classes", "Classification", "accuracy"),
        ("Clusters", "Clustering", "v_measure"),
    ]
    assert record.tasks[2].value > 0.9  # texts of the same words with other numbers are easily told apart
    assert record.routing.rule.startswith("top_c(k=2")
    assert record.routing.experts_per_token == pytest.approx(2)
    assert record.mean == pytest.approx(np.mean([task.value for task in record.tasks]))
    read = type(record).model_validate_json(record.model_dump_json())
    assert read == record
    assert read.settings.kind == "rw"
    assert read.width == 24


def test_an_sts_score_is_the_rank_correlation_of_cosines(build, byte_tokenizer, folder):
    model = build("olmoe")
    settings = EmbeddingSettings(instruction="plain")
    encoder = RoutedEncoder(model, byte_tokenizer, settings)
    record = evaluate_embeddings(encoder, [ListedTask(task=str(folder / "sts.yaml"))])
    rows = json.loads((folder / "sts.json").read_text())
    first, second = (
        encoder.encode([f"Find the same.: {row[key]}" for row in rows]) for key in ("sentence1", "sentence2")
    )
    cosines = torch.nn.functional.cosine_similarity(first, second)
    expected = spearmanr(cosines, [row["score"] for row in rows]).statistic
    assert record.tasks[0].value == pytest.approx(expected, abs=0.02)  # ties at cosine 1 are broken by rounding
    other = RoutedEncoder(model, byte_tokenizer)
    assert evaluate_embeddings(other, [ListedTask(task=str(folder / "sts.yaml"))]).tasks != record.tasks


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("task.yaml", "{name: A, type: STS, data: labelled.json}", "row 1: no sentence1, sentence2, score"),
        ("task.yaml", "{name: A, type: STS, data: nowhere.json}", "cannot read .*nowhere.json"),
        ("task.yaml", "{name: A, type: STS, data: sts.yaml}", "neither JSON nor JSON lines"),
        ("task.yaml", "{name: A, type: Classification, data: labelled.json}", "needs `train`"),
        ("task.yaml", "{name: A, type: Sts, data: sts.json}", "type = 'Sts' is not accepted"),
        ("task.yaml", "{name: A, type: STS, dta: sts.json}", "unknown key 'dta'; the nearest known key is 'data'"),
        ("task.yaml", "{name: A, type: STS, data: empty.json}", "holds no rows"),
    ],
)
def test_wrong_task_files_are_refused_in_one_line(folder, file, text, message):
    (folder / "empty.json").write_text("[]")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        find_task(str(folder / file))


def test_mteb_knows_every_task_of_the_shipped_list_and_its_metric():
    shipped = shipped_lists("mteb")["usmoe-mteb"]
    assert len(shipped.tasks) == 19
    for listed in shipped.tasks:
        metadata = find_task(listed.task).metadata
        assert metadata.name == listed.task
        assert listed.metric in (None, metadata.main_score)
        assert "test" in metadata.eval_splits
    kinds = [find_task(listed.task).metadata.type for listed in shipped.tasks]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Classification": 3,
        "Clustering": 2,
        "PairClassification": 2,
        "Reranking": 3,
        "STS": 8,
        "Summarization": 1,
    }
    assert shipped.embedding.standardise == "batch"
    with pytest.raises(UserError, match="no task of this name"):
        find_task("STS112")


@pytest.mark.parametrize("name", ["olmoe", "ours"])
def test_sentence_transformers_saves_and_loads_the_whole(build, byte_tokenizer, tmp_path, name):
    from sentence_transformers import SentenceTransformer

    from crossways.evaluation.embeddings.sentence import load_sentence_transformer, sentence_transformer

    model = build(name)
    if name == "olmoe":
        crossways_package.reroute(model, "usmoe", k=1.5)
    settings = EmbeddingSettings(kind="moee", standardise="fitted", prompt="prompteol")
    texts = ["a cat", "the dog ran far away over the hills", "rain"]
    encoder = sentence_transformer(model, byte_tokenizer, settings)
    encoder[0].fit([*texts, "more", "words"])
    vectors = encoder.encode(texts)
    np.testing.assert_allclose(vectors, encoder[0].encoder.encode(texts), atol=1e-4)
    assert vectors.shape == (3, encoder.get_embedding_dimension())
    encoder.save_pretrained(str(tmp_path / "saved"))
    loaded = load_sentence_transformer(tmp_path / "saved")
    np.testing.assert_allclose(loaded.encode(texts), vectors, atol=1e-5)
    assert loaded[0].encoder.settings == settings
    trusted = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    np.testing.assert_allclose(trusted.encode(texts), vectors, atol=1e-5)
    assert loaded.similarity(vectors[:1], vectors[:1]).item() == pytest.approx(1)


def test_sentence_transformers_refuses_what_depends_on_its_batches(build, byte_tokenizer, tmp_path):
    from crossways.evaluation.embeddings.sentence import load_sentence_transformer, sentence_transformer

    model = build("olmoe")
    with pytest.raises(UserError, match="cannot standardise by batches"):
        sentence_transformer(model, byte_tokenizer, EmbeddingSettings(kind="rw", standardise="batch"))
    crossways_package.reroute(model, "usmoe-batch")
    competing = sentence_transformer(model, byte_tokenizer)
    with pytest.raises(UserError, match="neighbours"):
        competing.encode(["a", "b"])
    assert competing.encode(["a"]).shape == (1, 32)
    with pytest.raises(UserError, match="no saved embedding model"):
        load_sentence_transformer(tmp_path)
