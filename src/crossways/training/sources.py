"""Where documents come from: the embedded corpus, local files, JSONL and Parquet tables, the Hugging Face
hub.

A source is a sequence of documents that reads each one when it is asked for (`TextFiles`, `Column`), so that
a large corpus never sits in memory. Which source a `corpus.source` setting means is decided here, by
`is_local`.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import datasets

from crossways.errors import UserError
from crossways.hub import ask_hub, of_the_hub
from crossways.rules.registry import nearest

TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
# Directories of the standard library's folder that are not the library proper.
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "__pycache__",
}


class Documents(Sequence[str]):
    """A read-only sequence of documents; subclasses give `__len__` and `read`."""

    def read(self, index: int) -> str:
        """The text of document `index`, 0 <= index < len(self)."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """One document, or the documents of a slice (still read on demand)."""
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        return self.read(range(len(self))[index])


@dataclass(frozen=True, eq=False)
class Subset(Documents):
    """Some documents of another sequence, in the order of `indices`."""

    base: Sequence[str]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> str:
        """Document `indices[index]` of the base."""
        return self.base[int(self.indices[index])]


@dataclass(frozen=True, eq=False)
class TextFiles(Documents):
    """One document per UTF-8 file, read at each access, bytes unchanged (no newline translation)."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> str:
        """The text of a file.

        Raises:
            UserError: the file is not UTF-8 or cannot be read.
        """
        path = self.paths[index]
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            raise UserError(
                f"{path} is not UTF-8 text: byte 0x{bad:02x} at offset {error.start}; convert or leave it out"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class Column(Documents):
    """The text field of a memory-mapped `datasets.Dataset`."""

    dataset: datasets.Dataset
    field: str
    source: str

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> str:
        """The text of a row; a null is an empty document.

        Raises:
            UserError: the row is not text, or not UTF-8.
        """
        try:
            row = self.dataset[index]
        except UnicodeDecodeError as error:
            raise UserError(f"row {index} of {self.source} is not UTF-8 text: {error.reason}") from error
        return text_of(row, self.field, self.source)


def text_of(row: Mapping[str, Any], field: str, source: str) -> str:
    """The text in one row of a table; a null is an empty text.

    Raises:
        UserError: the row has no such field, or it is not text.
    """
    require_field(field, list(row), source)
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"field {field!r} of {source} holds {type(text).__name__}, not text")
    return text or ""


def require_field(field: str, fields: Sequence[str], source: str) -> None:
    """Raise a `UserError` that names the fields there are, and the nearest, unless `field` is one of them."""
    if field in fields:
        return
    near = difflib.get_close_matches(field, fields, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{source} has no text field {field!r}; its fields are {', '.join(fields)}{hint}")


def is_local(source: str) -> bool:
    """Whether `source` means files on this machine; otherwise it is the name of a Hugging Face dataset.

    Local: an existing path; a leading `/`, `./`, `../` or `~`; a glob character; more than one slash (hub
    names are `name` or `owner/name`); a file suffix that starts with a letter (`.txt`, but neither `-1.0` nor
    `.v2`).
    """
    if os.path.exists(source) or source.startswith(("/", ".", "~")):
        return True
    if any(character in source for character in "*?[") or source.count("/") > 1:
        return True
    return re.search(r"\.(?!v\d)[A-Za-z][A-Za-z0-9]{0,7}$", source) is not None


def stdlib_files() -> list[Path]:
    """The `.py` files of the running Python's standard library, sorted by path.

    Left out: tests, IDLE, lib2to3, installed packages, and `_sysconfigdata*`, which describes the machine.

    Raises:
        UserError: this Python ships without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [path for path in found if not path.name.startswith("_sysconfigdata")]
    if not files:
        raise UserError(f"this Python has no library sources in {root}; set corpus.source to text of your own")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def local_files(source: str) -> list[Path]:
    """The files that a path, directory or glob means, sorted.

    A directory means the text and table files below it, hidden ones left out; a path or a glob means what it
    says.

    Raises:
        UserError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file() and _is_corpus_file(file.relative_to(path)))
        files = sorted(below)
    else:
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if not files:
        known = ", ".join((*TEXT_SUFFIXES, *TABLE_FORMATS))
        raise UserError(
            f"no corpus files in directory {source} (looked for {known})"
            if path.is_dir()
            else f"corpus not found: no file matches {source}"
        )
    return files


def _is_corpus_file(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.suffix in (*TEXT_SUFFIXES, *TABLE_FORMATS)


def file_format(files: Sequence[Path], source: str) -> str:
    """ "text", "json" or "parquet", whichever all files are.

    Raises:
        UserError: they are not all of one format, or all are empty.
    """
    if not any(file.stat().st_size for file in files):
        raise UserError(f"corpus {source} is empty: {len(files)} file(s) without a byte")
    formats = {TABLE_FORMATS.get(file.suffix, "text") for file in files}
    if len(formats) > 1:
        raise UserError(
            f"{source} mixes {' and '.join(sorted(formats))} files; "
            "name one kind with a glob, as in 'data/**/*.jsonl'"
        )
    return formats.pop()


def load_hub_table(source: str, **options: Any) -> Any:
    """A dataset of the hub, or, where the hub does not answer, what `datasets` keeps of it.

    Raises:
        UserError: not found, offline, unknown configuration or split.
    """
    answer = ask_hub(source, "dataset")
    if answer == "absent" or (answer == "silent" and not _prepared(source, options.get("cache_dir"))):
        raise UserError(
            f"no dataset {source!r}{nearest(source, ['stdlib'])}: no such file or folder, and {of_the_hub(answer)}"
        )
    return load_table(source, source, **options)


def _prepared(source: str, cache_dir: str | None) -> bool:
    """Whether `datasets` has prepared a dataset of this name before; its folders are named OWNER___NAME, with NAME
    in snake case."""
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    return root.is_dir() and _letters(source) in {_letters(folder.name) for folder in root.iterdir()}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def load_table(path: str, source: str, **options: Any) -> Any:
    """`datasets.load_dataset(path, **options)`, every failure being one line that names `source`.

    Raises:
        UserError: not found, offline, unknown configuration or split, broken file.
    """
    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # builders, network and parsers raise types without a common base
        raise UserError(f"cannot load dataset {source!r}: {_first_line(error)}") from error


def table_rows(dataset: Iterable[Mapping[str, Any]], field: str, source: str) -> Iterator[str]:
    """The texts of a streamed dataset, every failure of the stream being one line that names `source`."""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in load_table: the stream opens files and connections as it goes
            raise UserError(f"cannot read dataset {source!r}: {_first_line(error)}") from error
        yield text_of(row, field, source)


def _first_line(error: Exception) -> str:
    # "An error occurred while generating the dataset" says nothing; its cause does.
    root: BaseException = error
    while isinstance(root, datasets.exceptions.DatasetGenerationError) and root.__cause__ is not None:
        root = root.__cause__
    lines = str(root).strip().splitlines()
    return f"{type(root).__name__}: {lines[0]}" if lines else type(root).__name__
