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

    def inputs(self) -> Iterator[Trial]:
        """Right-padded in odd trials and full in even ones; every place to cut and every row comes in turn with each,
        for a rule may look around within chunks, or let only the first rows decide."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.sequence, self.num_experts)
        for trial in range(self.trials):
            logits_BSE, other_BSE = (2 * torch.randn(shape, generator=generator) for _ in range(2))
            shortest = 1 if trial % 2 else self.sequence
            length_B = torch.randint(shortest, self.sequence + 1, (self.batch,), generator=generator)
            valid_BS = torch.arange(self.sequence) < length_B[:, None]
            yield Trial(logits_BSE, other_BSE, valid_BS, *self.cut_and_row(trial))

    def cut_and_row(self, trial: int) -> tuple[int, int]:
        """How many tokens stay when later ones are edited, 1 to S - 1, and which row stays when others are."""
        return 1 + trial // 2 % (self.sequence - 1), trial // 2 % self.batch


@dataclass(frozen=True)
class Trial:
    """What one trial starts from, and where it edits."""

    logits_BSE: Tensor
    """Float32 (B, S, E)."""
    other_BSE: Tensor
    """Other logits, to edit with."""
    valid_BS: Tensor
    """Boolean (B, S), false for padding."""
    cut: int
    """The tokens from here on are the later ones."""
    row: int
    """All rows but this are the other ones."""

    def with_later(self, ours_BSE: Tensor, other_BSE: Tensor) -> Tensor:
        """Ours with the later tokens of the other."""
        return torch.cat([ours_BSE[:, : self.cut], other_BSE[:, self.cut :]], dim=1)

    def with_other_rows(self, ours_BSE: Tensor, other_BSE: Tensor) -> Tensor:
        """Ours with all rows but one of the other."""
        is_ours_B = torch.arange(len(ours_BSE)) == self.row
        return torch.where(is_ours_B[:, None, None], ours_BSE, other_BSE)

    @property
    def alone(self) -> slice:
        """The row that stays, as a batch of one."""
        return slice(self.row, self.row + 1)


def probe_selection(rule: Selection, probe: Probe | None = None) -> Properties:
    """Observe a selection on softmax scores. A rule with a running cutoff is probed as `rule.at(cutoff)`."""
    probe = probe or Probe()
    held = {field.name: True for field in fields(Properties)}
    for trial in probe.inputs():
        valid_BS, cut, alone = trial.valid_BS, trial.cut, trial.alone
        scores_BSE, other_BSE = trial.logits_BSE.softmax(-1), trial.other_BSE.softmax(-1)
        chosen_BSE = _choose(rule, scores_BSE, valid_BS)
        later_BSE = _choose(rule, trial.with_later(scores_BSE, other_BSE), valid_BS)
        prefix_BSE = _choose(rule, scores_BSE[:, :cut], valid_BS[:, :cut])
        held["causal"] &= torch.equal(later_BSE[:, :cut], chosen_BSE[:, :cut])
        held["causal"] &= torch.equal(prefix_BSE, chosen_BSE[:, :cut])
        others_BSE = _choose(rule, trial.with_other_rows(scores_BSE, other_BSE), valid_BS)
        held["batch_invariant"] &= torch.equal(others_BSE[alone], chosen_BSE[alone])
        held["batch_invariant"] &= torch.equal(_choose(rule, scores_BSE[alone], valid_BS[alone]), chosen_BSE[alone])
        for content_BSE in (other_BSE, trial.logits_BSE.relu()):
            count = _choose(rule, content_BSE, valid_BS).count_nonzero()
            held["exact_budget"] &= bool(count == chosen_BSE.count_nonzero())
        mixed_BSE = torch.where(valid_BS[..., None], scores_BSE, other_BSE)
        held["padding_inert"] &= not chosen_BSE[~valid_BS].any()
        held["padding_inert"] &= torch.equal(_choose(rule, mixed_BSE, valid_BS), chosen_BSE)
        held["padding_inert"] &= torch.equal(_unpadded(_choose(rule, *_padded(scores_BSE, valid_BS))), chosen_BSE)
    return Properties(**held)


def probe_score(rule: Score, probe: Probe | None = None) -> Properties:
    """Observe a score, up to rounding. A budget does not apply: a score gives no pairs away."""
    probe = probe or Probe()
    causal = batch_invariant = padding_inert = True
    for trial in probe.inputs():
        logits_BSE, other_BSE, valid_BS = trial.logits_BSE, trial.other_BSE, trial.valid_BS
        cut, alone = trial.cut, trial.alone
        scores_BSE = rule(logits_BSE, valid_BS)
        early_BS = valid_BS[:, :cut]
        later_BSE = rule(trial.with_later(logits_BSE, other_BSE), valid_BS)
        causal &= _same(later_BSE[:, :cut], scores_BSE[:, :cut], early_BS)
        causal &= _same(rule(logits_BSE[:, :cut], early_BS), scores_BSE[:, :cut], early_BS)
        others_BSE = rule(trial.with_other_rows(logits_BSE, other_BSE), valid_BS)
        batch_invariant &= _same(others_BSE[alone], scores_BSE[alone], valid_BS[alone])
        batch_invariant &= _same(rule(logits_BSE[alone], valid_BS[alone]), scores_BSE[alone], valid_BS[alone])
        mixed_BSE = torch.where(valid_BS[..., None], logits_BSE, other_BSE)
        padding_inert &= _same(rule(mixed_BSE, valid_BS), scores_BSE, valid_BS)
        padding_inert &= _same(_unpadded(rule(*_padded(logits_BSE, valid_BS))), scores_BSE, valid_BS)
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
    """The same batch with a column of padding on either side and one more row of it, whose content beats all
    others."""
    wide_BSE = torch.nn.functional.pad(scores_BSE, (0, 0, 1, 1, 0, 1), value=20.0)
    return wide_BSE, torch.nn.functional.pad(valid_BS, (1, 1, 0, 1), value=False)


def _unpadded(wide_BSE: Tensor) -> Tensor:
    """Without what `_padded` added."""
    return wide_BSE[:-1, 1:-1]
