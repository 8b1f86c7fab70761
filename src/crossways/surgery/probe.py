"""Find out what a router does by asking it, and prove it: no list of families, and none that is misread in silence.

A float32 copy of the router gets random weights and random inputs. Each way to score, choose and weigh that we know
is compared with what comes out, on all tokens; one that explains everything is the reading. Where none does, the
model is refused.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.rules.score import Score, build_score, score_catalogue
from crossways.rules.select import GroupLimited, Selection, TopK
from crossways.surgery.find import Block, FixedChoiceError, UnknownRoutingError
from crossways.surgery.reading import HandOver, Reading
from crossways.surgery.sparsemixer import sparsemixer_weights

TOKENS = 96
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
"""Ways to score that families use."""
CLOSE = 1e-4
"""Relative error up to which weights count as explained: float32, and the small constants that families add to
denominators."""


@dataclass(frozen=True)
class Answer:
    """What the copy of a router said."""

    logits_TE: Tensor
    weight_TK: Tensor
    index_TK: Tensor
    per_expert: dict[str, Tensor]
    """Every E numbers in reach, by their path from the block."""
    dense: bool
    inside: dict[str, Tensor]
    """What the router's own parts said, (T, E), by their path from the router."""


def read_router(block: Block) -> Reading:
    """What a block's router does.

    Raises:
        FixedChoiceError: for a router that does not choose by its scores.
        UnknownRoutingError: if nothing we know explains what the router returns.
    """
    _refuse_the_impossible(block)
    answer = _ask(block)
    probabilities = _are_probabilities(answer.logits_TE)
    source = None
    if probabilities:
        answer = replace(answer, logits_TE=answer.logits_TE.log())
        source = next(
            (path for path, said_TE in answer.inside.items() if _same_shares(said_TE, answer.logits_TE)), None
        )
        answer = answer if source is None else replace(answer, logits_TE=answer.inside[source])
    tried = 0
    for reading in _readings(block, answer):
        tried += 1
        if _explains_choice(reading, answer):
            weighed = _weighed(reading, answer) or _sparsemixed(block, reading, answer)
            if weighed is not None:
                hands_over: HandOver = "dense" if answer.dense else "pairs"
                return replace(weighed, probabilities=probabilities, logits_from=source, hands_over=hands_over)
    raise UnknownRoutingError(
        f"{block.name}.{block.router_name} ({type(block.router).__name__}): none of the {tried} known ways to score, "
        "choose and weigh explains what this router returns, so its routing is left alone"
    )


def _refuse_the_impossible(block: Block) -> None:
    where = f"{block.name}.{block.router_name} ({type(block.router).__name__})"
    needed = inspect.signature(block.router.forward).parameters.get("input_ids")
    if needed is not None and needed.default is needed.empty:
        raise FixedChoiceError(f"{where} chooses by token ids, not by scores")
    weights = itertools.chain(block.router.parameters(), block.experts.parameters())
    if any(hasattr(weight, "device_mesh") for weight in weights):
        raise UnknownRoutingError(
            f"{where}: its weights are spread over devices (FSDP, tensor or expert parallel); reroute the model first"
        )


def _ask(block: Block) -> Answer:
    twin = _randomised(block.router)
    extra = _extra_arguments(block)
    problem: Exception | None = None
    for x in _inputs(block, twin):
        try:
            with torch.no_grad(), _listening(twin, block.num_experts) as inside:
                said = twin(x, **extra)
            return replace(_answer(block, twin, extra, said), inside=inside)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            problem = error
    raise UnknownRoutingError(f"{block.name}.{block.router_name}: cannot be called on its own: {problem}")


def _randomised(router: nn.Module) -> nn.Module:
    """A float32 copy on the CPU, without hooks, its parameters random: all-zero weights would tell nothing."""
    twin = copy.deepcopy(router)
    remove_hook_from_module(twin, recurse=True)  # accelerate's would fetch the weights again
    twin = twin.to_empty(device="cpu").float().eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in itertools.chain(twin.parameters(), twin.buffers()):
            if tensor.is_floating_point():
                _fill(tensor, generator)
            else:
                tensor.zero_()
    return twin


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.dim() >= 2:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.5 / tensor.shape[-1] ** 0.5)
    else:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.2)


def _extra_arguments(block: Block) -> dict[str, Tensor]:
    """What the block hands its router beside hidden states: tensors of its own, by the argument's name."""
    generator = torch.Generator().manual_seed(1)
    extra = {}
    for name in list(inspect.signature(block.router.forward).parameters)[1:]:
        given = getattr(block.parent, name, None)
        if isinstance(given, Tensor):
            extra[name] = torch.empty(given.shape)
            _fill(extra[name], generator)
    return extra


@contextmanager
def _listening(twin: nn.Module, num_experts: int) -> Iterator[dict[str, Tensor]]:
    """What submodules say in the context, if it has E columns."""
    heard: dict[str, Tensor] = {}

    def listen(path: str, said: Any) -> None:
        if isinstance(said, Tensor) and said.shape[-1:] == (num_experts,):
            heard[path] = said.detach().reshape(-1, num_experts).float()

    with ExitStack() as stack:
        for path, module in twin.named_modules():
            if path:
                hook = module.register_forward_hook(lambda _, args, said, path=path: listen(path, said))
                stack.callback(hook.remove)
        yield heard


def _same_shares(logits_TE: Tensor, log_probs_TE: Tensor) -> bool:
    return logits_TE.shape == log_probs_TE.shape and torch.allclose(
        logits_TE.log_softmax(-1), log_probs_TE, atol=CLOSE
    )


def _inputs(block: Block, twin: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    widths = [p.shape[-1] for p in twin.parameters() if p.dim() == 2]
    for width in dict.fromkeys(widths):
        x_TD = torch.randn(TOKENS, width, generator=generator)
        yield x_TD
        yield x_TD[None]


def _answer(block: Block, twin: nn.Module, extra: dict[str, Tensor], said: Any) -> Answer:
    where = f"{block.name}.{block.router_name} ({type(block.router).__name__})"
    num_experts = block.num_experts
    shapes = [tuple(part.shape) for part in said] if isinstance(said, tuple) else said
    if isinstance(said, tuple) and len(said) > 3:
        raise UnknownRoutingError(
            f"{where}: hands over {len(said)} tensors, of shapes {shapes}; what else follows from the choice "
            "(shared experts under the same sum, a state for the next layer) could not be changed with it"
        )
    if not isinstance(said, tuple) or len(said) not in (2, 3) or said[0].shape[-1] != num_experts:
        raise UnknownRoutingError(
            f"{where}: expected (logits, weights, indices) over {num_experts} experts, got {shapes}"
        )
    router_path = f"{block.router_name}."
    named = [*twin.named_parameters(), *twin.named_buffers()]
    per_expert = {router_path + name: tensor for name, tensor in named} | extra
    per_expert = {path: t.detach().flatten() for path, t in per_expert.items() if t.numel() == num_experts}
    if len(said) == 2:
        weight_TE, logits_TE = (part.reshape(-1, num_experts).float() for part in said)
        index_TK = weight_TE.topk(int((weight_TE[0] > 0).sum())).indices
        return Answer(logits_TE, weight_TE.gather(-1, index_TK), index_TK, per_expert, dense=True, inside={})
    logits_TE, weight_TK, index_TK = said
    if index_TK.is_floating_point() or index_TK.shape != weight_TK.shape:
        raise UnknownRoutingError(f"{where}: expected weights and indices of one shape, got {shapes}")
    k = index_TK.shape[-1]
    return Answer(
        logits_TE.reshape(-1, num_experts).float(),
        weight_TK.reshape(-1, k).float(),
        index_TK.reshape(-1, k).long(),
        per_expert,
        dense=False,
        inside={},
    )


def _are_probabilities(logits_TE: Tensor) -> bool:
    sums_T = logits_TE.sum(-1)
    return bool((logits_TE > 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-3)


def _readings(block: Block, answer: Answer) -> Iterator[Reading]:
    """Everything to try, simple first."""
    k = answer.index_TK.shape[-1]
    known = score_catalogue()
    scores = [build_score(name) for name in SCORES if name in known]
    ways: list[tuple[str | None, bool]] = [(None, False)]
    ways += [(bias, of_logits) for of_logits in (False, True) for bias in answer.per_expert]
    for (bias, of_logits), select, score in itertools.product(ways, _selections(block, k), scores):
        yield Reading(
            num_experts=block.num_experts,
            k=k,
            score=score,
            select=select,
            renormalize=False,
            weight_scale=1.0,
            bias=bias,
            bias_of_logits=of_logits,
        )


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


def _scores(score: Score, answer: Answer) -> Tensor:
    return score(answer.logits_TE[None])[0]


def _explains_choice(reading: Reading, answer: Answer) -> bool:
    scores_TE = _scores(reading.score, answer)
    choice_TE = answer.logits_TE if reading.bias_of_logits else scores_TE
    choice_TE = choice_TE if reading.bias is None else choice_TE + answer.per_expert[reading.bias]
    chosen_TE = reading.select(choice_TE[None], scores_TE[None]).to_mask()
    return torch.equal(chosen_TE, torch.zeros_like(chosen_TE).scatter(-1, answer.index_TK, True))


def _weighed(reading: Reading, answer: Answer) -> Reading | None:
    """The reading completed by how weights follow from scores, or None if they do not."""
    raw_TK = _scores(reading.score, answer).gather(-1, answer.index_TK)
    for renormalize, factor in itertools.product((False, True), (None, *answer.per_expert)):
        expected_TK = raw_TK / raw_TK.sum(-1, keepdim=True) if renormalize else raw_TK
        if factor is not None:
            expected_TK = expected_TK * answer.per_expert[factor][answer.index_TK]
        ratio_TK = answer.weight_TK / expected_TK
        scale = float(ratio_TK.median())
        if bool(((ratio_TK - scale).abs() <= CLOSE * abs(scale)).all()):
            scale = 1.0 if abs(scale - 1.0) < CLOSE else scale
            return replace(reading, renormalize=renormalize, factor=factor, weight_scale=scale)
    return None


def _sparsemixed(block: Block, reading: Reading, answer: Answer) -> Reading | None:
    eps = getattr(block.router, "router_jitter_noise", None)
    if not isinstance(eps, float) or reading.k != 2 or reading.score.name != "softmax":
        return None
    order_TK = answer.logits_TE.gather(-1, answer.index_TK).argsort(-1, descending=True)
    given_TK = answer.weight_TK.gather(-1, order_TK)
    if torch.allclose(given_TK, sparsemixer_weights(answer.logits_TE, eps), rtol=CLOSE):
        return replace(reading, weighs="sparsemixer", weighs_eps=eps)
    return None
