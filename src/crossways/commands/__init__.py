"""Sub-commands of `crossways`, one per file; `crossways.cli` attaches them."""
