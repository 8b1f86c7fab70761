"""Routing for Mixture-of-Experts models: choose the token-expert pairs, compute with them, look at them."""

__version__ = "0.1.0"
