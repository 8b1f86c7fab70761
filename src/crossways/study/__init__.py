"""Variants times seeds: one record per run, one table over the records."""
