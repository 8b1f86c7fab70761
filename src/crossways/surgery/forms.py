"""The forms in which families hand their choice from the router to the experts.

Each form is read (`logits_in`, `chosen_in`), and written with another choice in it (`handed_over`).

Legend: T tokens, E experts, K most experts of a token, P chosen pairs, N shared experts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rectangle import to_rectangle

Form = Literal["pairs", "dense", "sorted", "late"]
"""`pairs`: the router returns (logits, weights, indices), both (T, K), and perhaps more.
`dense`: it returns (weights of all experts with zeros, logits), both (T, E).
`sorted`: it returns (place, token and weight of each pair, sorted by expert; pairs of each expert; logits).
`late`: it returns logits alone; the block makes weights and indices of them on the way to the experts."""


def logits_in(output: Any, form: Form) -> Tensor:
    """The logits (T, E) in what a router returned; of whatever shape the family gives them."""
    logits_TE = {"pairs": 0, "dense": 1, "sorted": 4, "late": 0}[form]
    return output[logits_TE]


def logits_behind(probs_TE: Tensor, said: Tensor | None, part: str) -> Tensor:
    """The logits behind probabilities; without the part of the router that says them, up to a shift for each token.

    Args:
        probs_TE: float32 (T, E).
        said: what that part said, T E numbers; None if there is no such part.
        part: its name.

    Raises:
        UserError: if the probabilities are not those of what was said.
    """
    if said is None:
        return probs_TE.log()
    logits_TE = said.reshape(probs_TE.shape).float()
    if not torch.allclose(logits_TE.softmax(-1), probs_TE, atol=1e-2):
        raise UserError(
            f"the router's probabilities are no longer those of {part} (an adapter on it?); put adapters on the "
            "router before rerouting"
        )
    return logits_TE


def chosen_in(output: Any, form: Form, num_experts: int, *, skips: bool = False) -> tuple[Tensor, Tensor]:
    """The family's own choice in what its router returned.

    Args:
        output: of the router; for `late`, (logits, weights, indices).
        form: of that.
        num_experts: E.
        skips: whether the last of the E is no expert but a pass; a family hands it over as a weight of zero.

    Returns:
        Boolean (T, E), and weights (T, E), zero elsewhere.
    """
    if form == "dense":
        weight_TE = output[0].reshape(-1, num_experts)
        return weight_TE > 0, weight_TE
    if form == "sorted":
        _, token_P, weight_P, load_E, logits_TE = output
        expert_P = torch.arange(num_experts, device=token_P.device).repeat_interleave(
            torch.tensor(load_E, device=token_P.device)
        )
        cells_P = (token_P, expert_P)
        mask_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        mask_TE[cells_P] = True
        return mask_TE, weight_P.new_zeros(mask_TE.shape).index_put(cells_P, weight_P)
    weight_TK, index_TK = (part.reshape(-1, part.shape[-1]) for part in output[1:3])
    if skips:
        index_TK = index_TK.masked_fill(weight_TK == 0, num_experts - 1)
    mask_TE = torch.zeros(len(index_TK), num_experts, dtype=torch.bool, device=index_TK.device)
    mask_TE = mask_TE.scatter(-1, index_TK, True)
    return mask_TE, weight_TK.new_zeros(mask_TE.shape).scatter(-1, index_TK, weight_TK)


def handed_over(
    output: Any,
    form: Form,
    assignment: Assignment,
    *,
    skips: bool = False,
    filler: int | None = None,
    shared_TN: Tensor | None = None,
) -> Any:
    """What the router would have returned with another choice.

    Args:
        output: what it returned; for `late`, (logits, weights, indices).
        form: of that.
        assignment: the choice.
        skips: whether the last expert is a pass, which nobody computes.
        filler: an expert that costs nothing, for empty places; by default these get the index E.
        shared_TN: weights of shared experts that change with the choice, (T, N), which follow the pairs.
    """
    if form == "dense":
        return assignment.to_dense().to(output[0].dtype).reshape(output[0].shape), output[1]
    pairs = assignment.compact()
    if form == "sorted":
        return _sorted(output, pairs)
    if skips:
        pairs = pairs.of_experts(0, pairs.num_experts - 1)
    weight_TK, index_TK = to_rectangle(pairs)
    if filler is not None:
        weight_TK, index_TK = _filled(weight_TK, index_TK, pairs.num_experts, filler)
    lead = output[2].shape[:-1]
    index_TK = index_TK.to(output[2].dtype).reshape(*lead, -1)
    rest = output[3:]
    if shared_TN is not None:
        rest = (shared_TN.to(rest[0].dtype).reshape(rest[0].shape), *rest[1:])
    return output[0], weight_TK.to(output[1].dtype).reshape(*lead, -1), index_TK, *rest


def _sorted(output: Any, pairs: Assignment) -> Any:
    token_P = pairs.token_P
    place_P = torch.empty_like(token_P)
    place_P[torch.argsort(token_P, stable=True)] = torch.arange(len(token_P), device=token_P.device)
    weight_P = pairs.weight_P.to(output[2].dtype)
    return place_P, token_P, weight_P, pairs.load_E().tolist(), output[4]


def _filled(weight_TK: Tensor, index_TK: Tensor, empty: int, filler: int) -> tuple[Tensor, Tensor]:
    """With the filler in empty places, and at least two columns: experts some of which compute nothing come with code
    that cannot do with one."""
    if index_TK.shape[1] == 1:
        index_TK, weight_TK = functional.pad(index_TK, (0, 1), value=empty), functional.pad(weight_TK, (0, 1))
    return weight_TK, index_TK.masked_fill(index_TK == empty, filler)
