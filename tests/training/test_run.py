"""Training one model: what is logged, resuming, and stopping when the loss is no number."""

import json
import math

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from crossways.errors import UserError
from crossways.gates import HashGate
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.training import trainer as trainer_module
from crossways.training.corpus import CorpusSettings, load_corpus
from crossways.training.packing import token_counts
from crossways.training.run import train_model
from crossways.training.settings import TrainingSettings
from crossways.training.tokenizer import TokenizerSettings, load_tokenizer
from crossways.training.trainer import CrosswaysTrainer, NonFiniteLossError


@pytest.fixture
def text(tiny_corpus, tmp_path):
    corpus = load_corpus(CorpusSettings(source=str(tiny_corpus)), 0)
    return corpus, load_tokenizer(TokenizerSettings(vocab_size=270), corpus, tmp_path / "cache")


def config(tokenizer, **changes):
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "max_position_embeddings": 64,
        "load_balance_coef": 0.01,
        "router_z_loss_coef": 0.001,
    }
    return CrosswaysConfig(**(fields | changes))


def settings(**changes):
    fields = {
        "max_steps": 6,
        "sequence_length": 16,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 2,
        "report_to": "none",
    }
    return TrainingSettings(**(fields | changes))


def train(text, folder, *, model=None, **changes):
    corpus, tokenizer = text
    return train_model(
        config(tokenizer, **(model or {})), corpus, tokenizer, settings(**changes), folder, 0, progress=False
    )


def entries(folder):
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_each_loss_and_every_routers_load_are_logged_apart(text, tmp_path):
    trained = train(text, tmp_path)
    entry = entries(tmp_path)[-1]
    assert {"load_balance", "router_z", "lm_loss", "load_imbalance/layer 1", "idle_experts/layer 2"} <= set(entry)
    weighted = 0.01 * 2 * entry["load_balance"] + 0.001 * 2 * entry["router_z"]  # two routers, logged as their mean
    assert entry["loss"] == pytest.approx(entry["lm_loss"] + weighted, rel=1e-5)
    assert 1 <= entry["load_imbalance/layer 1"] <= 4
    assert [point["step"] for point in trained.curve] == [2, 4, 6]
    assert [point["tokens"] for point in trained.curve] == [64, 128, 192]
    assert trained.curve[-1]["loss"] == entry["lm_loss"]
    assert set(trained.curve[-1]["auxiliary"]) == {"load_balance", "router_z"}
    assert (trained.steps, trained.tokens) == (6, 192)
    assert trained.tokens_per_second > 0
    assert trained.peak_memory_bytes > 2**20


def test_accumulated_batches_log_the_same_scale(text, tmp_path):
    train(text, tmp_path / "whole", batch_size=4)
    train(text, tmp_path / "parts", batch_size=2, gradient_accumulation_steps=2)
    whole, parts = entries(tmp_path / "whole"), entries(tmp_path / "parts")
    for name in ("lm_loss", "router_z"):  # means over the same tokens
        assert [e[name] for e in parts] == pytest.approx([e[name] for e in whole], rel=1e-3)
    # not the same number, since balance within a small batch differs, but never double
    assert [e["load_balance"] for e in parts] == pytest.approx([e["load_balance"] for e in whole], rel=0.3)
    assert [e["loss"] for e in parts] == pytest.approx([e["loss"] for e in whole], rel=1e-2)


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_happened(text, tmp_path, monkeypatch):
    whole = train(text, tmp_path / "whole", model={"select": {"name": "top_c", "k": 1.5}})
    save = CrosswaysTrainer._save_checkpoint

    def die_after_saving(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 4:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(CrosswaysTrainer, "_save_checkpoint", die_after_saving)
        with pytest.raises(KilledError):
            train(text, tmp_path / "killed", model={"select": {"name": "top_c", "k": 1.5}})
    (tmp_path / "killed" / "checkpoint-5").mkdir()  # torn: a kill in the middle of writing
    resumed = train(text, tmp_path / "killed", model={"select": {"name": "top_c", "k": 1.5}})
    for name, expected in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], expected, rtol=0, atol=0, equal_nan=True)
    assert resumed.curve == whole.curve
    assert len(resumed.curve) == 3


BALANCED = {"gate": {"name": "hash", "k": 1, "balanced": True}, "select": {"name": "top_k", "k": 1}}


def test_a_balanced_hash_is_made_from_the_corpus_before_the_first_step(text, tmp_path):
    corpus, tokenizer = text
    trained = train(text, tmp_path, model=BALANCED)
    counts_V = torch.from_numpy(token_counts(corpus, tokenizer, len(tokenizer), tmp_path / "cache"))
    tables = [gate.table_VK for gate in trained.model.model.gates]
    loads = [torch.zeros(4).index_add(0, table_VK[:, 0], counts_V.float()) for table_VK in tables]
    assert all(load_E.max() <= load_E.mean() + counts_V.max() for load_E in loads)
    by_hand = HashGate(len(tokenizer), 4, 1)
    by_hand.balance(counts_V)
    assert all(torch.equal(table_VK, by_hand.table_VK) for table_VK in tables)
    kept = CrosswaysForCausalLM.from_pretrained(get_last_checkpoint(str(tmp_path)))
    assert all(torch.equal(gate.table_VK, by_hand.table_VK) for gate in kept.model.gates)


def test_training_a_finished_run_again_returns_it(text, tmp_path):
    first, again = train(text, tmp_path), train(text, tmp_path)
    assert again.curve == first.curve
    assert again.tokens_per_second == first.tokens_per_second
    assert all(map(torch.equal, again.model.parameters(), first.model.parameters()))


def test_seeds_decide_weights_and_order(text, tmp_path):
    corpus, tokenizer = text
    args = (config(tokenizer), corpus, tokenizer, settings(max_steps=2))
    a, b, c = (train_model(*args, tmp_path / f"{i}", seed, progress=False) for i, seed in enumerate((0, 0, 1)))
    assert a.curve == b.curve
    assert a.curve != c.curve


def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch):
    compute = trainer_module.Trainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss, outputs = compute(self, *args, **kwargs)
        return (loss * math.nan if self.state.global_step == 4 else loss), outputs

    monkeypatch.setattr(trainer_module.Trainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 5;.*checkpoint-4"):
        train(text, tmp_path)
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-4")


def test_ruined_weights_are_not_saved(text, tmp_path, monkeypatch):
    save = CrosswaysTrainer._save_checkpoint

    def ruin(self, model, trial):
        if self.state.global_step == 4:
            next(model.parameters()).data.fill_(math.inf)
        save(self, model, trial)

    monkeypatch.setattr(CrosswaysTrainer, "_save_checkpoint", ruin)
    with pytest.raises(NonFiniteLossError, match=r"non-finite at step 4.*checkpoint-2"):
        train(text, tmp_path)


def test_bfloat16_and_checkpointing_train(text, tmp_path):
    plain = train(text, tmp_path / "plain")
    low = train(text, tmp_path / "low", dtype="bfloat16", gradient_checkpointing=True)
    assert low.curve[-1]["loss"] == pytest.approx(plain.curve[-1]["loss"], rel=0.02)
    assert all(p.dtype == torch.float32 for p in low.model.parameters())


def test_sizes_that_do_not_fit_are_refused(text, tmp_path):
    with pytest.raises(UserError, match="sequence_length 100 exceeds the model's context"):
        train(text, tmp_path, sequence_length=100)
    with pytest.raises(UserError, match="corpus too short"):
        train(text, tmp_path, batch_size=10_000)
