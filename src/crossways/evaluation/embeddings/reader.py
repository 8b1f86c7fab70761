"""One forward pass: the last token's hidden state, and its router logits in every layer.

Legend: B batch, S sequence, D model width, E experts, W routing width (the sum of E over routers).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from crossways.evaluation.embeddings.parts import Parts
from crossways.evaluation.padding import model_inputs
from crossways.routing import Routing
from crossways.sites import router_sites
from crossways.surgery.handle import handle_of


def read_last_token(model: Any, ids_BS: Tensor, mask_BS: Tensor, *, routing: bool) -> Parts:
    """Parts of a left-padded batch.

    Args:
        model: any causal language model; its routers are visible.
        ids_BS: token ids, int64 (B, S).
        mask_BS: 1 for tokens, 0 for padding, all of which is on the left; int64 (B, S).
        routing: whether to collect router logits, of all routers that decided by themselves.
    """
    decoder = _decoder(model)
    logits_BE: list[Tensor] = []

    def collect(router: nn.Module, args: tuple[Any, ...], said: Routing) -> None:
        if not said.reused:
            logits_TE = said.logits_TE.detach()
            logits_BE.append(logits_TE.unflatten(0, (said.num_rows, -1))[:, -1].float().cpu())

    with ExitStack() as stack:
        for site in router_sites(model) if routing else ():
            stack.callback(site.router.register_forward_hook(collect).remove)
        hidden_BSD = decoder(**model_inputs(decoder, ids_BS, mask_BS)).last_hidden_state
    hidden_BD = hidden_BSD[:, -1].float().cpu()
    return Parts(hidden_BD, torch.cat(logits_BE, -1) if logits_BE else hidden_BD[:, :0])


def _decoder(model: Any) -> nn.Module:
    handle = handle_of(model)
    return model.get_decoder() if handle is None else handle.decoder
