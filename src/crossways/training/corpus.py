"""A corpus: documents, split by document into training and validation, the same for the same seed.

Documents, not positions, are split, because neighbouring windows of one document are near copies of each
other. An exact duplicate never stands on both sides: a finite corpus is deduplicated before it is split; a
stream, which is never read as a whole, sends each document to a side by the hash of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from crossways.errors import UserError
from crossways.settings import Settings
from crossways.training import sources


class CorpusSettings(Settings):
    """Which text to learn from, how much of it, and how much to hold out."""

    source: str = Field(default="stdlib", min_length=1)
    """`stdlib` (the sources of Python's own library, one document per file), a path, directory or glob of
    text, JSONL, JSON or Parquet files, or the name of a Hugging Face dataset."""
    name: str | None = None
    """Configuration of a Hugging Face dataset, e.g. "wikitext-103-raw-v1"; None for its default."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hugging Face dataset, e.g. "train" or "train[:1%]"; validation is held out of it too."""
    text_field: str = Field(default="text", min_length=1)
    """Field of JSONL, JSON, Parquet and Hugging Face rows that holds the document."""
    streaming: bool = False
    """Read rows as they are needed instead of loading all first; needs max_documents or max_bytes."""
    shuffle_buffer: int = Field(default=1000, ge=0)
    """Rows in the shuffling buffer of a stream; 0 keeps the source's order. Sensible: 0 to 10000."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Fraction of the documents held out for validation (at least one). Sensible: 0.01 to 0.2."""
    max_documents: int | None = Field(default=None, ge=2)
    """Most documents taken from the front of the shuffled order, both sides together; None for all. >= 2."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Most UTF-8 bytes taken from the front of the shuffled order, in whole documents; None for all.
    Sensible: from 1e5 up."""
    max_validation_documents: int | None = Field(default=None, ge=1)
    """Most validation documents; None for all. Ends a stream's first pass early. Sensible: 50 to 5000."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents: no empty ones, no text on both sides."""

    train: Iterable[str]
    """Training documents: a `Sequence[str]`, or an iterable that reads the stream afresh each time."""
    validation: Sequence[str]
    """Validation documents, at least one."""
    fingerprint: str
    """Hexadecimal hash of the training documents in order; for a stream, of its settings and of
    what the first pass read."""
    streaming: bool = False
    """Whether `train` is a stream."""


def load_corpus(settings: CorpusSettings, seed: int, cache_dir: Path | None = None) -> Corpus:
    """Find the documents and split them; the same settings, seed and texts give the same split.

    Documents of white space only are dropped.

    Args:
        settings: where the text is and how much of it to take.
        seed: orders the documents and so decides the split, >= 0.
        cache_dir: where `datasets` keeps what it converts or downloads; None for its own default.

    Raises:
        UserError: nothing found, unreadable, no such text field, or too few documents to split.
    """
    if settings.streaming:
        return _split_stream(settings, seed, cache_dir)
    return _split_sequence(open_documents(settings, cache_dir), settings, seed)


def open_documents(settings: CorpusSettings, cache_dir: Path | None = None) -> Sequence[str]:
    """All documents of a source, in the source's order, unsplit; each is read when it is asked for."""
    files = _text_files(settings)
    if files is not None:
        return files
    table = _open_table(settings, cache_dir)
    sources.require_field(settings.text_field, table.column_names, settings.source)
    return sources.Column(table.select_columns([settings.text_field]), settings.text_field, settings.source)


def document_hash(text: str) -> bytes:
    """16 bytes that identify a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def utf8_length(text: str) -> int:
    """Number of bytes of a text in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def _text_files(settings: CorpusSettings) -> sources.TextFiles | None:
    if settings.source == "stdlib":
        return sources.TextFiles(sources.stdlib_files())
    if not sources.is_local(settings.source):
        return None
    files = sources.local_files(settings.source)
    return sources.TextFiles(files) if sources.file_format(files, settings.source) == "text" else None


def _open_table(settings: CorpusSettings, cache_dir: Path | None) -> Any:
    cache = None if cache_dir is None else str(cache_dir)
    common: dict[str, Any] = {"streaming": settings.streaming, "cache_dir": cache}
    if not sources.is_local(settings.source):
        options = {"name": settings.name, "split": settings.split, **common}
        return sources.load_hub_table(settings.source, **options)
    files = sources.local_files(settings.source)
    data_files = [str(file.resolve()) for file in files]
    file_format = sources.file_format(files, settings.source)
    return sources.load_table(file_format, settings.source, data_files=data_files, split="train", **common)


def _split_sequence(documents: Sequence[str], settings: CorpusSettings, seed: int) -> Corpus:
    kept, digests, capped = _take(documents, settings, seed)
    if capped and len(kept) < 2:
        raise UserError(f"corpus.max_bytes={settings.max_bytes} holds {len(kept)} whole document(s); raise it")
    _require_two(len(kept), len(documents), settings)
    held_out = min(max(1, round(settings.validation_fraction * len(kept))), len(kept) - 1)
    held_out = min(held_out, settings.max_validation_documents or held_out)
    fingerprint = hashlib.sha256(b"".join(digests[held_out:])).hexdigest()
    validation, train = sources.Subset(documents, kept[:held_out]), sources.Subset(documents, kept[held_out:])
    return Corpus(train, validation, fingerprint)


def _take(documents: Sequence[str], settings: CorpusSettings, seed: int) -> tuple[list[int], list[bytes], bool]:
    """Indices and hashes of the distinct documents at the front of the shuffled order; whether a limit ended
    it."""
    kept: dict[bytes, int] = {}
    total = 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        text = documents[int(index)]
        digest = document_hash(text)
        if not text.strip() or digest in kept:
            continue
        total += utf8_length(text)
        if _beyond(settings, len(kept) + 1, total):
            return list(kept.values()), list(kept), True
        kept[digest] = int(index)
    return list(kept.values()), list(kept), False


def _beyond(settings: CorpusSettings, documents: int, num_bytes: int) -> bool:
    too_many = settings.max_documents is not None and documents > settings.max_documents
    return too_many or (settings.max_bytes is not None and num_bytes > settings.max_bytes)


def _require_two(kept: int, found: int, settings: CorpusSettings) -> None:
    if kept >= 2:
        return
    if kept == 0:
        raise UserError(f"corpus {settings.source} is empty: {found} document(s), none with text")
    raise UserError(
        f"corpus {settings.source} has one distinct document, which cannot be split by document into "
        "training and validation; give several files, or JSONL with one document per line"
    )


@dataclass(frozen=True)
class _Stream:
    """The first documents of a source, up to the limits of the settings, without the empty ones;
    re-iterable."""

    settings: CorpusSettings
    seed: int
    cache_dir: Path | None

    def __iter__(self) -> Iterator[str]:
        count = total = 0
        for text in self._source():
            if not text.strip():
                continue
            count, total = count + 1, total + utf8_length(text)
            if _beyond(self.settings, count, total):
                return
            yield text
            if count == self.settings.max_documents:  # do not ask the source for a row that is not wanted
                return

    def _source(self) -> Iterable[str]:
        files = _text_files(self.settings)
        if files is not None:
            return sources.Subset(files, np.random.default_rng(self.seed).permutation(len(files)).tolist())
        table = _open_table(self.settings, self.cache_dir)
        if self.settings.shuffle_buffer:
            table = table.shuffle(seed=self.seed, buffer_size=self.settings.shuffle_buffer)
        return sources.table_rows(table, self.settings.text_field, self.settings.source)

    def held_out(self, text: str) -> bool:
        """Whether a text belongs to validation: its salted hash, read as a number in [0, 1), is below the
        fraction."""
        salted = hashlib.blake2b(document_hash(text), key=str(self.seed).encode(), digest_size=8).digest()
        return int.from_bytes(salted) < self.settings.validation_fraction * 2**64


@dataclass(frozen=True)
class _StreamedTrain:
    """The training side of a stream; each `iter` reads the source afresh."""

    stream: _Stream

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.stream if not self.stream.held_out(text))


def _split_stream(settings: CorpusSettings, seed: int, cache_dir: Path | None) -> Corpus:
    if settings.max_documents is None and settings.max_bytes is None:
        raise UserError("corpus.streaming needs corpus.max_documents or corpus.max_bytes, to know where to stop")
    stream = _Stream(settings, seed, cache_dir)
    seen = hashlib.sha256(f"{settings.model_dump_json()} {seed}".encode())
    validation: dict[str, None] = {}  # a dict, so that a repeated document is scored once
    train = 0
    for text in stream:
        if stream.held_out(text):
            validation[text] = None
        else:
            train += 1
            seen.update(document_hash(text))
        if train and len(validation) == settings.max_validation_documents:
            break
    if not train or not validation:
        raise UserError(
            f"stream {settings.source} gave {train} training and {len(validation)} validation documents; "
            "raise corpus.max_documents, corpus.max_bytes or corpus.validation_fraction"
        )
    limit = settings.max_validation_documents
    return Corpus(_StreamedTrain(stream), list(validation)[:limit], seen.hexdigest(), streaming=True)
