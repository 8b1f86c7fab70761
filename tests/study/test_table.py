"""`summarize` by hand numbers, the ranking rule, and the three ways to write the table."""

import csv
import io
import math

import pytest
from rich.console import Console

from crossways.study.columns import COLUMNS
from crossways.study.table import best_row, cell, summarize, to_csv, to_markdown, to_rich

BY_KEY = {column.key: column for column in COLUMNS}


def test_summarize_by_hand(make_record):
    rows = summarize([make_record(seed=1, bits=2.2), make_record("dense", dense=True), make_record(bits=2.0)])
    assert [row.variant for row in rows] == ["moe", "dense"]
    assert rows[0].seeds == (0, 1)
    bits = rows[0].figures["bits_per_byte"]
    assert bits.values == (2.0, 2.2)
    assert bits.mean == pytest.approx(2.1)
    assert bits.deviation == pytest.approx(0.2 / math.sqrt(2))
    assert rows[0].figures["parameters_total"].mean == 1_234_567
    assert rows[0].figures["tokens_per_second"].values == (1000.0, 1001.0)
    assert rows[0].figures["disabled_raw"].mean == 300.0
    assert rows[0].figures["disabled_renormalized"].mean == 200.0
    assert rows[1].figures["disabled_raw"] is None


def test_the_leaky_figure_stands_apart_and_is_marked(make_record):
    leaky, causal = summarize([make_record("leaky", leaky=True, bits=2.0), make_record("causal", bits=2.1)])
    assert leaky.figures["perplexity"].mean == 64.0
    assert leaky.figures["training_rule_perplexity"].mean == 32.0
    assert cell(leaky, BY_KEY["training_rule_perplexity"]).leaky
    assert not cell(leaky, BY_KEY["perplexity"]).leaky
    assert causal.figures["training_rule_perplexity"] is None
    assert cell(causal, BY_KEY["training_rule_perplexity"]).reason.startswith("the rule is causal")


def test_a_leaky_figure_never_wins(make_record):
    records = [make_record("leaky", s, bits=2.2 + s / 100, leaky=True) for s in (0, 1)]
    records += [make_record("causal", s, bits=2.0 + s / 100) for s in (0, 1)]
    rows = summarize(records)
    assert rows[0].figures["training_rule_bits_per_byte"].mean < rows[1].figures["bits_per_byte"].mean
    assert best_row(rows, BY_KEY["bits_per_byte"]).variant == "causal"
    assert best_row(rows, BY_KEY["training_rule_bits_per_byte"]) is None


@pytest.mark.parametrize(("gap", "wins"), [(0.021, True), (0.019, False)])
def test_the_best_is_emphasised_only_beyond_the_spread(make_record, gap, wins):
    # Each deviation is 0.02 / sqrt(2), so the two together are 0.02.
    records = [make_record("a", seed, bits=2.0 + 0.02 * seed) for seed in (0, 1)]
    records += [make_record("b", seed, bits=2.0 + gap + 0.02 * seed) for seed in (0, 1)]
    best = best_row(summarize(records), BY_KEY["bits_per_byte"])
    assert (best is not None and best.variant == "a") == wins


def test_one_seed_is_never_emphasised_and_nan_never_wins(make_record):
    assert best_row(summarize([make_record("a"), make_record("b", bits=3.0)]), BY_KEY["bits_per_byte"]) is None
    records = [make_record(v, s, bits=b) for v, b in (("a", math.nan), ("b", 2.0), ("c", 3.0)) for s in (0, 1)]
    assert best_row(summarize(records), BY_KEY["bits_per_byte"]).variant == "b"


def test_a_seed_counted_twice_is_refused(make_record):
    with pytest.raises(ValueError, match="'moe' have seed 0"):
        summarize([make_record(), make_record()])


def test_counted_figures_show_a_spread_only_when_seeds_disagree(make_record):
    row = summarize([make_record(seed=0), make_record(seed=1)])[0]
    assert cell(row, BY_KEY["parameters_total"]).spread == ""
    assert cell(row, BY_KEY["load_imbalance"]).spread == "± 0.00"
    assert cell(summarize([make_record()])[0], BY_KEY["load_imbalance"]).spread == "n = 1"


def test_a_figure_that_a_seed_lacks_says_its_own_n(make_record):
    records = [make_record(seed=s, load_imbalance=None if s == 2 else 1.5) for s in (0, 1, 2)]
    assert cell(summarize(records)[0], BY_KEY["load_imbalance"]).spread == "± 0.00, n = 2"


def test_markdown_keeps_its_columns_whatever_the_label(make_record):
    text = to_markdown(summarize([make_record(label="a|b\n<script>x</script>", leaky=True)]))
    lines = text.splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines[:3]}) == 1
    assert "<script" not in text
    assert "31.99†" in text or "32.00†" in text
    assert lines[-1].startswith("†")


def test_csv_holds_raw_numbers(make_record):
    text = to_csv(summarize([make_record(seed=0, bits=2.0), make_record(seed=1, bits=2.2, label="x")]))
    line = next(csv.DictReader(io.StringIO(text)))
    assert float(line["bits_per_byte_mean"]) == pytest.approx(2.1)
    assert float(line["bits_per_byte_std"]) == pytest.approx(0.141421, rel=1e-4)
    assert line["bits_per_byte_n"] == "2"
    assert line["training_rule_perplexity_mean"] == ""
    assert line["seeds"] == "0 1"


def test_rich_prints_labels_literally(make_record):
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(to_rich(summarize([make_record(label="[red]x[/]", leaky=True)]), "[bold]title"))
    text = console.export_text()
    assert "[red]x[/]" in text
    assert "[bold]title" in text
    assert "†" in text
    assert len(to_rich([]).columns) == 1 + sum(column.headline for column in COLUMNS)
    assert len(to_rich([], width=80).columns) == 5
