"""What a command does with the terminal it runs in."""

from __future__ import annotations

import sys


def no_bars_in_logs() -> None:
    """Progress bars are for terminals; elsewhere standard error holds errors only."""
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
