"""Routing for Mixture-of-Experts models: choose the token-expert pairs, compute with them, look at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossways.surgery.handle import Handle
    from crossways.tuning.result import TuningResult

__version__ = "0.1.0"


def register() -> None:
    """Make transformers' Auto classes know crossways' models, so that `from_pretrained` loads them.

    Explicit, since importing a package should not change another one. Idempotent. Imports torch and transformers.
    """
    from crossways.models import register as register_models

    register_models()


def reroute(model: Any, rule: Any = None, **changes: Any) -> Handle:
    """Route a transformers model by another rule, in place and without training; see
    `crossways.surgery.reroute.reroute`, which documents the arguments and what is raised."""
    from crossways.surgery.reroute import reroute as change_routing

    return change_routing(model, rule, **changes)


def from_pretrained(path: Any, auto_class: Any = None, **kwargs: Any) -> Any:
    """Load a transformers model and route it by the rule that was saved with it, if any; see
    `crossways.surgery.reroute.from_pretrained`."""
    from crossways.surgery.reroute import from_pretrained as load

    return load(path, auto_class, **kwargs)


def tune(model: Any, tokenizer: Any, corpus: Any, out: Any, **options: Any) -> TuningResult:
    """Find the cheapest routing of a pretrained model within a stated loss of quality, and save it; see
    `crossways.tuning.tune.tune`, which documents the arguments and what is raised."""
    from crossways.tuning.tune import tune as tune_budget

    return tune_budget(model, tokenizer, corpus, out, **options)


def register_experts() -> None:
    """Make `experts_implementation="crossways"` known to transformers: our expert compute in any Hugging Face MoE.

    Explicit and idempotent, as `register`. `crossways.experts.experts_report(model)` says what then runs where.
    """
    from crossways.experts.register import register_experts as register_backend

    register_backend()
