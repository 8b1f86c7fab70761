"""Sequences of different lengths as one batch.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["left", "right"]


def padded(sequences: Sequence[Sequence[int]], pad_id: int, side: Side) -> tuple[Tensor, Tensor]:
    """Token ids, padded on one side, and the attention mask that is 0 there; each int64 (B, S)."""
    length = max(map(len, sequences))
    ids_BS = torch.full((len(sequences), length), pad_id)
    mask_BS = torch.zeros_like(ids_BS)
    for row, ids in enumerate(sequences):
        place = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        ids_BS[row, place] = torch.tensor(ids)
        mask_BS[row, place] = 1
    return ids_BS, mask_BS


def model_inputs(module: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass without cache: no mask where nothing is padded, and positions that count from each
    row's first token, so that padding on the left does not shift them."""
    inputs: dict[str, Any] = {"input_ids": ids_BS, "use_cache": False}
    if not bool(mask_BS.all()):
        inputs["attention_mask"] = mask_BS
        if "position_ids" in inspect.signature(module.forward).parameters:
            inputs["position_ids"] = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    return inputs
