"""Which source a setting means, and that bad ones are one clear line."""

import sysconfig
from pathlib import Path

import pytest

from crossways.errors import UserError
from crossways.training import sources


@pytest.mark.parametrize(
    "source",
    [
        "./corpus",
        "../corpus",
        "~/corpus",
        "/data/corpus",
        "a.txt",
        "data/b.jsonl",
        "c.parquet",
        "d/*.md",
        "a/b/c",
    ],
)
def test_paths_are_local(source):
    assert sources.is_local(source)


@pytest.mark.parametrize(
    "source",
    ["wikitext", "Salesforce/wikitext", "mlfoundations/dclm-baseline-1.0", "owner/name.v2", "allenai/c4"],
)
def test_names_are_not_local(source):
    assert not sources.is_local(source)


def test_an_existing_path_is_local_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not sources.is_local("wikitext")
    Path("wikitext").mkdir()
    assert sources.is_local("wikitext")


def test_standard_library_proper_only():
    root = Path(sysconfig.get_path("stdlib"))
    relative = [path.relative_to(root) for path in sources.stdlib_files()]
    assert {Path("json/decoder.py"), Path("this.py")} <= set(relative)
    assert len(relative) > 300
    assert [path.as_posix() for path in relative] == sorted(path.as_posix() for path in relative)
    assert not sources.NOT_LIBRARY & {part for path in relative for part in path.parts}
    assert not [path for path in relative if path.name.startswith("_sysconfigdata")]


def test_standard_library_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no library sources"):
        sources.stdlib_files()


def test_text_files_keep_every_byte(tmp_path):
    text = "a\r\nb\rc\n\ufeff\u0301\U0001f600\x00"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert sources.TextFiles(sources.local_files(str(tmp_path)))[0] == text


def test_undecodable_bytes_name_the_file_and_the_place(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        sources.TextFiles([path])[0]


def test_directory_skips_hidden_and_unknown_files(tmp_path):
    for name in ["b.md", "a.txt", "sub/c.py", ".hidden.txt", ".git/d.txt", "picture.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [path.relative_to(tmp_path).as_posix() for path in sources.local_files(str(tmp_path))]
    assert found == ["a.txt", "b.md", "sub/c.py"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no corpus files in directory"):
        sources.local_files(str(tmp_path / "none"))


def test_globs_take_any_suffix_and_sort(tmp_path):
    for name in ["b.tex", "a.tex", "c.log"]:
        (tmp_path / name).write_text(name)
    assert [path.name for path in sources.local_files(f"{tmp_path}/*.tex")] == ["a.tex", "b.tex"]
    with pytest.raises(UserError, match=r"no file matches .*\*\.csv"):
        sources.local_files(f"{tmp_path}/*.csv")


def test_mixed_or_empty_files_are_refused(tmp_path):
    files = [tmp_path / name for name in ("a.json", "b.jsonl", "c.parquet")]
    for file in files:
        file.touch()
    with pytest.raises(UserError, match=r"data is empty: 3 file\(s\) without a byte"):
        sources.file_format(files, "data")
    files[0].write_text("{}")
    with pytest.raises(UserError, match="data mixes json and parquet files"):
        sources.file_format(files, "data")
    assert sources.file_format(files[:2], "data") == "json"


def test_rows_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    options = {"data_files": [str(path)], "split": "train", "cache_dir": str(tmp_path / "cache")}
    column = sources.Column(sources.load_table("json", "latin", **options), "text", "latin")
    assert column[0] == "fine"
    with pytest.raises(UserError, match="row 1 of latin is not UTF-8"):
        column[1]


def test_slices_and_negative_indices(tmp_path):
    paths = [tmp_path / f"{letter}.txt" for letter in "abc"]
    for path in paths:
        path.write_text(path.stem)
    documents = sources.TextFiles(paths)
    assert (documents[-1], list(documents[1:]), list(documents[::-1])) == ("c", ["b", "c"], ["c", "b", "a"])
    with pytest.raises(IndexError):
        documents[3]
