"""The texts of a tuning, no document in two of them, and the likelihood of each document.

Legend: W windows, D documents, B batch, S sequence, V vocabulary, L layers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.settings import EvaluationSettings
from crossways.training.corpus import Corpus
from crossways.training.tokenizer import encode_documents
from crossways.training.windows import EvalWindow, batch_windows, evaluation_windows
from crossways.tuning.settings import TuningSettings


@dataclass(frozen=True, eq=False)
class Text:
    """Windows in the order in which they are batched, and the document that each belongs to."""

    window_W: tuple[EvalWindow, ...]
    document_W: np.ndarray
    """int64 (W,)."""
    token_D: np.ndarray
    """Scored tokens of each document, int64 (D,)."""
    pad_id: int
    batch_size: int

    def batches(self) -> list[dict[str, Tensor]]:
        """As `crossways.training.windows.batch_windows` makes them; their rows are the windows in order."""
        return list(batch_windows(self.window_W, self.batch_size, self.pad_id))

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.token_D.sum())

    @property
    def digest(self) -> str:
        """Hexadecimal hash of tokens and batching."""
        seen = hashlib.sha256(f"{self.batch_size}".encode())
        for window, document in zip(self.window_W, self.document_W, strict=True):
            seen.update(f"{document} {window.context} ".encode() + window.input_ids.tobytes())
        return seen.hexdigest()[:16]


@dataclass(frozen=True)
class Texts:
    """What each step of a tuning may look at."""

    calibration: Text
    """Sets cutoffs."""
    sensitivity: Text
    """The front of the calibration text."""
    tuning: Text
    """Draws the frontier; the choice is made on it."""
    confirmation: Text
    """Seen once, when the choice is made."""


def make_texts(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, protocol: EvaluationSettings, settings: TuningSettings
) -> Texts:
    """Cut the texts from a corpus.

    Raises:
        UserError: too few documents to choose on some and confirm on others.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, which precedes documents; choose another model")

    def text(documents: Iterable[str], tokens: int) -> Text:
        return _text(encode_documents(tokenizer, documents), tokens, tokenizer.eos_token_id, protocol, settings)

    tuning = text(itertools.islice(corpus.validation, 0, None, 2), settings.tuning_tokens)
    confirmation = text(itertools.islice(corpus.validation, 1, None, 2), settings.confirmation_tokens)
    for name, found in (("choose", tuning), ("confirm", confirmation)):
        if len(found.token_D) < 2:
            raise UserError(
                f"there are {len(corpus.validation)} validation documents, which leaves {len(found.token_D)} to "
                f"{name} on; at least 2 are needed: give more text, raise corpus.validation_fraction or the tokens"
            )
    calibration, sensitivity = (
        text(corpus.train, tokens) for tokens in (settings.calibration_tokens, settings.sensitivity_tokens)
    )
    return Texts(calibration, sensitivity, tuning, confirmation)


def _text(
    ids_per_document: Iterator[list[int]],
    max_tokens: int,
    bos_id: int,
    protocol: EvaluationSettings,
    settings: TuningSettings,
) -> Text:
    """The front of each document up to `document_tokens`, until there are `max_tokens`; at least one document."""
    windows: list[tuple[EvalWindow, int]] = []
    counts: list[int] = []
    for ids in ids_per_document:
        ids = ids[: settings.document_tokens]
        if counts and sum(counts) + len(ids) > max_tokens:
            break
        if not ids:
            continue
        cut = evaluation_windows([ids], [0], protocol.window, protocol.stride or protocol.window, bos_id)
        windows += [(window, len(counts)) for window in cut.windows]
        counts.append(len(ids))
    windows.sort(key=lambda item: -len(item[0].input_ids))
    return Text(
        window_W=tuple(window for window, _ in windows),
        document_W=np.array([document for _, document in windows], dtype=np.int64),
        token_D=np.array(counts, dtype=np.int64),
        pad_id=bos_id,
        batch_size=protocol.batch_size,
    )
