"""`crossways tune` from the command line: outcomes, exit codes, and mistakes on one line."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from crossways import cli

QUICK = [
    "tuning.families=[token-choice]",
    "tuning.budgets=[0.5]",
    "tuning.levels=[0.5]",
    "tuning.rounds=0",
    "corpus.validation_fraction=0.5",
    "evaluation.window=32",
]


@pytest.fixture
def crossways(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["crossways", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()  # what preparing the test printed
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out = capsys.readouterr()
        return exit_.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny OLMoE whose experts all return zero, so that any budget is as good; and a corpus."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OlmoeConfig(
        vocab_size=20, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=0, **sizes
    )
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    inner = Tokenizer(models.WordLevel({"<end>": 0, **{f"w{n}": n for n in range(1, 20)}}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(tmp_path / "model")
    words = torch.randint(1, 20, (40, 30), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in words]
    (tmp_path / "text.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return tmp_path


def tune(saved, *more, quick=QUICK):
    sets = [argument for each in quick for argument in ("--set", each)]
    command = ("tune", saved / "model", "--corpus", saved / "text.jsonl", "--out", saved / "out")
    return (*command, *sets, "--no-verify", *more)


def test_experts_that_do_nothing_are_cut(crossways, saved):
    code, out, err = crossways(*tune(saved))
    assert (code, err) == (0, "")
    assert "50.0% fewer executed expert FLOPs" in out
    assert "This confirms a loss within 1%." in out
    assert f"model: {saved / 'out' / 'model'}" in out
    config = json.loads((saved / "out" / "model" / "config.json").read_text())
    assert config["crossways_routing"]["rule"]["budgets"] == [1.0, 1.0]
    assert (saved / "out" / "model" / "tokenizer.json").is_file()
    evaluate = ("eval", saved / "out" / "model", "--corpus", saved / "text.jsonl", "--set", "evaluation.window=32")
    assert "top_k(k=1) of softmax()" in crossways(*evaluate)[1]
    code, again, _ = crossways(*tune(saved, "--max-loss", "0.5 nats"))
    assert code == 0
    assert "within 0.5 nats" in again


def test_nothing_to_choose_is_exit_code_one(crossways, saved):
    whole = [*QUICK, "tuning.families=[threshold]", "tuning.budgets=[1.5]"]
    code, out, _ = crossways(*tune(saved, quick=whole))
    assert code == 1
    assert "Nothing was chosen: no setting that could be chosen executes fewer expert FLOPs" in out
    assert not (saved / "out" / "model").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-loss", "1"), "--max-loss '1': expected a share of perplexity such as 1%"),
        (("--set", "tuning.levels=[2]"), "tuning.levels"),
        (("--set", "tuning.familes=[threshold]"), "tuning.familes"),
        (("--set", "tuning.families=[usmo]"), "unknown families ['usmo']; known: token-choice"),
        (("--set", "tuning.families=[usmoe]"), "none may be chosen"),
        (("--set", "evaluation.window=100"), "exceeds the model's context of 64"),
        (("--set", "corpus.validation_fraction=0.05"), "2 validation documents, which leaves 1 to choose on"),
        (("--corpus", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(crossways, saved, more, message):
    code, _, err = crossways(*tune(saved, *more))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (saved / "out" / "model").exists()


def test_a_model_that_is_not_there_is_one_line(crossways, saved):
    code, _, err = crossways("tune", saved / "nothing", "--corpus", saved / "text.jsonl", "--out", saved / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "does not exist" in err
