import pytest

from crossways.finetune.corruption import FRAME, WORD, corrupted
from crossways.finetune.examples import PROMPT, Example
from crossways.finetune.settings import CorruptionSettings

EXAMPLES = tuple(
    Example(PROMPT.format(instruction=f"alpha{i} beta gamma delta"), f"one two three four five number{i}")
    for i in range(40)
)


def words(examples):
    return [word for e in examples for word in WORD.findall(e.prompt + " " + e.completion) if word not in FRAME]


@pytest.mark.parametrize("kind", ["replace_words", "swap_outputs", "typos"])
def test_rate_zero_changes_nothing_and_the_same_seed_repeats(kind):
    assert corrupted(EXAMPLES, CorruptionSettings(kind=kind, rate=0.0)) == EXAMPLES
    settings = CorruptionSettings(kind=kind, rate=0.5)
    assert corrupted(EXAMPLES, settings) == corrupted(EXAMPLES, settings) != EXAMPLES
    assert corrupted(EXAMPLES, settings) != corrupted(EXAMPLES, settings, "validation")


def test_words_are_replaced_at_the_stated_rate_by_words_of_the_data():
    spoilt = corrupted(EXAMPLES, CorruptionSettings(rate=0.3))
    before, after = words(EXAMPLES), words(spoilt)
    changed = sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
    assert changed == pytest.approx(0.3, abs=0.06)
    assert set(after) <= set(before)


def test_the_template_stays_readable():
    for kind in ("replace_words", "typos"):
        spoilt = corrupted(EXAMPLES, CorruptionSettings(kind=kind, rate=1.0))
        assert all(e.prompt.startswith("### Instruction:\n") and e.prompt.endswith("### Response:\n") for e in spoilt)


def test_swapping_exchanges_the_stated_share_of_outputs_and_loses_none():
    spoilt = corrupted(EXAMPLES, CorruptionSettings(kind="swap_outputs", rate=0.5))
    assert sorted(e.completion for e in spoilt) == sorted(e.completion for e in EXAMPLES)
    assert sum(a.completion != b.completion for a, b in zip(spoilt, EXAMPLES, strict=True)) == 20
    assert [e.prompt for e in spoilt] == [e.prompt for e in EXAMPLES]
