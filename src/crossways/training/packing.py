"""Windows to train on: documents tokenised once to a file on disk, then cut into windows of equal length.

A finite corpus is tokenised in its own order and the shuffled order of documents exists only as indices, so
that all seeds and all window lengths share one file, and what is in memory does not grow with the number of
tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.training.corpus import Corpus
from crossways.training.tokenizer import encode_documents


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Token ids of documents end to end, each document followed by the end-of-sequence token."""

    tokens: np.ndarray
    """Memory-mapped int32 (number of tokens,)."""
    starts: np.ndarray
    """Where each document starts, and the number of tokens at the end, int64 (number of documents + 1,)."""


class PackedWindows(Dataset[dict[str, Tensor]]):
    """Windows of `sequence_length` consecutive tokens over documents in an order shuffled by the seed;
    map-style.

    Window i is `{"input_ids": int64 (sequence_length,), "labels": the same}`: the model shifts. The last
    tokens that do not fill a window are left out.

    Raises:
        UserError: the documents do not fill one window.
    """

    def __init__(self, documents: TokenizedDocuments, sequence_length: int, seed: int) -> None:
        if sequence_length < 2:
            raise UserError(f"sequence_length={sequence_length} leaves nothing to predict; use 2 or more")
        if len(documents.tokens) < sequence_length:
            raise UserError(
                f"corpus too short: its training documents have {len(documents.tokens)} tokens, one window "
                f"needs {sequence_length}; add text or lower the sequence length"
            )
        self.documents = documents
        self.sequence_length = sequence_length
        self.order = np.random.default_rng(seed).permutation(len(documents.starts) - 1)
        # ends[i]: tokens in the first i + 1 documents of the shuffled order
        self.ends = np.diff(documents.starts)[self.order].cumsum()

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Window `index`, negative ones counting from the end."""
        start = range(len(self))[index] * self.sequence_length
        tokens = torch.from_numpy(self._gather(start, start + self.sequence_length))
        return {"input_ids": tokens, "labels": tokens.clone()}

    def _gather(self, start: int, stop: int) -> np.ndarray:
        """Positions [start, stop) of the shuffled token sequence, int64, pieced together from its
        documents."""
        pieces = []
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            document, end = self.order[place], int(self.ends[place])
            document_end = int(self.documents.starts[document + 1])
            take = min(stop, end) - start
            pieces.append(self.documents.tokens[document_end - (end - start) :][:take])
            start, place = start + take, place + 1
        return np.concatenate(pieces).astype(np.int64)


class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """The windows of a stream of documents, tokenised as they are read; each `iter` starts the stream afresh.

    Items are those of `PackedWindows`. With several data-loader workers, each reads the stream and keeps its
    share.

    Raises:
        UserError: while iterating, when the whole stream does not fill one window.
    """

    def __init__(self, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, tokens in enumerate(self._windows()):
            if number % workers == mine:
                yield {"input_ids": tokens, "labels": tokens.clone()}

    def _windows(self) -> Iterator[Tensor]:
        pending: list[int] = []
        full = False
        for ids in encode_documents(self.tokenizer, self.documents):
            pending += [*ids, self.tokenizer.eos_token_id]
            whole = len(pending) // self.sequence_length * self.sequence_length
            for start in range(0, whole, self.sequence_length):
                full = True
                yield torch.tensor(pending[start : start + self.sequence_length])
            pending = pending[whole:]
        if not full:
            raise UserError(
                f"corpus too short: the stream has {len(pending)} tokens, one window needs "
                f"{self.sequence_length}; raise its limits or lower the sequence length"
            )


def training_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int, cache_dir: Path
) -> PackedWindows | StreamedWindows:
    """The training side of a corpus as windows: map-style, or iterable for a stream.

    Args:
        corpus: where `train` comes from.
        tokenizer: turns documents into ids; its end-of-sequence token ends each document.
        sequence_length: tokens per window, at least 2.
        seed: orders the documents of a finite corpus, >= 0.
        cache_dir: where the tokens are kept (four bytes each), found again by the same corpus and tokenizer.
    """
    if corpus.streaming:
        return StreamedWindows(corpus.train, tokenizer, sequence_length)
    return PackedWindows(tokenize_train(corpus, tokenizer, cache_dir), sequence_length, seed)


def token_counts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocab_size: int, cache_dir: Path) -> np.ndarray:
    """How often each token occurs in the training documents, ends of documents included, int64 (vocab_size,).

    A stream is read once more for it, up to the limits of its settings.
    """
    if corpus.streaming:
        ids = encode_documents(tokenizer, corpus.train)
        pieces = (np.array([*document, tokenizer.eos_token_id]) for document in ids)
    else:
        tokens = tokenize_train(corpus, tokenizer, cache_dir).tokens
        # bincount widens to int64, so piece by piece
        pieces = (tokens[start : start + 2**22] for start in range(0, len(tokens), 2**22))
    counts = np.zeros(vocab_size, dtype=np.int64)
    for piece in pieces:
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def tokenize_train(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> TokenizedDocuments:
    """The training documents' tokens, from the cache if they are there. Processes may race for it."""
    folder = cache_dir / "tokens" / _key(corpus, tokenizer)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            mine = Path(temporary, "tokens")
            mine.mkdir()
            _write(encode_documents(tokenizer, corpus.train), tokenizer.eos_token_id, mine)
            _publish(mine, folder)
    return TokenizedDocuments(
        tokens=np.memmap(folder / "tokens.int32", dtype=np.int32, mode="r"),
        starts=np.load(folder / "starts.npy"),
    )


def _write(token_ids: Iterable[list[int]], eos_id: int, folder: Path) -> None:
    starts = [0]
    with open(folder / "tokens.int32", "wb") as file:
        for ids in token_ids:
            np.array([*ids, eos_id], dtype=np.int32).tofile(file)
            starts.append(starts[-1] + len(ids) + 1)
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))


def _publish(mine: Path, folder: Path) -> None:
    try:
        os.rename(mine, folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same content
            raise


def _key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> str:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    what = json.dumps([type(tokenizer).__name__, identity, tokenizer.eos_token_id, corpus.fingerprint])
    return hashlib.sha256(what.encode()).hexdigest()[:32]
