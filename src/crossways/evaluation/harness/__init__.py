"""Downstream tasks of lm-eval on a routed model, with the routing in the record."""
