"""Load the checkpoint of a tuning in a fresh process and score its confirmation text again:
`python -m crossways.tuning.check OUT` prints what it found as JSON, and exits with 1 if a number differs.

Legend: W windows, D documents.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossways.errors import UserError
from crossways.surgery.reroute import from_pretrained
from crossways.training.windows import EvalWindow
from crossways.tuning.result import CHECKPOINT, FRONTIER, WINDOWS, Reload
from crossways.tuning.score import Scored, score_text
from crossways.tuning.texts import Text


def save_text(text: Text, path: Path) -> None:
    """Write a text's windows, so that they can be scored again without the corpus."""
    np.savez_compressed(
        path,
        tokens=np.concatenate([window.input_ids for window in text.window_W]),
        length_W=np.array([len(window.input_ids) for window in text.window_W]),
        context_W=np.array([window.context for window in text.window_W]),
        document_W=text.document_W,
        token_D=text.token_D,
        batching=np.array([text.pad_id, text.batch_size]),
    )


def load_text(path: Path) -> Text:
    """The reverse of `save_text`."""
    with np.load(path, allow_pickle=False) as kept:
        ids_W = np.split(kept["tokens"], np.cumsum(kept["length_W"])[:-1])
        windows = [EvalWindow(ids, int(context)) for ids, context in zip(ids_W, kept["context_W"], strict=True)]
        pad_id, batch_size = (int(number) for number in kept["batching"])
        return Text(tuple(windows), kept["document_W"], kept["token_D"], pad_id, batch_size)


def check_in_fresh_process(out: Path) -> Reload:
    """Run this file on a tuning's folder.

    Raises:
        RuntimeError: if the process could not load or score the checkpoint.
    """
    done = subprocess.run([sys.executable, "-m", "crossways.tuning.check", str(out)], capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise RuntimeError(f"a fresh process could not load the checkpoint in {out}: {done.stderr.strip()[-2000:]}")
    return Reload(**json.loads(done.stdout.strip().splitlines()[-1]))


def check(out: Path) -> Reload:
    """Score the checkpoint of a tuning's folder on its confirmation text, and compare.

    Raises:
        UserError: if the folder holds no finished tuning with a checkpoint.
    """
    if not (out / FRONTIER).is_file() or not (out / CHECKPOINT).is_dir():
        raise UserError(f"{out} holds no tuning with a checkpoint: {FRONTIER} and {CHECKPOINT} are not both there")
    kept = json.loads((out / FRONTIER).read_text(encoding="utf-8"))
    conditions = kept["protocol"]["conditions"]
    torch.set_num_threads(conditions["threads"])
    model = from_pretrained(out / CHECKPOINT, experts_implementation=conditions["experts"]).eval()
    model = model.to(conditions["device"])
    scored = score_text(model, load_text(out / WINDOWS), getattr(torch, conditions["dtype"]))
    return Reload(scored.perplexity, scored.budget, _plain(scored) == kept["confirmation"]["chosen"])


def _plain(scored: Scored) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(scored)))


def main() -> int:
    """Entry point of `python -m crossways.tuning.check OUT`."""
    if len(sys.argv) != 2:
        print("usage: python -m crossways.tuning.check OUT", file=sys.stderr)
        return 2
    try:
        found = check(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found)))
    return 0 if found.identical else 1


if __name__ == "__main__":
    sys.exit(main())
