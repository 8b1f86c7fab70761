"""Change how a pretrained Mixture-of-Experts routes, without touching its code or its weights."""
