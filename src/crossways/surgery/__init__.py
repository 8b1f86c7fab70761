"""Pretrained models: change how a mixture of experts routes without touching its code or its weights, and make one
of a dense model (`upcycle`)."""
