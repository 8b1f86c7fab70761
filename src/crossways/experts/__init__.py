"""Expert compute: a backend behind one function, and the module that holds the weights."""

from crossways.experts.activation import Activation
from crossways.experts.compute import backends, compute_experts, resolve_backend, why_not
from crossways.experts.module import Experts
from crossways.experts.register import experts_report, register_experts

__all__ = [
    "Activation",
    "Experts",
    "backends",
    "compute_experts",
    "experts_report",
    "register_experts",
    "resolve_backend",
    "why_not",
]
