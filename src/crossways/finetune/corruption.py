"""Spoil examples in a stated, repeatable way."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace

from crossways.finetune.examples import PROMPT, PROMPT_WITH_INPUT, Example
from crossways.finetune.settings import CorruptionSettings

WORD = re.compile(r"\w+")
FRAME = frozenset(WORD.findall(PROMPT_WITH_INPUT + PROMPT))
"""Words of the template, which stays readable."""


def corrupted(examples: Sequence[Example], settings: CorruptionSettings, salt: str = "") -> tuple[Example, ...]:
    """The examples, spoilt; the same arguments give the same result.

    Args:
        examples: at least one.
        settings: how, and how much.
        salt: separates the random numbers of several sets of examples.
    """
    rng = random.Random(f"{settings.seed} {salt}")
    if settings.kind == "swap_outputs":
        return _swapped(examples, settings.rate, rng)
    if settings.kind == "typos":
        return tuple(_each(example, lambda text: _typos(text, settings.rate, rng)) for example in examples)
    vocabulary = sorted({word for e in examples for word in WORD.findall(e.prompt + " " + e.completion)} - FRAME)
    return tuple(_each(e, lambda text: _replaced(text, settings.rate, vocabulary, rng)) for e in examples)


def _each(example: Example, spoil: Callable[[str], str]) -> Example:
    return Example(spoil(example.prompt), spoil(example.completion))


def _replaced(text: str, rate: float, vocabulary: Sequence[str], rng: random.Random) -> str:
    def draw(match: re.Match[str]) -> str:
        word = match.group()
        return word if word in FRAME or rng.random() >= rate else rng.choice(vocabulary)

    return WORD.sub(draw, text)


def _typos(text: str, rate: float, rng: random.Random) -> str:
    def draw(match: re.Match[str]) -> str:
        word = match.group()
        if word in FRAME:
            return word
        return "".join(rng.choice(string.ascii_lowercase) if rng.random() < rate else letter for letter in word)

    return WORD.sub(draw, text)


def _swapped(examples: Sequence[Example], rate: float, rng: random.Random) -> tuple[Example, ...]:
    chosen = rng.sample(range(len(examples)), round(rate * len(examples)))
    outputs = [examples[index].completion for index in chosen]
    outputs = outputs[1:] + outputs[:1]  # each gets another's
    spoilt = list(examples)
    for index, output in zip(chosen, outputs, strict=True):
        spoilt[index] = replace(spoilt[index], completion=output)
    return tuple(spoilt)
