"""Black-box probe of a gate: does a token's routing hang on that token alone?

Legend: B batch, S sequence, D model width, E experts, T = B * S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.gates.base import Gate
from crossways.router import Router
from crossways.routing import Context, Routing
from crossways.rules.probe import Probe
from crossways.rules.score import Softmax
from crossways.rules.select import TopK

Inputs = tuple[list[Tensor], Tensor]
"""Hidden states (B, S, D) of each layer, and token ids (B, S)."""


def check_gate(
    gate: Gate, hidden_size: int, vocab_size: int, num_layers: int = 1, step: int = 0, probe: Probe | None = None
) -> None:
    """Edit later tokens and other rows, remove other rows, and ask all layers of the gate again, in evaluation mode.

    Args:
        gate: a gate of `probe.num_experts` experts.
        hidden_size: D.
        vocab_size: number of token ids to draw from.
        num_layers: layers that share the gate; each gets hidden states of its own.
        step: training passes that a scheduled gate is to have behind it.
        probe: sizes and number of trials.

    Raises:
        ValueError: naming what was seen to look at other tokens, and the layer.
    """
    probe = probe or Probe()
    training, router = gate.training, Router(probe.num_experts, Softmax(), TopK(1), gate=gate).eval()
    generator = torch.Generator().manual_seed(probe.seed)

    def draw() -> Inputs:
        shape = (probe.batch, probe.sequence)
        states = [torch.randn(*shape, hidden_size, generator=generator) for _ in range(num_layers)]
        return states, torch.randint(vocab_size, shape, generator=generator)

    try:
        for trial in range(probe.trials):
            ours, other = draw(), draw()
            cut, row = probe.cut_and_row(trial)
            expected, early, one = _ask(router, ours, step), (slice(None), slice(cut)), slice(row, row + 1)
            later = _mixed(ours, other, torch.arange(probe.sequence)[None] < cut)
            rows = _mixed(ours, other, torch.arange(probe.batch)[:, None] == row)
            alone = [x_BSD[one] for x_BSD in ours[0]], ours[1][one]
            _compare("later tokens", _parts(expected, early), _parts(_ask(router, later, step), early))
            _compare("other rows", _parts(expected, (one,)), _parts(_ask(router, rows, step), (one,)))
            _compare("the number of rows", _parts(expected, (one,)), _ask(router, alone, step))
    finally:
        gate.train(training)


@torch.no_grad()
def _ask(router: Router, inputs: Inputs, step: int) -> list[tuple[Tensor, Tensor]]:
    """Logits (B, S, E) and chosen experts (B, S) of every layer."""
    answers: list[tuple[Tensor, Tensor]] = []
    previous: Routing | None = None
    states, token_ids_BS = inputs
    for layer, x_BSD in enumerate(states):
        context = Context(token_ids_BS=token_ids_BS, layer=layer, previous=previous, step=step)
        previous = router(x_BSD, context)
        chosen_BS = previous.assignment.top_expert_T().view_as(token_ids_BS)
        answers.append((previous.logits_TE.view(*token_ids_BS.shape, -1), chosen_BS))
    return answers


def _mixed(ours: Inputs, other: Inputs, keep_BS: Tensor) -> Inputs:
    states = [torch.where(keep_BS[..., None], x_BSD, y_BSD) for x_BSD, y_BSD in zip(ours[0], other[0], strict=True)]
    return states, torch.where(keep_BS, ours[1], other[1])


def _parts(answers: list[tuple[Tensor, Tensor]], part: tuple[slice, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(logits_BSE[part], chosen_BS[part]) for logits_BSE, chosen_BS in answers]


def _compare(edited: str, expected: list[tuple[Tensor, Tensor]], seen: list[tuple[Tensor, Tensor]]) -> None:
    for layer, ((logits_BSE, chosen_BS), (new_BSE, new_BS)) in enumerate(zip(expected, seen, strict=True)):
        # Products of other shapes round otherwise; a gate that looks around differs by far more.
        same = torch.allclose(new_BSE, logits_BSE, atol=1e-5, rtol=1e-4)
        if not (same and torch.equal(new_BS, chosen_BS)):
            raise ValueError(f"the routing of a token changed with {edited} in layer {layer}")
