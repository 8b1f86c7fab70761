"""The page in a real browser: plots are drawn, hostile text does not run, nothing is fetched."""

import re
import shutil
import subprocess

import pytest

from crossways.report import render_report
from crossways.study.record import Comparison, ExpertLoad

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
    "--enable-logging=stderr",
    "--dump-dom",
)
# Were it to run, the title would change; an alert would stop the page before the plots.
HOSTILE = "<script>document.title='owned'</script></script><img src=x onerror=document.title='owned'><b>x</b>"


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """Opens a file in headless Chromium; returns the DOM after all scripts ran, and the browser's log."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"NO BROWSER: the report was not tested in a browser; install one of {', '.join(NAMES)}")

    def run(path, *more):
        profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        command = [browser, *FLAGS, *more, profile, path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def report(make_record, tmp_path_factory):
    records = [make_record("a", s, bits=2 + s / 50) for s in (0, 1)]
    records += [make_record(HOSTILE, s, label=HOSTILE, leaky=True) for s in (0, 1)]
    ragged = [ExpertLoad(router="layer 1", load=(0.5, 0.5)), ExpertLoad(router="layer 2", load=(0.1,) * 10)]
    records += [make_record("ragged", 0, expert_load=ragged)]
    records += [make_record("diverged", 0, bits=float("nan")), make_record("dense", 0, dense=True)]
    comparison = Comparison(title="C", question=HOSTILE, variants=("a", HOSTILE, "diverged"), baseline="a")
    texts = {"title": "Plain title", "notice": HOSTILE, "recipe_text": HOSTILE, "comparisons": [comparison]}
    return render_report(records, out=tmp_path_factory.mktemp("page") / "report.html", **texts)


@pytest.fixture(scope="module")
def opened(report, dump):
    """The page opened once: its DOM and the browser's log."""
    return dump(report)


def without_scripts(dom):
    return re.sub(r"<script\b.*?</script>", "", dom, flags=re.DOTALL)


def plot(dom, name):
    """The drawn part of one figure."""
    start = dom.index(f'data-figure="{name}"')
    return dom[start : dom.index('<script type="application/json"', start)]


def test_every_plot_is_drawn(opened):
    dom, log = opened
    drawn, failed = (re.search(rf'data-plots-{word}="(\d+)"', dom).group(1) for word in ("drawn", "failed"))
    assert (drawn, failed) == ("8", "0"), log
    assert plot(dom, "bits-1").count('class="point"') >= 6
    assert plot(dom, "change-1").count('class="point"') >= 3
    # Two seeds and a mean for each of two variants, the one seed of two more, nothing of the diverged one.
    assert plot(dom, "curves").count('class="js-line"') == 8
    assert plot(dom, "disabled").count('class="point"') >= 8
    # Chromium draws a heatmap as one image made on the spot.
    assert re.search(r'<image[^>]+href="data:image/png', plot(dom, "load-0"))


def test_hostile_text_is_shown_and_does_not_run(opened):
    dom, _ = opened
    assert "<title>Plain title</title>" in dom
    body = without_scripts(dom)
    assert "onerror=document" in body
    assert not re.search(r"<img\b", body)
    assert not re.search(r"<b>x</b>", body)
    assert "&lt;script&gt;" in plot(dom, "bits-1")


def test_nothing_is_fetched_and_the_security_policy_is_kept(opened):
    dom, log = opened
    assert not re.search(r"""\b(?:src|href|action)=["']?(?:https?:)?//""", without_scripts(dom))
    assert "Content Security Policy" not in log
    assert "Uncaught" not in log


def test_a_foreign_script_would_be_refused(report, dump):
    foreign = "<script>document.title='owned'</script><footer>"
    changed = report.with_name("foreign.html")
    changed.write_text(report.read_text().replace("<footer>", foreign))
    dom, log = dump(changed)
    assert "<title>Plain title</title>" in dom
    assert "Content Security Policy" in log


def test_a_dark_scheme_draws_in_dark_colours(report, dump):
    light, dark = (dump(report, f"--blink-settings=preferredColorScheme={n}")[0] for n in (1, 0))
    assert "rgb(51, 54, 63)" in plot(light, "bits-1")
    assert "rgb(220, 222, 228)" in plot(dark, "bits-1")
    assert "rgb(51, 54, 63)" not in plot(dark, "bits-1")


def test_the_controls_hide_a_variant_and_change_the_axes(report, opened, dump):
    script = """<script>
      const controls = document.querySelector('[data-controls="curves"]');
      controls.querySelector("button").click();
      for (const box of controls.querySelectorAll("input")) box.click();
    </script></body>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    changed = report.with_name("pressed.html")
    changed.write_text(text.replace("</body>", script))
    before, after = plot(opened[0], "curves"), plot(dump(changed)[0], "curves")
    assert before.count('class="js-line"') - after.count('class="js-line"') == 3
    ticks = [re.findall(r'class="ytick"><text[^>]*>([^<]+)<', dom) for dom in (before, after)]
    assert ticks[0] != ticks[1]
    assert ticks[1]
