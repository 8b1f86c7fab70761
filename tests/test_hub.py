"""Names that may mean something on the hub. Nothing here reaches it."""

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from crossways import hub
from crossways.errors import UserError
from crossways.hub import ask_hub, loading_options


def failure(kind):
    error = kind.__new__(kind)  # their arguments are a response of the client library of the day
    Exception.__init__(error, "told by the hub")
    return error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (None, "there"),
        (failure(RepositoryNotFoundError), "absent"),
        (failure(GatedRepoError), "there"),
        (failure(HfHubHTTPError), "there"),
        (HFValidationError("no name"), "absent"),
        (ConnectionError("offline mode is enabled"), "silent"),
        (RuntimeError("some client's own"), "silent"),
    ],
)
def test_what_the_hub_says(monkeypatch, error, answer):
    asked = []

    class Api:
        def repo_info(self, name, **options):
            asked.append((name, options["repo_type"]))
            if error is not None:
                raise error

    monkeypatch.setattr(hub, "HfApi", Api)
    assert ask_hub("owner/name", "dataset") == answer
    assert asked == [("owner/name", "dataset")], "once, and no more"


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Sets what the hub says, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda answer: monkeypatch.setattr(hub, "ask_hub", lambda name, kind: answer)


@pytest.mark.parametrize(("answer", "words"), [("absent", "has none of that name"), ("silent", "cannot be reached")])
def test_a_mistyped_name_says_what_was_looked_for(answers, tmp_path, answer, words):
    answers(answer)
    (tmp_path / "smollm2-moe").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        loading_options("smolm2-moe")
    message = str(caught.value)
    assert "no such folder (did you mean 'smollm2-moe'?)" in message
    assert all(way in message for way in ("give a folder", "a hub name (owner/name)", "package:NAME"))
    assert "\n" not in message


def test_what_is_there_needs_no_option(answers, tmp_path):
    answers("there")
    assert loading_options("owner/name") == {}
    answers("absent")
    (tmp_path / "folder").mkdir()
    assert loading_options("folder") == {}


def test_offline_what_was_downloaded_is_taken_without_asking_again(answers, monkeypatch):
    answers("silent")
    held = {("owner/name", "config.json"): "/cache/config.json", ("owner/name", "b.gguf"): object()}
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: held.get((name, file)))
    assert loading_options("owner/name") == {"local_files_only": True}
    with pytest.raises(UserError, match="nothing of that name was downloaded"):
        loading_options("owner/name", "b.gguf")  # what the cache gives for a file known to be absent is no path


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "runs/one/cartesian/model"])
def test_a_path_is_never_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(hub, "ask_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="does not exist"):
        loading_options(name)
