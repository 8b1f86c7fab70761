"""Expert compute: a backend behind one function, and the module that holds the weights."""

from crossways.experts.activation import Activation
from crossways.experts.compute import backends, compute_experts, resolve_backend, why_not
from crossways.experts.module import Experts

__all__ = ["Activation", "Experts", "backends", "compute_experts", "resolve_backend", "why_not"]
