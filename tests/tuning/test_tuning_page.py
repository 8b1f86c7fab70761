"""The page of a tuning: complete, escaped, and drawn by a real browser."""

import dataclasses
import html
import re
import shutil
import subprocess

import pytest

from crossways.tuning.page import headline, write_page
from crossways.tuning.timing import Timed, Timing, notes
from crossways.tuning.tune import tune

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


@pytest.fixture
def result(olmoe, tokenizer, corpus, settings, protocol, tmp_path):
    every = settings.model_copy(update={"families": ("token-choice", "usmoe", "threshold"), "budgets": (0.75,)})
    found = tune(olmoe, tokenizer, corpus, tmp_path, max_loss="5%", settings=every, protocol=protocol, verify=False)
    timed = Timed("scoring", 3, 100.0, 120.0, 1.2, 1.1, 1.3)
    return dataclasses.replace(found, timing=Timing((timed,), 1, "cpu", "grouped_mm", 0.5))


def test_the_page_says_what_was_found(result, tmp_path):
    text = write_page(result, tmp_path / "page.html").read_text()
    assert html.escape(headline(result)).replace("&#x27;", "&#39;") in text
    assert "This confirms a loss within 5%." in text
    assert text.count('<th class="sticky" scope="row">') == 1 + len(result.points)
    assert "× 1.20 <small>1.10 to 1.30</small>" in text
    assert "grouped product" in text
    without_scripts = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'\b(?:src|href)="https?://', without_scripts)


def test_the_headline_claims_no_more_than_the_verdict(result):
    for verdict, phrase in (
        ("not shown", "its upper bound is not: more text would tell"),
        ("contradicted", "was not borne out, and is not saved"),
    ):
        changed = dataclasses.replace(result.confirmation, verdict=verdict)
        assert phrase in headline(dataclasses.replace(result, confirmation=changed))


def test_notes_say_what_ragged_choices_cost_and_whether_others_were_in_the_way(result):
    quiet, busy = result.timing, dataclasses.replace(result.timing, load=5.0)
    assert not any("row of its own" in note for note in notes(quiet, (2.0, 1.0)))
    assert any("row of its own" in note for note in notes(quiet, (2.3, 1.0)))
    ours = dataclasses.replace(
        quiet, chosen_experts="crossways", timed=(dataclasses.replace(quiet.timed[0], by_experts=1.1),)
    )
    assert not any("row of its own" in note for note in notes(ours, (2.3, 1.0)))
    assert "scoring: by the experts alone × 1.10." in notes(ours, (2.3, 1.0))
    assert any("in use (load average 5)" in note for note in notes(busy, (2.0,)))


def test_a_browser_draws_it_and_runs_nothing_foreign(result, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"NO BROWSER: the page was not opened; install one of {', '.join(BROWSERS)}")
    own = dataclasses.replace(result.own, description=HOSTILE)
    page = write_page(dataclasses.replace(result, model=HOSTILE, own=own), tmp_path / "page.html")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    dom = subprocess.run(
        [browser, *flags, profile, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert re.search(r'data-plots-drawn="3"', dom)
    assert re.search(r'data-plots-failed="0"', dom)
    assert "<title>owned" not in dom
    assert "&lt;img src=x" in dom
