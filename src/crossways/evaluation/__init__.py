"""Figures of a trained model: likelihood, robustness, cost."""
