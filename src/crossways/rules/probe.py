"""Black-box probes of a rule's declared properties, for the rules of this package and for those added to it.

A probe knows nothing of a rule but its call: it edits later tokens, other rows and padding, and looks at whether
decisions that must not change do. What it observes on random inputs refutes a claim with certainty and supports it
with many trials; `check_selection` and `check_score` compare it with what the rule declares, in both directions, so a
rule that is needlessly declared unsafe is found too.

Legend: B batch, S sequence, E experts, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from crossways.rules.registry import describe
from crossways.rules.score import Score
from crossways.rules.select import Selection


@dataclass(frozen=True)
class Properties:
    """What held in every trial; None where it does not apply to the kind of rule."""

    causal: bool
    """Editing later tokens never changed an earlier token."""
    batch_invariant: bool
    """Editing, removing or adding other rows never changed a row."""
    exact_budget: bool | None = None
    """The number of chosen pairs never depended on the content of the scores."""
    padding_inert: bool | None = None
    """Padding never chose anybody, and neither its content nor its amount changed a valid token."""


@dataclass(frozen=True)
class Probe:
    """The inputs of the trials."""

    num_experts: int = 4
    """E."""
    batch: int = 3
    """B, at least 2."""
    sequence: int = 6
    """S, at least 2."""
    trials: int = 40
    """Random inputs; a property that fails on one input in ten is missed by 40 once in 70 runs."""
    seed: int = 0
    """Seed of the inputs."""

    def inputs(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Random logits (B, S, E), other logits (B, S, E) and a boolean mask of valid tokens (B, S), right-padded in
        odd trials and full in even ones."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.sequence, self.num_experts)
        for trial in range(self.trials):
            logits_BSE, other_BSE = (2 * torch.randn(shape, generator=generator) for _ in range(2))
            shortest = 1 if trial % 2 else self.sequence
            length_B = torch.randint(shortest, self.sequence + 1, (self.batch,), generator=generator)
            yield logits_BSE, other_BSE, torch.arange(self.sequence) < length_B[:, None]


def probe_selection(rule: Selection, probe: Probe | None = None) -> Properties:
    """Observe a selection on softmax scores. A rule with a running cutoff is probed as `rule.at(cutoff)`."""
    probe = probe or Probe()
    held = {field.name: True for field in fields(Properties)}
    for logits_BSE, other_BSE, valid_BS in probe.inputs():
        scores_BSE, other_BSE = logits_BSE.softmax(-1), other_BSE.softmax(-1)
        chosen_BSE = _choose(rule, scores_BSE, valid_BS)
        cut = probe.sequence // 2
        later_BSE = torch.cat([scores_BSE[:, :cut], other_BSE[:, cut:]], dim=1)
        others_BSE = torch.cat([scores_BSE[:1], other_BSE[1:]])
        mixed_BSE = torch.where(valid_BS[..., None], scores_BSE, other_BSE)
        wide_BSE, wide_BS = _padded(scores_BSE, valid_BS)
        unpadded_BSE = _choose(rule, wide_BSE, wide_BS)[: probe.batch, : probe.sequence]
        held["causal"] &= torch.equal(_choose(rule, later_BSE, valid_BS)[:, :cut], chosen_BSE[:, :cut])
        held["batch_invariant"] &= torch.equal(_choose(rule, others_BSE, valid_BS)[0], chosen_BSE[0])
        held["batch_invariant"] &= torch.equal(_choose(rule, scores_BSE[:1], valid_BS[:1])[0], chosen_BSE[0])
        held["exact_budget"] &= bool(_choose(rule, other_BSE, valid_BS).count_nonzero() == chosen_BSE.count_nonzero())
        held["padding_inert"] &= not chosen_BSE[~valid_BS].any()
        held["padding_inert"] &= torch.equal(_choose(rule, mixed_BSE, valid_BS), chosen_BSE)
        held["padding_inert"] &= torch.equal(unpadded_BSE, chosen_BSE)
    return Properties(**held)


def probe_score(rule: Score, probe: Probe | None = None) -> Properties:
    """Observe a score. Budget and padding do not apply: a score gives no pairs away."""
    probe = probe or Probe()
    causal = batch_invariant = True
    for logits_BSE, other_BSE, _ in probe.inputs():
        scores_BSE = rule(logits_BSE)
        cut = probe.sequence // 2
        later_BSE = torch.cat([logits_BSE[:, :cut], other_BSE[:, cut:]], dim=1)
        causal &= torch.equal(rule(later_BSE)[:, :cut], scores_BSE[:, :cut])
        others_BSE = torch.cat([logits_BSE[:1], other_BSE[1:]])
        batch_invariant &= torch.equal(rule(others_BSE)[0], scores_BSE[0])
    return Properties(causal, batch_invariant)


def check_selection(rule: Selection, probe: Probe | None = None) -> None:
    """Hold a selection to what it declares.

    Raises:
        ValueError: naming each property that was observed otherwise than declared, or padding that takes part.
    """
    observed = probe_selection(rule, probe)
    declared = Properties(rule.causal, rule.batch_invariant, rule.exact_budget, padding_inert=True)
    _compare(describe(rule), declared, observed)


def check_score(rule: Score, probe: Probe | None = None) -> None:
    """Hold a score to what it declares.

    Raises:
        ValueError: naming each property that was observed otherwise than declared.
    """
    _compare(describe(rule), Properties(rule.causal, rule.batch_invariant), probe_score(rule, probe))


def _compare(name: str, declared: Properties, observed: Properties) -> None:
    wrong = [
        f"{field.name} is declared {getattr(declared, field.name)} but observed {getattr(observed, field.name)}"
        for field in fields(Properties)
        if getattr(declared, field.name) != getattr(observed, field.name)
    ]
    if wrong:
        raise ValueError(f"{name}: {'; '.join(wrong)}")


def _choose(rule: Selection, scores_BSE: Tensor, valid_BS: Tensor) -> Tensor:
    """The executed matrix (B, S, E): the scores at the chosen pairs (never zero), zero elsewhere."""
    allowed_BSE = valid_BS[..., None].expand_as(scores_BSE)
    return rule(scores_BSE, scores_BSE, allowed_BSE).to_dense().view_as(scores_BSE)


def _padded(scores_BSE: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The same batch with one more column and one more row of padding, whose scores beat all others."""
    wide_BSE = torch.nn.functional.pad(scores_BSE, (0, 0, 0, 1, 0, 1), value=2.0)
    return wide_BSE, torch.nn.functional.pad(valid_BS, (0, 1, 0, 1), value=False)
