"""What the figures hold: the right numbers, escaped text, JSON that a browser can parse."""

import json
import math

import pytest

from crossways.report.compare import differences
from crossways.report.figures.bits import bits_figure, difference_figure
from crossways.report.figures.curves import curves_figure, mean_curve, moving_average, opening_range
from crossways.report.figures.disabled import disabled_figure
from crossways.report.figures.load import DOUBLINGS, load_figure, load_profile
from crossways.report.style import VARIANT_COLORS, figure_json, plain, variant_styles
from crossways.study.record import Comparison, CurvePoint, DisabledExpert, ExpertLoad
from crossways.study.table import group_by_variant, summarize


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def test_bits_show_mean_seeds_leak_and_unigram(make_record):
    groups = group_by_variant([make_record(seed=s, bits=2.0 + 0.2 * s, leaky=True) for s in (0, 1)])
    figure = bits_figure(groups, ["moe"], variant_styles(groups), "moe")
    assert named(figure, "one seed")[0].x == (2.0, 2.2)
    assert named(figure, "mean")[0].x == pytest.approx((2.1,))
    assert named(figure, "mean")[0].error_x.array == pytest.approx((0.2 / math.sqrt(2),))
    assert figure.data[-1].name.startswith("† training rule")
    assert figure.data[-1].x == pytest.approx((2.0 - 1 / 3, 2.2 - 1 / 3))
    assert figure.layout.shapes[0].x0 == 3.5
    assert figure.layout.yaxis.ticktext == ("moe (baseline)",)


def test_differences_draw_zero_and_the_pairs(make_record):
    groups = group_by_variant([make_record("a", bits=2.0), make_record("b", bits=2.5)])
    comparison = Comparison(title="t", question="q", variants=("a", "b"), baseline="a")
    figure = difference_figure(differences(groups, comparison), variant_styles(groups))
    assert figure.layout.shapes[0].x0 == 0
    assert [trace.x for trace in figure.data] == [(0.5,)]


def test_a_diverged_seed_takes_the_mean_away_but_not_the_others(make_record):
    groups = group_by_variant([make_record(seed=0), make_record(seed=1, bits=math.nan), make_record(seed=2)])
    figure = bits_figure(groups, ["moe"], variant_styles(groups), "moe")
    assert named(figure, "one seed")[0].x == (2.0, 2.0)
    assert named(figure, "mean") == []


def test_mean_curve_uses_only_the_points_all_seeds_logged(make_record):
    def record(seed, losses):
        points = [CurvePoint(step=t, tokens=t, loss=loss) for t, loss in losses.items()]
        return make_record(seed=seed, curve=points)

    records = [record(0, {1: 4.0, 2: 2.0, 3: 1.0}), record(1, {1: 6.0, 3: 2.0})]
    assert mean_curve(records) == [(1, 5.0), (3, 1.5)]


def test_moving_average_by_hand():
    # Half a window is int(4 * 0.5 / 2) = 1 point; the start is exact, the end is cut off.
    assert moving_average([8.0, 4.0, 0.0, 2.0], share=0.5) == [8.0, 4.0, 2.0, 1.0]
    assert moving_average([], share=0.5) == []


def test_the_opening_range_leaves_the_steep_start_out():
    low, high = opening_range([[(0, 100.0), (50, 3.0), (100, 2.0)]])
    assert low == pytest.approx(1.95)
    assert high == pytest.approx(3.05)
    assert opening_range([[(1, math.nan)], []]) is None


def test_curves_draw_each_seed_and_one_mean_per_variant(make_record):
    groups = group_by_variant([make_record(v, s) for v in ("a", "b") for s in (0, 1)])
    figure = curves_figure(groups, variant_styles(groups))
    assert len(figure.data) == 6
    assert [trace.name for trace in figure.data if trace.showlegend] == ["a", "b"]
    assert {trace.line.color for trace in figure.data if trace.name == "a"} == {VARIANT_COLORS[0]}


def test_disabled_bars_leave_dense_out_and_overflow_too(make_record):
    overflow = make_record("moe", 0).evaluation.model_copy(
        update={"disabled": DisabledExpert(raw=math.inf, renormalized=200.0)}
    )
    rows = summarize([make_record("dense", dense=True), make_record(evaluation=overflow)])
    figure = disabled_figure(rows)
    assert figure.layout.yaxis.ticktext == ("moe",)
    assert {trace.name: trace.x for trace in figure.data} == {
        "all experts": (64.0,),
        "top-1 disabled, renormalized": (200.0,),
        "top-1 disabled, raw": (),
    }
    assert figure.layout.xaxis.type == "log"


def test_load_is_ranked_relative_to_even_and_averaged_over_seeds(make_record):
    first = make_record(seed=0, expert_load=[ExpertLoad(router="layer 1", load=(0.25, 0.75))])
    second = make_record(seed=1, expert_load=[ExpertLoad(router="layer 1", load=(1.0, 0.0))])
    assert load_profile([first, second]) == {"layer 1": [1.75, 0.25]}
    figure = load_figure([first, second])
    assert figure.data[0].z[0] == pytest.approx((math.log2(1.75), -2.0))


def test_an_idle_expert_and_nan_take_the_last_colour(make_record):
    record = make_record(expert_load=[ExpertLoad(router="r", load=(math.nan, 0.0, 1.0))])
    assert load_figure([record]).data[0].z[0] == pytest.approx((math.log2(3), -DOUBLINGS, -DOUBLINGS))
    assert load_figure([make_record(dense=True)]) is None


def test_text_is_escaped_wrapped_and_shortened():
    assert plain("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"
    assert plain("one two three", width=7) == "one two<br>three"
    assert plain("a\nb") == "a b"
    assert plain("word " * 50, width=10, lines=2).count("<br>") == 1
    assert plain("word " * 50, width=10, lines=2).endswith("…")


def test_figure_json_is_strict_and_cannot_end_its_script(make_record):
    points = [CurvePoint(step=1, tokens=1, loss=math.nan), CurvePoint(step=2, tokens=2, loss=math.inf)]
    groups = group_by_variant([make_record("</script>", label="</script><!--", curve=points)])
    text = figure_json(curves_figure(groups, variant_styles(groups)))
    assert "<" not in text
    assert json.loads(text)["data"][0]["y"] == [None, None]
    assert json.loads(text)["data"][0]["name"] == "&lt;/script&gt;&lt;!--"


def test_styles_repeat_only_with_another_dash():
    styles = list(variant_styles(map(str, range(20))).values())
    assert len({(style.color, style.dash) for style in styles}) == 20
