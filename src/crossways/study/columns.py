"""The columns of the study's table: what each figure is, where it stands in a record, how it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crossways.study.record import Evaluation, RunRecord
from crossways.study.spread import Show, fixed, gibibytes, scaled


@dataclass(frozen=True)
class Column:
    """One figure of the table."""

    key: str
    """Name in the CSV."""
    group: str
    """Heading over neighbouring columns."""
    title: str
    """Heading of the column."""
    note: str
    """What the figure is, with its unit; a tooltip on the page."""
    read: Callable[[RunRecord], float | None]
    """Takes the figure from a record; None when the run has none."""
    show: Show
    """Formats it."""
    missing: str = "not measured"
    """Why the figure may be None."""
    ranked: bool = False
    """Whether the smallest value is the best and may be emphasised."""
    leaky: bool = False
    """Whether the figure is that of a rule that may look ahead, to be marked."""
    headline: bool = True
    """Whether a terminal table, where room is short, shows the column."""
    counted: bool = False
    """Whether a spread is shown only if the seeds disagree, as for what is counted and not measured."""


DENSE = "dense model: it has no router"
UNDISTURBED = "dense model, or the recipe does not ask for it"
OWN_TWIN = "the rule is causal: the figure at the left is its own"


def _own(read: Callable[[Evaluation], float | None]) -> Callable[[RunRecord], float | None]:
    """A figure of the training rule, where it is not the honest one already."""

    def figure(record: RunRecord) -> float | None:
        evaluation = record.evaluation
        return read(evaluation) if evaluation.leaky or evaluation.has_twin else None

    return figure


COLUMNS: tuple[Column, ...] = (
    Column(
        "parameters_total",
        "Size",
        "Total",
        "All parameters; shared ones count once.",
        lambda r: r.parameters.total,
        scaled(),
        counted=True,
    ),
    Column(
        "parameters_active",
        "Size",
        "Active",
        "Parameters that one token uses.",
        lambda r: r.parameters.active,
        scaled(),
        counted=True,
    ),
    Column(
        "training_flops_per_token",
        "Size",
        "FLOPs / token",
        "Counted floating-point operations per training token, forward and backward.",
        lambda r: r.training_flops_per_token,
        scaled(),
        headline=False,
        counted=True,
    ),
    Column(
        "perplexity",
        "Validation, causal",
        "Perplexity",
        "Perplexity per token of held-out text under a causal rule: the rule itself, or its decode twin.",
        lambda r: r.evaluation.honest_perplexity,
        fixed(2),
        missing="the rule looks ahead and no causal twin was measured",
        ranked=True,
    ),
    Column(
        "bits_per_byte",
        "Validation, causal",
        "Bits / byte",
        "Bits per byte of held-out text under a causal rule: the rule itself, or its decode twin.",
        lambda r: r.evaluation.honest_bits_per_byte,
        fixed(3),
        missing="the rule looks ahead and no causal twin was measured",
        ranked=True,
    ),
    Column(
        "budget",
        "Validation, causal",
        "Experts / token",
        "Mean routed experts per token that were executed for the two figures at the left.",
        lambda r: r.evaluation.honest_budget,
        fixed(2),
        missing=DENSE + ", or only a rule that looks ahead was measured",
        headline=False,
        counted=True,
    ),
    Column(
        "training_rule_perplexity",
        "Training rule, not ranked",
        "Perplexity",
        "Perplexity per token under the rule of training, where that is not causal.",
        _own(lambda e: e.perplexity),
        fixed(2),
        missing=OWN_TWIN,
        leaky=True,
        headline=False,
    ),
    Column(
        "training_rule_bits_per_byte",
        "Training rule, not ranked",
        "Bits / byte",
        "Bits per byte under the rule of training, where that is not causal.",
        _own(lambda e: e.bits_per_byte),
        fixed(3),
        missing=OWN_TWIN,
        leaky=True,
    ),
    Column(
        "training_rule_budget",
        "Training rule, not ranked",
        "Experts / token",
        "Mean routed experts per token under the rule of training, where that is not causal.",
        _own(lambda e: e.budget),
        fixed(2),
        missing=OWN_TWIN,
        headline=False,
        counted=True,
    ),
    Column(
        "disabled_raw",
        "Perplexity, top-1 expert disabled",
        "Raw",
        "Perplexity with each token's top-1 routed expert disabled, the other weights left as they are.",
        lambda r: r.evaluation.disabled.raw if r.evaluation.disabled else None,
        fixed(2),
        missing=UNDISTURBED,
    ),
    Column(
        "disabled_renormalized",
        "Perplexity, top-1 expert disabled",
        "Renormalized",
        "The same with the other weights scaled up to the sum they had before.",
        lambda r: r.evaluation.disabled.renormalized if r.evaluation.disabled else None,
        fixed(2),
        missing=UNDISTURBED,
    ),
    Column(
        "load_imbalance",
        "Load",
        "Max / mean",
        "Load of the busiest expert over the mean load, averaged over routers; 1 is perfectly even.",
        lambda r: r.load_imbalance,
        fixed(2),
        missing=DENSE,
    ),
    Column(
        "tokens_per_second",
        "Cost of training",
        "Tokens / s",
        "Training tokens per second, median over logging intervals after the first.",
        lambda r: r.training.tokens_per_second,
        fixed(0),
    ),
    Column(
        "peak_memory_bytes",
        "Cost of training",
        "Peak memory",
        "Largest memory held during training.",
        lambda r: r.training.peak_memory_bytes,
        gibibytes,
        headline=False,
    ),
)
"""Every column, from left to right; those of one group are neighbours."""
