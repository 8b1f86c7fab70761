"""Texts to vectors with a routed model that was never trained for it: hidden states, routing weights, or both."""
