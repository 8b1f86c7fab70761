"""The page as text: complete, escaped, honest about what is missing."""

import math
import os
import re
from html.parser import HTMLParser

import pytest

from crossways.report import render_report
from crossways.study.record import Comparison

HOSTILE = "<script>alert(1)</script>\"'&</script><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    """Collects elements with their attributes, and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(make_record, tmp_path):
    def render(records=None, **texts):
        records = records or [make_record(v, s) for v in ("a", "b") for s in (0, 1)]
        out = render_report(records, **({"title": "T", "out": tmp_path / "new" / "report.html"} | texts))
        return out.read_text(encoding="utf-8")

    return render


def test_the_page_is_complete_and_loads_nothing(page, make_record):
    comparison = Comparison(title="C", question="Q?", variants=("a", "b"), baseline="a")
    text = page(comparisons=[comparison], recipe_text="seed: 1")
    tags = Tags(text)
    for _, attrs in tags.tags:
        for name in ("src", "href", "action", "data"):
            assert not re.match(r"(https?:)?//", attrs.get(name) or ""), attrs
    assert tags.all("link") == []
    assert text.count("plotly.js v") == 1
    assert {attrs["data-figure"] for attrs in tags.all("div") if "data-figure" in attrs} == {
        "bits-1",
        "change-1",
        "curves",
        "disabled",
        "load-0",
        "load-1",
    }
    assert "default-src 'none'" in tags.all("meta")[1]["content"]


def test_every_text_is_escaped(page, make_record):
    records = [make_record(HOSTILE, s, label=HOSTILE, description=HOSTILE, leaky=True) for s in (0, 1)]
    hostile = records[0].evaluation.model_copy(update={"rule": HOSTILE, "leak_reason": HOSTILE})
    records[0] = records[0].model_copy(update={"evaluation": hostile, "environment": {HOSTILE: HOSTILE}})
    comparison = Comparison(title=HOSTILE, question=HOSTILE, variants=(HOSTILE, "gone" + HOSTILE), baseline=HOSTILE)
    text = page(
        records,
        title=HOSTILE,
        description=HOSTILE,
        notice=HOSTILE,
        comparisons=[comparison],
        recipe_text=HOSTILE,
        corpus=HOSTILE,
    )
    tags = Tags(text)
    assert tags.all("img") == []
    assert [attrs for attrs in tags.all("script") if attrs.get("type") != "application/json"] == [{}, {}]
    assert not [attrs for _, attrs in tags.tags if any(name.startswith("on") for name in attrs)]
    assert text.count(HOSTILE) == 0
    assert text.count("&lt;script&gt;alert(1)") >= 12


def test_dagger_dash_and_best_are_in_the_table(page, make_record):
    records = [make_record("leaky", s, bits=2.2 + s / 1000, leaky=True) for s in (0, 1)]
    records += [make_record("dense", s, bits=2.0 + s / 1000, dense=True) for s in (0, 1)]
    text = page(records)
    cells = Tags(text).all("td")
    assert len([c for c in cells if "leaky" in (c.get("class") or "")]) == 2
    assert {c["title"] for c in cells if "missing" in (c.get("class") or "")} >= {"dense model: it has no router"}
    assert all(c.get("title") for c in cells if "missing" in (c.get("class") or ""))
    best = re.findall(r'<td class="[^"]*best[^"]*"[^>]*>([\d.]+)', text)
    assert best == ["64.07", "2.000"] or best == ["64.07", "2.001"]
    assert "† The rule looks at later tokens" in text


def test_no_footnote_without_a_leak_and_no_emphasis_with_one_seed(page, make_record):
    text = page([make_record("a"), make_record("b", bits=3.0)])
    assert "† The rule looks" not in text
    assert re.findall(r'<td class="[^"]*best', text) == []
    assert "n = 1" in text


def test_what_is_not_finite_breaks_nothing(page, make_record):
    text = page([make_record("a", 0, bits=math.nan), make_record("a", 1), make_record("b", bits=math.inf)])
    assert "not finite for at least one seed" in text
    assert ">NaN" in text


def test_a_variant_without_run_is_named_and_a_bare_study_still_renders(page, make_record):
    comparison = Comparison(title="C", question="Q", variants=("x", "y"), baseline="x")
    text = page([make_record("a", dense=True, curve=())], comparisons=[comparison])
    assert "No finished run yet: x, y." in text
    assert [a for a in Tags(text).all("div") if "data-figure" in a] == []


def test_warnings_name_what_spoils_the_comparison(page, make_record):
    record = make_record("b", 1)
    other = record.evaluation.protocol.model_copy(update={"window": 128})
    record = record.model_copy(update={"evaluation": record.evaluation.model_copy(update={"protocol": other})})
    text = page([make_record("a", 0), record])
    assert "different protocols" in text
    assert "Not every variant has a finished run for every seed." in text
    assert "under different protocols" not in page()


def test_no_records_is_refused_and_nothing_else_is_left_in_the_folder(page, tmp_path):
    with pytest.raises(ValueError, match="no run records"):
        render_report([], title="T", out=tmp_path / "x.html")
    assert os.listdir(tmp_path) == []
    page()
    assert os.listdir(tmp_path / "new") == ["report.html"]
