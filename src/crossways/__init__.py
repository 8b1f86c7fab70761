"""Routing for Mixture-of-Experts models: choose the token-expert pairs, compute with them, look at them."""

__version__ = "0.1.0"


def register() -> None:
    """Make transformers' Auto classes know crossways' models, so that `from_pretrained` loads them.

    Explicit, since importing a package should not change another one. Idempotent. Imports torch and transformers.
    """
    from crossways.models import register as register_models

    register_models()
