"""Supervised fine-tuning of a routed model under several routing rules, on clean and on corrupted data."""
