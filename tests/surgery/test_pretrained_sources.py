"""Where a pretrained model is looked for. That the GGUF of a package loads is tested by `make test-pretrained`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from crossways.errors import UserError
from crossways.surgery import sources
from crossways.surgery.sources import load_pretrained, locate


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "shipped_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')\n", encoding="utf-8")
    (folder / "one.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_places(package):
    assert locate("some/name") == ("some/name", None)
    assert locate(str(package), "one.gguf") == (str(package), "one.gguf")
    assert locate(str(package / "one.gguf")) == (str(package), "one.gguf")
    assert locate("package:shipped_model") == (str(package), "one.gguf")


def test_a_package_with_several_files_must_be_asked_for_one(package):
    (package / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"2 GGUF files \['one.gguf', 'two.gguf'\]"):
        locate("package:shipped_model")
    assert locate("package:shipped_model", "two.gguf") == (str(package), "two.gguf")


@pytest.mark.parametrize(
    ("model", "gguf", "words"),
    [
        ("package:no_such_package_anywhere", None, "no installed package"),
        ("package:json.tool;x", None, "no installed package"),
        ("{folder}", "absent.gguf", "no such file"),
        ("{folder}/absent.gguf", None, "no such file"),
        ("{folder}/one.gguf", "one.gguf", "not needed"),
    ],
)
def test_what_is_not_there(package, model, gguf, words):
    with pytest.raises(UserError, match=words):
        locate(model.format(folder=package), gguf)


def test_a_package_without_a_file(package):
    (package / "one.gguf").unlink()
    with pytest.raises(UserError, match="holds no GGUF file"):
        locate("package:shipped_model")


def test_what_is_no_model_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json in it"):
        load_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="cannot load"):
        load_pretrained(str(tmp_path))


def test_a_gguf_file_and_the_dtype_reach_transformers(package, monkeypatch):
    taken = []

    class Loads:
        config = SimpleNamespace(quantization_config="some")

        @classmethod
        def from_pretrained(cls, place, **options):
            taken.append((place, options))
            return cls

    monkeypatch.setattr(sources, "AutoModelForCausalLM", Loads)
    monkeypatch.setattr(sources, "AutoTokenizer", Loads)
    monkeypatch.setattr(sources, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[package]))
    load_pretrained("package:shipped_model", dtype=None, revision="x")
    load_pretrained(str(package / "one.gguf"), dtype=torch.bfloat16)
    assert taken == [
        (str(package), {"gguf_file": "one.gguf", "dtype": torch.float32, "revision": "x"}),
        (str(package), {"gguf_file": "one.gguf"}),
        (str(package), {"gguf_file": "one.gguf", "dtype": torch.bfloat16}),
        (str(package), {"gguf_file": "one.gguf"}),
    ]
    assert Loads.config.quantization_config is None
