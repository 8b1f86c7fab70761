"""Black-box probes of a rule's declared properties, for the rules of this package and for those added to it.

A probe knows nothing of a rule but its call: it edits and removes later tokens, other rows and padding, and looks at
whether decisions that must not change do. Removing matters: a capacity that grows with the text looks at no later
token, but at how many there are. What it observes on random inputs refutes a claim with certainty and supports it
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
    """Editing or removing later tokens never changed an earlier token."""
    batch_invariant: bool
    """Editing, removing or adding other rows never changed a row."""
    exact_budget: bool | None = None
    """The number of chosen pairs never depended on the content of the scores, zeros among them included."""
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
        prefix_BSE = _choose(rule, scores_BSE[:, :cut], valid_BS[:, :cut])
        held["causal"] &= torch.equal(prefix_BSE, chosen_BSE[:, :cut])
        held["causal"] &= torch.equal(_choose(rule, later_BSE, valid_BS)[:, :cut], chosen_BSE[:, :cut])
        held["batch_invariant"] &= torch.equal(_choose(rule, others_BSE, valid_BS)[0], chosen_BSE[0])
        held["batch_invariant"] &= torch.equal(_choose(rule, scores_BSE[:1], valid_BS[:1])[0], chosen_BSE[0])
        for content_BSE in (other_BSE, logits_BSE.relu()):
            count = _choose(rule, content_BSE, valid_BS).count_nonzero()
            held["exact_budget"] &= bool(count == chosen_BSE.count_nonzero())
        held["padding_inert"] &= not chosen_BSE[~valid_BS].any()
        held["padding_inert"] &= torch.equal(_choose(rule, mixed_BSE, valid_BS), chosen_BSE)
        held["padding_inert"] &= torch.equal(unpadded_BSE, chosen_BSE)
    return Properties(**held)


def probe_score(rule: Score, probe: Probe | None = None) -> Properties:
    """Observe a score, up to rounding. A budget does not apply: a score gives no pairs away."""
    probe = probe or Probe()
    causal = batch_invariant = padding_inert = True
    for logits_BSE, other_BSE, valid_BS in probe.inputs():
        scores_BSE = rule(logits_BSE, valid_BS)
        cut = probe.sequence // 2
        later_BSE = torch.cat([logits_BSE[:, :cut], other_BSE[:, cut:]], dim=1)
        others_BSE = torch.cat([logits_BSE[:1], other_BSE[1:]])
        mixed_BSE = torch.where(valid_BS[..., None], logits_BSE, other_BSE)
        wide_BSE, wide_BS = _padded(logits_BSE, valid_BS)
        unpadded_BSE = rule(wide_BSE, wide_BS)[: probe.batch, : probe.sequence]
        early_BS = valid_BS[:, :cut]
        causal &= _same(rule(later_BSE, valid_BS)[:, :cut], scores_BSE[:, :cut], early_BS)
        causal &= _same(rule(logits_BSE[:, :cut], early_BS), scores_BSE[:, :cut], early_BS)
        batch_invariant &= _same(rule(others_BSE, valid_BS)[:1], scores_BSE[:1], valid_BS[:1])
        batch_invariant &= _same(rule(logits_BSE[:1], valid_BS[:1]), scores_BSE[:1], valid_BS[:1])
        padding_inert &= _same(rule(mixed_BSE, valid_BS), scores_BSE, valid_BS)
        padding_inert &= _same(unpadded_BSE, scores_BSE, valid_BS)
    return Properties(causal, batch_invariant, padding_inert=padding_inert)


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
        ValueError: naming each property that was observed otherwise than declared, or padding that takes part.
    """
    declared = Properties(rule.causal, rule.batch_invariant, padding_inert=True)
    _compare(describe(rule), declared, probe_score(rule, probe))


def _compare(name: str, declared: Properties, observed: Properties) -> None:
    wrong = [
        f"{field.name} is declared {getattr(declared, field.name)} but observed {getattr(observed, field.name)}"
        for field in fields(Properties)
        if getattr(declared, field.name) != getattr(observed, field.name)
    ]
    if wrong:
        raise ValueError(f"{name}: {'; '.join(wrong)}")


def _choose(rule: Selection, scores_BSE: Tensor, valid_BS: Tensor) -> Tensor:
    """The executed matrix (B, S, E): one plus the weight at the chosen pairs (never zero), zero elsewhere."""
    allowed_BSE = valid_BS[..., None].expand_as(scores_BSE)
    assignment = rule(scores_BSE, scores_BSE, allowed_BSE)
    return assignment.with_weights(assignment.weight_P + 1).to_dense().view_as(scores_BSE)


def _same(one_BSE: Tensor, other_BSE: Tensor, valid_BS: Tensor) -> bool:
    """Whether the scores of valid tokens agree up to rounding."""
    return torch.allclose(one_BSE[valid_BS], other_BSE[valid_BS], rtol=1e-5, atol=1e-7)


def _padded(scores_BSE: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The same batch with one more column and one more row of padding, whose content beats all others."""
    wide_BSE = torch.nn.functional.pad(scores_BSE, (0, 0, 0, 1, 0, 1), value=20.0)
    return wide_BSE, torch.nn.functional.pad(valid_BS, (0, 1, 0, 1), value=False)
