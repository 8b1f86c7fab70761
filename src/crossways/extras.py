"""Optional parts of the package: what to install when one is missing."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from crossways.errors import UserError


def require(*modules: str, extra: str) -> None:
    """Raise `UserError` that names the extra, unless all modules are installed. Imports none of them.

    Args:
        *modules: top-level module names.
        extra: the extra of this package that installs them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'crossways[{extra}]'")


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions by distribution name, for a record."""
    return {name: version(name) for name in distributions}
