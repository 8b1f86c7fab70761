"""The record of one finished run: what `crossways study` writes and every table, plot and page reads.

One JSON file per run. Unknown keys are refused, so a record of another version is noticed and not half-read.
Numbers that are not finite are legal (a run may diverge) and are written as the strings "NaN" and "Infinity",
which every JSON parser can read.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from crossways.errors import UserError
from crossways.settings import Settings
from crossways.study.atomic import write_text_atomic


class _Frozen(Settings):
    model_config = ConfigDict(ser_json_inf_nan="strings")


class Parameters(_Frozen):
    """Parameter counts of the model."""

    total: int
    """All parameters; a shared tensor counts once."""
    active: int
    """Parameters that one token uses at the rule's mean budget."""
    router: int
    """Parameters of all gates; a shared gate counts once."""


class Training(_Frozen):
    """How the model was trained, and at what cost."""

    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens seen, repeats included."""
    tokens_per_second: float
    """Median over the logging intervals after the first, tokens per second."""
    wall_seconds: float
    """Wall-clock time of training, seconds."""
    peak_memory_bytes: int
    """Largest memory held during training (device memory on an accelerator, resident set on a CPU), bytes."""
    learning_rate: float
    """Peak learning rate."""
    dtype: str
    """Arithmetic of the forward pass, such as "float32" or "bfloat16"."""


class CurvePoint(_Frozen):
    """One logging point of the training curve."""

    step: int
    """Optimizer step, from 1."""
    tokens: int
    """Training tokens seen up to and including this step."""
    loss: float
    """Language-model loss alone, nats per token, mean since the point before."""
    auxiliary: dict[str, float] = Field(default_factory=dict)
    """Each auxiliary loss by name ("load_balance", "router_z", ...), before its coefficient."""


class Protocol(_Frozen):
    """How the validation figures were taken; figures of different protocols must not be compared."""

    window: int
    """Tokens per forward pass."""
    stride: int
    """Tokens by which the window advances; each token is scored once."""
    documents: int
    """Validation documents."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of the text scored."""
    boundaries: str
    """What happens at the end of a document."""
    dtype: str
    """Arithmetic of the forward pass."""
    batch_size: int
    """Windows per forward pass; a rule that is not batch invariant depends on it."""
    experts_backend: str
    """Which backend computed the experts."""


class DisabledExpert(_Frozen):
    """Perplexity per token with each token's top-1 routed expert disabled in every MoE layer.

    Taken under the rule of `Evaluation.honest_perplexity`, so that the two can be divided.
    """

    raw: float
    """The weights of the other experts left as they are."""
    renormalized: float
    """The weights of the other experts scaled up to the sum they had with the disabled one."""


class Evaluation(_Frozen):
    """Figures on the validation text."""

    protocol: Protocol
    """How they were taken."""
    perplexity: float
    """Perplexity per token under the rule the model was trained with."""
    bits_per_byte: float
    """Bits per byte of text under the rule the model was trained with."""
    rule: str
    """The routing rule: selection of score, such as "top_k(k=2) of softmax()", and gate and sharing where they are
    not plain."""
    leaky: bool
    """Whether the rule looks at later tokens or other rows of the batch, so that its figures may flatter."""
    leak_reason: str = ""
    """What the rule looks at, in a few words."""
    causal_perplexity: float | None = None
    """Perplexity per token under the causal decode twin; None when the rule is its own twin."""
    causal_bits_per_byte: float | None = None
    """Bits per byte under the causal decode twin; None when the rule is its own twin."""
    budget: float | None = None
    """Mean routed experts per token that were executed; None for a dense model."""
    causal_budget: float | None = None
    """The same under the decode twin; None when the rule is its own twin."""
    disabled: DisabledExpert | None = None
    """Perplexities with the top-1 routed expert disabled; None for a dense model."""
    unigram_bits_per_byte: float
    """Bits per byte of a unigram token model on the same text: what token frequencies alone give."""

    @property
    def has_twin(self) -> bool:
        """Whether a causal decode twin was measured beside the rule."""
        return self.causal_perplexity is not None or self.causal_bits_per_byte is not None

    @property
    def honest_perplexity(self) -> float | None:
        """Perplexity that generation would see: the twin's or the rule's own; None if all is leaky."""
        return self.causal_perplexity if self.has_twin else None if self.leaky else self.perplexity

    @property
    def honest_bits_per_byte(self) -> float | None:
        """Bits per byte that generation would see, chosen as in `honest_perplexity`."""
        return self.causal_bits_per_byte if self.has_twin else None if self.leaky else self.bits_per_byte

    @property
    def honest_budget(self) -> float | None:
        """Mean routed experts per token behind `honest_perplexity`."""
        return self.causal_budget if self.has_twin else None if self.leaky else self.budget


class ExpertLoad(_Frozen):
    """How one router spread its pairs over its experts."""

    router: str
    """Where the router stands, such as "layer 3 / factor 1"."""
    load: tuple[float, ...]
    """Share of the executed pairs that each expert received; sums to 1."""


class RunRecord(_Frozen):
    """One finished run: one variant of a study trained and evaluated with one seed."""

    variant: str
    """Key of the variant in the recipe."""
    label: str
    """Name of the variant for readers."""
    seed: int
    """Seed of initialization, data order and everything else random."""
    description: str = ""
    """One sentence on what the variant is."""
    parameters: Parameters
    """Parameter counts."""
    training_flops_per_token: float
    """Counted floating-point operations per training token, forward and backward."""
    training: Training
    """Training set-up and cost."""
    curve: tuple[CurvePoint, ...] = ()
    """Training curve, in order of steps."""
    evaluation: Evaluation
    """Validation figures."""
    load_imbalance: float | None = None
    """Mean over routers of largest load / mean load; 1 is perfectly even; None for a dense model."""
    expert_load: tuple[ExpertLoad, ...] = ()
    """Load of each router on the validation text under the training rule, first layer first; empty if dense."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Versions, processor, threads, date."""
    recipe_digest: str
    """Digest of the resolved settings that produced the run; equal digests may be compared."""

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read a record. Raises `UserError` naming the file and its first fault when it is not valid."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            fault = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
            where = ".".join(str(part) for part in fault.get("loc", ()))
            raise UserError(
                f"{path} is not a run record ({where + ': ' if where else ''}{fault['msg']}); "
                "delete it to repeat the run"
            ) from error

    def save(self, path: Path) -> Path:
        """Write the record to `path`, whole or not at all; returns `path`."""
        return write_text_atomic(path, self.model_dump_json(indent=1) + "\n")


class Comparison(_Frozen):
    """A question a study asks of some of its variants."""

    title: str
    """Heading of the comparison."""
    question: str
    """The question, one or two sentences."""
    variants: tuple[str, ...]
    """Keys of the variants compared, with or without the baseline."""
    baseline: str
    """Key of the variant that differences are taken from."""

    @property
    def members(self) -> tuple[str, ...]:
        """The variants in order; the baseline stands first when `variants` does not name it."""
        return self.variants if self.baseline in self.variants else (self.baseline, *self.variants)
