"""Find out what a router does by asking it, and prove it: no list of families, and none that is misread in silence.

Each way to score, choose and weigh that we know is compared with what copies of the router say to random inputs
(`crossways.surgery.asking`), on all tokens; one that explains everything is the reading. Where none does, the model
is refused.

Legend: T tokens, D model width, E experts, K experts per token, N shared experts.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from crossways.errors import UserError
from crossways.rules.score import Score, build_score, score_catalogue
from crossways.rules.select import GroupLimited, Selection, TopK
from crossways.surgery.asking import Answer, ask
from crossways.surgery.find import Block, FixedChoiceError, UnknownRoutingError
from crossways.surgery.reading import Reading
from crossways.surgery.sparsemixer import sparsemixer_weights

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
"""Ways to score that families use."""
CLOSE = 1e-4
"""Relative error up to which weights count as explained: float32, and the small constants that families add to
denominators."""
COPIES = 2
"""How often a router is asked, each time with other random weights: what holds for all is no accident of one."""
MOST_COPIES = 10
"""Up to how often, until one that may choose to skip has done so."""


def read_router(block: Block) -> Reading:
    """What a block's router does.

    Raises:
        FixedChoiceError: for a router that does not choose by its scores.
        UnknownRoutingError: if nothing we know explains what the router returns.
    """
    _refuse_the_impossible(block)
    answers, base = _with_logits(_answers(block))
    tried = 0
    for reading in _readings(block, answers[0], base):
        tried += 1
        if all(_explains_choice(reading, answer) for answer in answers):
            weighed = _weighed(reading, answers) or _sparsemixed(block, reading, answers)
            if weighed is not None:
                if weighed.shared is None:
                    _refuse_what_follows(block, weighed, answers)
                return weighed
    raise UnknownRoutingError(
        f"{block}: none of the {tried} known ways to score, choose and weigh explains what this router returns, so "
        "its routing is left alone"
    )


def _refuse_the_impossible(block: Block) -> None:
    needed = inspect.signature(block.router.forward).parameters.get("input_ids")
    if needed is not None and needed.default is needed.empty:
        raise FixedChoiceError(f"{block} chooses by token ids, not by scores")


def _answers(block: Block) -> list[Answer]:
    """A few, among them some that skip if the router can."""
    answers = [ask(block, seed) for seed in range(COPIES)]
    while answers[0].skips and len(answers) < MOST_COPIES and not any(map(_skipped, answers)):
        answers.append(ask(block, len(answers)))
    if answers[0].skips and not any(map(_skipped, answers)):
        raise UnknownRoutingError(
            f"{block}: knows one class more than there are experts, but never chose it, so what it means is not known"
        )
    return answers


def _skipped(answer: Answer) -> bool:
    return bool((answer.index_TK == answer.logits_TE.shape[-1] - 1).any())


def _with_logits(answers: Sequence[Answer]) -> tuple[list[Answer], dict[str, object]]:
    """The answers with logits also where the router says probabilities, and what the reading has to say of that."""
    if not all(_are_probabilities(answer.logits_TE) for answer in answers):
        return list(answers), {}
    logs = [replace(answer, logits_TE=answer.logits_TE.log()) for answer in answers]
    sources = [
        {path for path, said_TE in each.inside.items() if _same_shares(said_TE, each.logits_TE)} for each in logs
    ]
    source = next((path for path in logs[0].inside if all(path in found for found in sources)), None)
    if source is not None:
        logs = [replace(answer, logits_TE=answer.inside[source]) for answer in logs]
    return logs, {"probabilities": True, "logits_from": source}


def _are_probabilities(logits_TE: Tensor) -> bool:
    sums_T = logits_TE.sum(-1)
    return bool((logits_TE > 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-3)


def _same_shares(logits_TE: Tensor, log_probs_TE: Tensor) -> bool:
    return logits_TE.shape == log_probs_TE.shape and torch.allclose(
        logits_TE.log_softmax(-1), log_probs_TE, atol=CLOSE
    )


def _readings(block: Block, answer: Answer, base: dict[str, object]) -> Iterator[Reading]:
    """Everything to try, simple first."""
    k, num_experts = answer.index_TK.shape[-1], answer.logits_TE.shape[-1]
    known = score_catalogue()
    scores = [build_score(name) for name in SCORES if name in known]
    ways: list[tuple[str | None, bool]] = [(None, False)]
    ways += [(bias, of_logits) for of_logits in (False, True) for bias in answer.per_expert]
    for (bias, of_logits), select, score in itertools.product(ways, _selections(block, k), scores):
        reading = Reading(
            num_experts=num_experts,
            k=k,
            score=score,
            select=select,
            renormalize=False,
            weight_scale=1.0,
            bias=bias,
            bias_of_logits=of_logits,
            hands_over=answer.form,
            free=1 if answer.skips else block.num_experts - block.num_computing,
            skips=answer.skips,
        )
        yield replace(reading, **base)  # type: ignore[arg-type]


def _selections(block: Block, k: int) -> list[Selection]:
    selections: list[Selection] = [TopK(k)]
    router = block.router
    groups = getattr(router, "num_group", getattr(router, "n_group", None))
    kept = getattr(router, "topk_group", None)
    if groups and kept:
        for kind in ("top2", "max"):
            limited = GroupLimited(k, int(groups), int(kept), kind)  # type: ignore[arg-type]
            try:
                limited.check(block.num_experts)
            except UserError:
                continue
            selections.append(limited)
    return selections


def _scores(score: Score, logits_TE: Tensor) -> Tensor:
    return score(logits_TE[None])[0]


def _explains_choice(reading: Reading, answer: Answer) -> bool:
    scores_TE = _scores(reading.score, answer.logits_TE)
    choice_TE = answer.logits_TE if reading.bias_of_logits else scores_TE
    choice_TE = choice_TE if reading.bias is None else choice_TE + answer.per_expert[reading.bias]
    chosen_TE = reading.select(choice_TE[None], scores_TE[None]).to_mask()
    return torch.equal(chosen_TE, torch.zeros_like(chosen_TE).scatter(-1, answer.index_TK, True))


def _weighed(reading: Reading, answers: Sequence[Answer]) -> Reading | None:
    """The reading completed by how weights follow from scores, or None if they do not."""
    factors = (None, *answers[0].per_expert, *answers[0].single)
    shared = (None, *_matrices_of_more(answers[0]))
    for path, renormalize, factor in itertools.product(shared, (False, True), factors):
        tried = replace(reading, renormalize=renormalize, factor=factor, shared=path)
        ratio_P = torch.cat([_ratios(tried, answer) for answer in answers])
        scale = float(ratio_P.median())
        if bool(((ratio_P - scale).abs() <= CLOSE * abs(scale)).all()):
            return replace(tried, weight_scale=1.0 if abs(scale - 1.0) < CLOSE else scale)
    return None


def _ratios(reading: Reading, answer: Answer) -> Tensor:
    """What was said over what this reading expects, of all weights: one number throughout if it is right."""
    raw_TK = _scores(reading.score, answer.logits_TE).gather(-1, answer.index_TK)
    given_TK, taken_TK = answer.weight_TK, torch.ones_like(raw_TK, dtype=torch.bool)
    if reading.shared is not None:
        beside_TN = _scores(reading.score, _beside(answer, reading.shared))
        raw_TK, given_TK = torch.cat([raw_TK, beside_TN], -1), torch.cat([given_TK, answer.further[0]], -1)
        taken_TK = torch.ones_like(raw_TK, dtype=torch.bool)
    expected_TK = raw_TK / raw_TK.sum(-1, keepdim=True) if reading.renormalize else raw_TK
    if reading.factor in answer.single:
        expected_TK = expected_TK * answer.single[reading.factor]
    elif reading.factor is not None:
        if reading.shared is not None:  # one number for each routed expert says nothing of the shared
            return torch.full((1,), torch.nan)
        expected_TK = expected_TK * answer.per_expert[reading.factor][answer.index_TK]
    if reading.skips:
        taken_TK = answer.index_TK < reading.num_experts - 1
    return (given_TK / expected_TK)[taken_TK]


def _matrices_of_more(answer: Answer) -> list[str]:
    """Matrices whose first rows give the logits, and further ones those of what else was handed over."""
    if len(answer.further) != 1:
        return []
    rows = answer.logits_TE.shape[-1] + answer.further[0].shape[-1]
    wanted = (rows, answer.x_TD.shape[-1])
    return [path for path, tensor in answer.tensors.items() if tensor.shape == wanted and _gives(tensor, answer)]


def _gives(weight_ND: Tensor, answer: Answer) -> bool:
    said_TN = functional.linear(answer.x_TD, weight_ND)
    return torch.allclose(said_TN[:, : answer.logits_TE.shape[-1]], answer.logits_TE, atol=CLOSE)


def _beside(answer: Answer, path: str) -> Tensor:
    """Logits of shared experts, (T, N)."""
    return functional.linear(answer.x_TD, answer.tensors[path][answer.logits_TE.shape[-1] :])


def _refuse_what_follows(block: Block, reading: Reading, answers: Sequence[Answer]) -> None:
    """Whatever else a router hands over, such as a state for the next layer, must not follow from its choice: it has
    to stay the same, to the bit, when the bias makes the router choose otherwise."""
    answer = answers[0]
    if not answer.further:
        return
    shapes = [tuple(part.shape) for part in answer.further]
    if reading.bias is None:
        raise UnknownRoutingError(
            f"{block}: hands over {3 + len(shapes)} tensors; whether the last, of shapes {shapes}, follow from the "
            "choice cannot be found out, as there is no bias to change the choice by"
        )
    bias_E = answer.per_expert[reading.bias]
    other = answer.again(reading.bias, bias_E.flip(0) * 3)
    moved = torch.equal(other.index_TK, answer.index_TK)
    if moved or not all(torch.equal(*pair) for pair in zip(answer.further, other.further, strict=True)):
        raise UnknownRoutingError(
            f"{block}: hands over {3 + len(shapes)} tensors, and the last, of shapes {shapes}, change with the "
            "choice; how is not known, so they could not be changed with it"
        )


def _sparsemixed(block: Block, reading: Reading, answers: Sequence[Answer]) -> Reading | None:
    eps = getattr(block.router, "router_jitter_noise", None)
    if not isinstance(eps, float) or reading.k != 2 or reading.score.name != "softmax":
        return None
    for answer in answers:
        order_TK = answer.logits_TE.gather(-1, answer.index_TK).argsort(-1, descending=True)
        given_TK = answer.weight_TK.gather(-1, order_TK)
        if not torch.allclose(given_TK, sparsemixer_weights(answer.logits_TE, eps), rtol=CLOSE):
            return None
    return replace(reading, weighs="sparsemixer", weighs_eps=eps)
