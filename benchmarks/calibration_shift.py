"""Why calibrated twins miss their budget on other text: a biased estimate, or other text?

    python benchmarks/calibration_shift.py            # USMoE and expert choice; prints one line for each question

One model per method is trained as in `routers_train.py`. Its training documents, and its validation documents, are
dealt into parts of about as many tokens; the twins are calibrated on one part and measured on every other. A biased
estimate would miss on the part that it was made from, or in the mean over all pairs of parts of one text; few
documents scatter around zero; a difference between the two texts is what is left in the mean of one by the other.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

from crossways.calibrate import calibrate
from crossways.commands.calibrate import documents_batches
from crossways.evaluation.perplexity import score_batches
from crossways.methods import find_method, method_config
from crossways.models import CrosswaysForCausalLM
from crossways.training.corpus import load_corpus
from crossways.training.run import train_model
from crossways.training.tokenizer import encode_documents, load_tokenizer
from routers_train import CORPUS, EVALUATION, SEED, TOKENIZER, training_settings

Batches = list[dict[str, Tensor]]


def parts(documents: list[str], tokenizer: object, tokens: int, most: int) -> list[Batches]:
    """Neighbouring documents in parts of at least `tokens` tokens each, `most` parts at most."""
    found: list[Batches] = []
    part: list[str] = []
    size = 0
    for document, ids in zip(documents, encode_documents(tokenizer, documents), strict=True):
        part, size = [*part, document], size + len(ids)
        if size >= tokens:
            found.append(documents_batches(part, tokenizer, EVALUATION, None))
            part, size = [], 0
    return found[:most]


def missed(model: CrosswaysForCausalLM, text: Batches) -> float:
    """By what share of the budget of the rule the twin's mean budget misses it on a text."""
    twin, rule = (score_batches(model, text, causal=causal).budget for causal in (True, False))
    return float("nan") if twin is None or rule is None else twin / rule - 1


def crossed(model: CrosswaysForCausalLM, here: list[Batches], there: list[Batches], passes: int) -> list[list[float]]:
    """What is missed on each part of `there` after calibration on each part of `here`."""
    rows = []
    for text in here:
        calibrate(model, text, passes=passes, check=text[:1])
        rows.append([missed(model, other) for other in there])
    return rows


def said(name: str, misses: list[float]) -> str:
    """Mean, its standard error if the misses were independent, and standard deviation, in per cent."""
    deviation = 100 * statistics.stdev(misses)
    error = deviation / math.sqrt(len(misses))
    return f"{name}: {100 * statistics.mean(misses):+.2f} % ± {error:.2f}, standard deviation {deviation:.2f} %"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["usmoe", "expert-choice"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/calibration-shift"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(CORPUS, SEED)
    tokenizer = load_tokenizer(TOKENIZER, corpus, options.out / "cache")
    for name in options.methods:
        config = method_config(find_method(name), vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        folder = options.out / f"{name}-{options.steps}"
        if not (folder / "done").is_dir():
            model = train_model(
                config, corpus, tokenizer, training_settings(options.steps), folder, SEED,
                cache_dir=options.out / "cache", progress=False,
            ).model  # fmt: skip
            model.save_pretrained(folder / "done")
        model = CrosswaysForCausalLM.from_pretrained(folder / "done").eval()
        train, validation = (
            parts(list(documents), tokenizer, options.tokens, options.parts)
            for documents in (corpus.train, corpus.validation)
        )
        print(f"{name}, {len(train)} and {len(validation)} parts of {options.tokens} tokens", flush=True)
        squares = {
            "training": crossed(model, train, train, options.passes),
            "validation": crossed(model, validation, validation, options.passes),
        }
        for text, square in squares.items():
            size = range(len(square))
            print(said(f"  {text}, the same part", [square[i][i] for i in size]))
            print(said(f"  {text}, another part", [square[i][j] for i, j in itertools.permutations(size, 2)]))
        across = crossed(model, train, validation, options.passes)
        print(said("  training to validation", list(itertools.chain(*across))), flush=True)


if __name__ == "__main__":
    main()
