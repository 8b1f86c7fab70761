"""Log-likelihoods are the model's own, whatever the batch and the padding; the record says under which routing."""

from pathlib import Path

import pytest
import torch

import crossways as crossways_package
from crossways.errors import UserError
from crossways.evaluation.executed import decided_by
from crossways.evaluation.harness.record import HarnessRecord
from crossways.evaluation.harness.run import evaluate_harness, listed_tasks
from crossways.evaluation.task_lists import ListedTask, find_tasks, shipped_lists
from crossways.surgery.handle import CONFIG_KEY, handle_of

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed: lm-eval")

TASKS = Path(__file__).parent / "tasks"
NEXT_WORD, SHORT_ANSWER = str(TASKS / "next_word.yaml"), str(TASKS / "short_answer.yaml")
PAIRS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the", " moon"),
    ("Rain", " falls"),
    ("A much longer context, of many words, before its end", " comes"),
    ("Up and", " d"),
    ("Up and", " t"),
    ("x", " and a continuation that is longer than its context"),
]
CLOSE = {"abs": 1e-4, "rel": 1e-4}


def wrapped(model, tokenizer, **arguments):
    from crossways.evaluation.harness.model import RoutedLM

    return RoutedLM(model, tokenizer, **arguments)


def requests(lm):
    return [((context, answer), *lm._encode_pair(context, answer)) for context, answer in PAIRS]


def one_by_one(model, tokenizer):
    """Without batches, masks or sharing: each pair by itself."""
    scores = []
    for context, answer in PAIRS:
        before, after = (tokenizer(text)["input_ids"] for text in (context, context + answer))
        with torch.no_grad():
            log_SV = model(torch.tensor([after[:-1]])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(log_SV[at - 1, after[at]]) for at in range(len(before), len(after))))
    return scores


RULES = [("olmoe", None), ("olmoe", "usmoe"), ("qwen3", "expert-choice"), ("ours", None), ("cartesian", None)]


@pytest.mark.parametrize(("name", "rule"), RULES, ids=lambda value: str(value))
def test_scores_do_not_depend_on_batch_or_padding_under_the_twin(build, calibrated, byte_tokenizer, name, rule):
    model = build(name)
    if rule:
        crossways_package.reroute(model, rule)
    if rule or name == "ours":
        calibrated(model)
    with decided_by(model, causal=True):
        expected = one_by_one(model, byte_tokenizer)
        for batch_size in (1, 4):
            for side in ("left", "right"):
                lm = wrapped(model, byte_tokenizer, batch_size=batch_size, padding_side=side)
                answers = lm._loglikelihood_tokens(requests(lm))
                assert [nats for nats, _ in answers] == pytest.approx(expected, **CLOSE), (batch_size, side)


def test_padding_does_not_compete_under_the_leaky_rule_either(build, byte_tokenizer):
    model = build("olmoe")
    crossways_package.reroute(model, "usmoe")
    with decided_by(model, causal=False):
        expected = one_by_one(model, byte_tokenizer)
        lm = wrapped(model, byte_tokenizer, batch_size=7)
        assert [nats for nats, _ in lm._loglikelihood_tokens(requests(lm))] == pytest.approx(expected, **CLOSE)


def test_a_model_that_nobody_rerouted_scores_as_in_lm_eval(build, byte_tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = build("olmoe")
    lm, theirs = wrapped(model, byte_tokenizer, batch_size=4), HFLM(model, tokenizer=byte_tokenizer, batch_size=4)
    ours, reference = lm._loglikelihood_tokens(requests(lm)), theirs._loglikelihood_tokens(requests(lm), True)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in reference], **CLOSE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in reference]


def test_a_greedy_continuation_is_recognised(build, byte_tokenizer):
    model = build("olmoe")
    context = byte_tokenizer("Rain")["input_ids"]
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    lm = wrapped(model, byte_tokenizer)
    answers = lm._loglikelihood_tokens([(None, context, [best]), (None, context, [(best + 1) % 258])])
    assert [greedy for _, greedy in answers] == [True, False]


def test_only_the_leaky_rule_lets_an_answer_change_how_its_question_is_read(build, calibrated, byte_tokenizer):
    model = build("olmoe")
    crossways_package.reroute(model, "usmoe")
    calibrated(model)
    rows = [tuple(byte_tokenizer(f"The cat sat on {end}")["input_ids"]) for end in ("the mat", "it, and")]
    length = len("The cat sat on ")
    lm = wrapped(model, byte_tokenizer, batch_size=1)
    changed = {}
    for causal in (True, False):
        with decided_by(model, causal=causal):
            first, second = (lm._logits([row])[0][:length] for row in rows)
            changed[causal] = float((first - second).abs().max())
    assert changed[True] < 1e-4
    assert changed[False] > 1e-2


def test_too_long_requests_lose_their_beginning_and_are_counted(build, byte_tokenizer):
    model = build("olmoe")
    lm = wrapped(model, byte_tokenizer, max_length=20)
    context, answer = list(range(2, 100)), [5, 6]
    (nats, _), _ = lm._loglikelihood_tokens([(None, context, answer), (None, [3, 4], answer)])
    with torch.no_grad():
        log_SV = model(torch.tensor([[*context, 5][-20:]])).logits[0].log_softmax(-1)
    assert nats == pytest.approx(float(log_SV[-2, 5] + log_SV[-1, 6]), **CLOSE)
    assert (lm.truncated, lm.requests) == (1, 2)
    with pytest.raises(UserError, match="does not fit"):
        lm._loglikelihood_tokens([(None, [3], list(range(2, 30)))])


def test_whole_texts_are_scored_in_windows(build, byte_tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = build("olmoe")
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("a cat " * 20, "rain")]
    lm = wrapped(model, byte_tokenizer, batch_size=2, max_length=50)
    theirs = HFLM(model, tokenizer=byte_tokenizer, batch_size=1, max_length=50)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert lm.loglikelihood_rolling(asked) == pytest.approx(expected, **CLOSE)


def test_the_record_of_a_rerouted_model(build, calibrated, byte_tokenizer):
    model = build("olmoe").train()
    crossways_package.reroute(model, "usmoe", k=[1, 2, 1.5])
    calibrated(model)
    record = evaluate_harness(model, byte_tokenizer, f"{NEXT_WORD},{SHORT_ANSWER}", batch_size=2, name="tiny")
    assert model.training
    assert handle_of(model) is not None
    assert HarnessRecord.model_validate_json(record.model_dump_json()) == record
    assert [(task.task, task.metric, task.documents) for task in record.tasks] == [
        ("next_word", "acc,none", 6),
        ("short_answer", "exact_match,none", 3),
    ]
    routing = record.routing
    assert (routing.causal, routing.leaky) == (True, False)
    assert routing.twin.startswith("threshold(k=1")
    assert [router.budget for router in routing.routers] == [1, 2, 1.5]
    assert all(0.5 < router.experts_per_token / router.budget < 2 for router in routing.routers)
    assert routing.spec["budgets"] == [1, 2, 1.5]
    assert (record.protocol.batch_size, record.protocol.max_length, record.protocol.requests) == (2, 256, 18)
    again = evaluate_harness(model, byte_tokenizer, [NEXT_WORD, SHORT_ANSWER], batch_size=3)
    assert again.tasks == record.tasks
    assert again.routing.cutoffs_sha256 == routing.cutoffs_sha256
    handle_of(model).blocks[0].router.cutoff += 0.1
    moved = evaluate_harness(model, byte_tokenizer, NEXT_WORD, limit=1)
    assert moved.routing.cutoffs_sha256 != routing.cutoffs_sha256
    assert moved.tasks[0].documents == 1


def test_the_tokens_that_ran_are_counted(build, byte_tokenizer):
    """Five scored rows: the shared context once, padding never."""
    record = evaluate_harness(build("olmoe"), byte_tokenizer, NEXT_WORD, limit=2, batch_size=5)
    texts = ["The cat sat on the mat", "The cat sat on the moon and stars", "The cat sat on the idea", "Rain falls"]
    texts += ["Rain barks", "Rain reads a very long book"]
    assert record.routing.tokens == sum(len(text) - 1 for text in texts)
    assert record.routing.experts_per_token == 2
    assert record.routing.twin is None


@pytest.mark.parametrize("name", ["olmoe", "ours"])
def test_leaky_figures_are_marked_and_differ(build, calibrated, byte_tokenizer, name):
    model = build(name)
    if name == "olmoe":
        crossways_package.reroute(model, "usmoe")
    with pytest.raises(UserError, match="has no cutoff yet: calibrate on text first"):
        evaluate_harness(model, byte_tokenizer, NEXT_WORD)
    leaky = evaluate_harness(model, byte_tokenizer, f"{NEXT_WORD},{SHORT_ANSWER}", causal=False)
    assert (leaky.routing.causal, leaky.routing.leaky, leaky.routing.twin) == (False, True, None)
    assert "later tokens" in leaky.routing.leak_reason
    calibrated(model)
    honest = evaluate_harness(model, byte_tokenizer, NEXT_WORD)
    assert (honest.routing.causal, honest.routing.leaky) == (True, False)
    assert honest.routing.experts_per_token != leaky.routing.experts_per_token
    if name == "ours":
        assert model.config.causal_routing is False


def test_a_model_of_transformers_is_left_as_it_was(build, byte_tokenizer):
    model = build("olmoe")
    keys = set(vars(model)), set(vars(model.config))
    record = evaluate_harness(model, byte_tokenizer, NEXT_WORD, limit=1)
    assert record.routing.experts_per_token == 2
    assert (set(vars(model)), set(vars(model.config))) == keys
    assert handle_of(model) is None
    assert not hasattr(model.config, CONFIG_KEY)
    assert byte_tokenizer.padding_side == "right"


def test_a_dense_model_has_no_routing_to_record(build, byte_tokenizer):
    routing = evaluate_harness(build("dense"), byte_tokenizer, NEXT_WORD, limit=1).routing
    assert (routing.rule, routing.experts_per_token, routing.routers) == ("dense", None, ())
    assert not routing.leaky


def test_examples_in_the_prompt_and_the_metric_are_per_task(build, byte_tokenizer):
    tasks = [ListedTask(task=NEXT_WORD, metric="acc_norm"), ListedTask(task=SHORT_ANSWER, num_fewshot=1)]
    record = evaluate_harness(build("olmoe"), byte_tokenizer, tasks)
    assert [(task.metric, task.num_fewshot) for task in record.tasks] == [
        ("acc_norm,none", 0),
        ("exact_match,none", 1),
    ]
    assert record.mean == pytest.approx(sum(task.value for task in record.tasks) / 2)
    with pytest.raises(UserError, match="no metric 'bleu'; it has acc,none, acc_norm,none"):
        evaluate_harness(build("olmoe"), byte_tokenizer, [ListedTask(task=NEXT_WORD, metric="bleu")], limit=1)


def test_tasks_that_cannot_be_are_refused(build, byte_tokenizer, tmp_path):
    model = build("olmoe")
    (tmp_path / "lost.yaml").write_text("{task: lost, dataset_path: json, dataset_kwargs: {data_files: no.json}}")
    (tmp_path / "nameless.yaml").write_text("{dataset_path: json}")
    for tasks, message in (
        (f"{NEXT_WORD},{NEXT_WORD}", "next_word: asked for twice"),
        (str(tmp_path / "lost.yaml"), "no.json does not exist"),
        (str(tmp_path / "nameless.yaml"), "has no key `task`"),
        (str(tmp_path / "nowhere.yaml"), "cannot read task file"),
        ("usmoe-mteb", "for mteb, not lm-eval"),
        ("cartesianmoe,pathmoe-0.9b", "one task list at a time"),
        (" , ", "names no task"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_harness(model, byte_tokenizer, tasks)


def test_a_list_of_ones_own(build, byte_tokenizer, tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(f"{{title: Mine, tool: lm-eval, tasks: [{{task: {NEXT_WORD}, label: Word}}, {{task: piqa}}]}}")
    tasks, found = find_tasks(str(path), "lm-eval")
    assert [task.task for task in tasks] == [NEXT_WORD, "piqa"]
    assert found.title == "Mine"
    assert evaluate_harness(build("olmoe"), byte_tokenizer, tasks[:1], limit=1).tasks[0].label == "Word"
    path.write_text("{title: Mine, tool: lm-eval, tasks: [{tsk: a}]}")
    with pytest.raises(UserError, match="the nearest known key is"):
        listed_tasks(str(path))


def test_lm_eval_knows_every_task_of_the_shipped_lists():
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = "hellaswag lambada piqa storycloze winogrande triviaqa webqs nq_open arc openbookqa siqa commonsense_qa"
    paths = [root / name for name in (*folders.split(), "super_glue/boolq", "mmlu/default")]
    known = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)
    lists = shipped_lists("lm-eval")
    assert {name: len(each.tasks) for name, each in lists.items()} == {
        "cartesianmoe": 8,
        "pathmoe-0.9b": 8,
        "pathmoe-16b": 12,
    }
    for each in lists.values():
        for listed in each.tasks:
            assert listed.task in known.all_tasks
            settings = lm_eval.tasks._yaml_loader.load_yaml(
                known.task_index[listed.task].yaml_path, resolve_func=False
            )
            metrics = settings.get("metric_list") or settings["aggregate_metric_list"]
            assert listed.metric in [metric["metric"] for metric in metrics], listed.task
