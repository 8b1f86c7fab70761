"""`reroute`: change how a pretrained model routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from crossways.errors import UserError
from crossways.rules.registry import describe
from crossways.rules.score import build_score
from crossways.surgery.find import Block, FixedChoiceError, UnknownRoutingError, find_blocks, language_blocks
from crossways.surgery.handle import CONFIG_KEY, UNCHANGED, Change, Handle, handle_of
from crossways.surgery.pass_state import find_stacks
from crossways.surgery.probe import read_router
from crossways.surgery.ragged import Experts
from crossways.surgery.reading import Reading
from crossways.surgery.rule import Rule, Spec, build_rule
from crossways.surgery.sharded import refuse_spread
from crossways.surgery.site import RoutedBlock
from crossways.surgery.site_router import GivenLogits, SiteRouter
from crossways.surgery.sparsemixer import sparsemixer_of_top2


def reroute(
    model: nn.Module,
    rule: str | Rule | Mapping[str, Any] | None = None,
    *,
    select: Spec | None = None,
    score: Spec | None = None,
    k: float | Sequence[float] | None = None,
    renormalize: bool | None = None,
    weight_scale: float | None = None,
    experts: Experts | None = None,
) -> Handle:
    """Route a transformers model by another rule, in place and without training.

    Works on any model that keeps its experts in stacked weights with a router beside them whose behaviour can be read
    (see `crossways.surgery.probe`). What is not asked for stays as the family has it: score, scaling, whether weights
    sum to one, the number of experts per token, shared experts; its balancing bias too, unless another score is asked
    for. Padding, by an attention mask, chooses nobody and competes for nothing; sequences packed into a row, by
    positions that start again, compete each by itself. `generate`, and any call with a filled cache, routes by the
    rule's decode twin; where that needs a cutoff, calibrate first (`crossways.calibrate.calibrate`) or train.

    Args:
        model: changed until `Handle.undo`, or to the end of a `with`.
        rule: a preset's name, such as "usmoe" (`crossways reroute --list`), a `Rule`, or its JSON. Without any
            argument, the rule in the model's configuration, with what was calibrated, if it was saved rerouted.
        select: a selection, by name or by its fields; instead of, or on top of, a preset's.
        score: a score, likewise.
        k: mean experts per token, one number or one for each routed layer.
        renormalize: whether each token's weights sum to one.
        weight_scale: factor on all weights.
        experts: who computes the chosen pairs: `crossways`, our expert compute wherever the layout of the experts
            allows, which takes ragged choices as they are; `own`, whatever the model computes its experts by. By
            default ours on a CPU where its fast kernel runs, unless the model was told to use another implementation
            than transformers' default. Who does is in the handle's table.

    Raises:
        UserError: a rule that does not exist or does not fit, a model that is rerouted already.
        UnknownRoutingError: a model that is not understood; the reason is in the message.
    """
    if (before := handle_of(model)) is not None:
        raise UserError(f"{type(model).__name__} is rerouted already; undo that first (its handle: {before})")
    changes = {"select": select, "score": score, "k": k, "renormalize": renormalize, "weight_scale": weight_scale}
    changes["experts"] = experts
    saved = getattr(getattr(model, "config", None), CONFIG_KEY, None)
    if rule is None and all(value is None for value in changes.values()) and saved is not None:
        handle = _attach(model, Rule.from_json(saved["rule"]))
        handle.set_estimates(saved["estimates"])
        return handle
    return _attach(model, build_rule(rule, **changes))  # type: ignore[arg-type]


def _attach(model: nn.Module, rule: Rule) -> Handle:
    """Read the model, then put the hooks on; nothing is changed if anything is not understood."""
    if isinstance(model, nn.DataParallel):
        raise UnknownRoutingError(
            "DataParallel runs replicas that share what their routers know of a pass; reroute the model inside for "
            "use without it, or take DistributedDataParallel"
        )
    found = find_blocks(model)
    for block in found:
        refuse_spread(model, block)
    blocks, readings, left = _read(found, language_blocks(model, found))
    stacks = find_stacks(model, blocks)
    if rule.budgets is not None and len(rule.budgets) != len(blocks):
        raise UserError(f"{len(rule.budgets)} budgets were given for {len(blocks)} routed layers")
    plans = [_plan(*pair, rule.of_layer(index)) for index, pair in enumerate(zip(blocks, readings, strict=True))]
    routed = [
        RoutedBlock(block, reading, router, own=own, experts=rule.experts)
        for block, reading, (router, own, _) in zip(blocks, readings, plans, strict=True)
    ]
    members = [(module, [site for site in routed if site.block in inside]) for module, inside in stacks]
    changes = [_noted(change, site.computed_by) for (_, _, change), site in zip(plans, routed, strict=True)]
    return Handle(model, rule, members, changes, left)


def _noted(change: Change, note: str) -> Change:
    return replace(change, note="; ".join(part for part in (change.note, note) if part))


def _read(found: list[Block], language: list[Block]) -> tuple[list[Block], list[Reading], list[Change]]:
    """The blocks to reroute, what their routers do, and what is left alone."""
    blocks, readings = [], []
    left = [Change(b.name, "not of the language model", UNCHANGED) for b in found if b not in language]
    for block in language:
        try:
            readings.append(read_router(block))
            blocks.append(block)
        except FixedChoiceError as error:
            if block is language[-1] and not blocks:
                raise
            left.append(Change(block.name, "a fixed choice", UNCHANGED, str(error)))
    return blocks, readings, left


def _plan(block: Block, reading: Reading, rule: Rule) -> tuple[SiteRouter, bool, Change]:
    """What decides at a block, whether that is the family's own way, and the change in words."""
    select = reading.select if rule.select is None else rule.selection(reading.k)
    score = reading.score if rule.score is None else build_score(rule.score)
    renormalize = reading.renormalize if rule.renormalize is None else rule.renormalize
    scale = reading.weight_scale if rule.weight_scale is None else rule.weight_scale
    kept = rule.renormalize in (None, reading.renormalize) and rule.weight_scale in (None, reading.weight_scale)
    own = (
        select == reading.select and kept and (rule.score is None or (score == reading.score and not reading.weighs))
    )
    router = SiteRouter(
        reading.num_experts, score, select, renormalize=renormalize, weight_scale=scale, gate=GivenLogits()
    )
    if reading.shared and router.has_normaliser:
        raise UserError(
            f"{block.name}: {describe(score)} compares tokens expert by expert; this family's shared experts are "
            "scored with the chosen ones, so take a score of a token by itself"
        )
    router.bias_of_logits = reading.bias_of_logits
    if reading.weighs and select == reading.select and rule.score is None:
        router.weigh = partial(sparsemixer_of_top2, eps=reading.weighs_eps)
    change = Change(block.name, str(reading), UNCHANGED if own else _words(router), _note(reading, router, own=own))
    return router, own, change


def _words(router: SiteRouter) -> str:
    text = f"{describe(router.select)} of {describe(router.score)}"
    text += ", weights summing to one" if router.renormalize else ""
    return text + (f", times {router.weight_scale:g}" if router.weight_scale != 1.0 else "")


def _note(reading: Reading, router: SiteRouter, *, own: bool) -> str:
    notes = []
    if own:
        return ""
    if reading.bias and router.score != reading.score:
        notes.append("balancing bias left out: it belongs to the other score")
    if reading.weighs and router.weigh is None:
        notes.append(f"{reading.weighs} weighs the family's own choice only; weights are now {router.score.name}")
    if reading.probabilities and reading.logits_from is None:
        notes.append("logits are the logarithms of the probabilities that the family hands over")
    if router.has_cutoff or router.has_normaliser:
        notes.append("generation needs a calibrated cutoff")
    return "; ".join(notes)


def from_pretrained(path: str | Path, auto_class: Any = None, **kwargs: Any) -> Any:
    """Load a transformers model, and route it by the rule that was saved with it, if any.

    Args:
        path: folder or hub name, as for transformers.
        auto_class: which of transformers' classes loads it; default `AutoModelForCausalLM`.
        **kwargs: handed on.

    Returns:
        The model; `crossways.surgery.handle.handle_of(model)` is its handle, None if it was never rerouted.
    """
    if auto_class is None:
        from transformers import AutoModelForCausalLM

        auto_class = AutoModelForCausalLM
    model = auto_class.from_pretrained(path, **kwargs)
    if getattr(model.config, CONFIG_KEY, None) is not None:
        reroute(model)
    return model
