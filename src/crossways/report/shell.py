"""What every page has: style sheet, scripts, security policy, templates."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from crossways.report.style import (
    DARK,
    LOAD_SCALE,
    LOAD_SCALE_DARK,
    VARIANT_COLORS,
    VARIANT_COLORS_DARK,
    VariantStyle,
)


def slot(style: VariantStyle) -> dict[str, object]:
    """How the style sheet finds the colour of a variant, light or dark."""
    return {"number": VARIANT_COLORS.index(style.color), "dash": style.dash}


def assets() -> dict[str, object]:
    """Style sheet and scripts; a script runs only if its digest stands in the page's security policy."""
    plotly, own = get_plotlyjs().replace("\r\n", "\n"), _read("page.js")
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in (plotly, own))
    assert "</script" not in plotly.lower()
    assert "</script" not in own.lower()
    return {
        "css": Markup(_read("page.css")),
        "plotly_js": Markup(plotly),
        "page_js": Markup(own),
        "dark": DARK,
        "light_variants": VARIANT_COLORS,
        "dark_variants": VARIANT_COLORS_DARK,
        "load_scale": LOAD_SCALE,
        "load_scale_dark": LOAD_SCALE_DARK,
        "policy": f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
    }


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _read(name: str) -> str:
    return resources.files("crossways.report").joinpath(name).read_text(encoding="utf-8")


def environment() -> Environment:
    """Templates, escaping what they are given and refusing what is missing."""
    loader = PackageLoader("crossways.report", "")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
