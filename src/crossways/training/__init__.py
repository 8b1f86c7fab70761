"""From text to training: corpus, tokenizer, windows, trainer."""
