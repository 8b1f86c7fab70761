"""The tokenizer: a byte-level BPE trained on the training documents and cached, or any `AutoTokenizer` by
name."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from crossways.errors import UserError
from crossways.hub import loading_options
from crossways.models import register
from crossways.settings import Settings
from crossways.training.corpus import Corpus, utf8_length

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte, and the two special tokens


class TokenizerSettings(Settings):
    """Which tokenizer to use: an existing one, or one trained on the corpus."""

    name: str | None = None
    """Name or path of an existing tokenizer, as `AutoTokenizer` takes it; None trains one on the training
    documents."""
    vocab_size: int = 4096
    """Most tokens of a trained vocabulary, special ones included; a small text gives fewer. At least 258;
    sensible: 1 000 to 64 000. Ignored when `name` is given."""
    max_training_bytes: int | None = Field(default=100_000_000, ge=1)
    """UTF-8 bytes of training text, in whole documents, that the vocabulary is learned from; None for all.
    Sensible: 1e6 to 1e9."""


def load_tokenizer(settings: TokenizerSettings, corpus: Corpus, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The named tokenizer, or one trained on `corpus.train` (never on validation text), from the cache if it
    is there.

    A trained one has `len(tokenizer) <= settings.vocab_size` tokens, decodes what it encodes for every
    Unicode text, and uses `<|endoftext|>` as end and beginning, `<|padding|>` as padding. Processes may race
    for the cache: each writes a file of its own and moves it into place.

    Raises:
        UserError: `vocab_size` below 258; the named tokenizer cannot be loaded or has no end-of-sequence
            token.
    """
    if settings.name is not None:
        return load_named(settings.name)
    if settings.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"tokenizer.vocab_size={settings.vocab_size} is too small: a byte-level vocabulary holds 256 "
            f"bytes and 2 special tokens, so at least {MIN_VOCAB_SIZE}"
        )
    path = cache_dir / "tokenizers" / f"{_key(settings, corpus)}.json"
    if not path.exists():
        _write(train_bpe(_front(corpus.train, settings.max_training_bytes), settings.vocab_size), path)
    return _wrap(Tokenizer.from_file(str(path)))


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, on GPT-2's bytes): no normaliser, so nothing is
    lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each document, lazily, in order, with no special tokens.

    Text that spells a special token is encoded as text: no document can forge the end of a document.
    """
    remaining = iter(documents)
    while batch := list(itertools.islice(remaining, 64)):
        yield from tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]


def load_named(name: str) -> PreTrainedTokenizerBase:
    register()  # a folder of ours would otherwise be asked whether its code may be trusted
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **loading_options(name, "tokenizer_config.json"))
    except Exception as error:  # parsers and the network raise types without a common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load tokenizer {name!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no end-of-sequence token, which separates documents; choose another")
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def _key(settings: TokenizerSettings, corpus: Corpus) -> str:
    what = json.dumps([settings.model_dump(mode="json"), corpus.fingerprint], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _write(tokenizer: Tokenizer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        mine = Path(folder, path.name)
        tokenizer.save(str(mine))
        os.replace(mine, path)


def _front(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    total = 0
    for count, text in enumerate(documents):
        total += utf8_length(text)
        if count and max_bytes is not None and total > max_bytes:
            return
        yield text
