"""How a text becomes a vector: what is read off the model, and how the text is put to it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from crossways.errors import UserError
from crossways.rules.registry import nearest
from crossways.settings import Settings

Kind = Literal["hs", "rw", "moee", "moee-sum"]
Standardise = Literal["none", "fitted", "batch"]


def templates() -> dict[str, str]:
    """What surrounds a text, by name. `none` is the text in quotes, as in the code of MoEE (arXiv 2410.10814);
    `prompteol` asks for one word (Jiang et al. 2023, arXiv 2307.16645); `bare` adds nothing."""
    return {"none": '"{text}"', "prompteol": 'This sentence : "{text}" means in one word:"', "bare": "{text}"}


def instruction_formats() -> dict[str, str]:
    """How a task's instruction precedes a text, by name. `gritlm` is what the code of MoEE does by default."""
    return {"none": "", "gritlm": "<|user|>\n{instruction}\n<|embed|>\n", "plain": "{instruction}: "}


class EmbeddingSettings(Settings):
    """The protocol of an embedding. The defaults make an embedding a function of its text alone."""

    kind: Kind = "hs"
    """`hs`: hidden state after the last layer and norm, at the last token. `rw`: router logits of all layers there,
    in a row. `moee`: both in a row, which wants `standardise`. `moee-sum`: both scaled to length 1, so that the
    cosine of two embeddings is the weighted mean of the cosines of the parts."""
    alpha: float = Field(default=1.0, gt=0)
    """Weight of the routing weights' cosine in `moee-sum`, above 0; 1 in the code of MoEE, sensible 0.1 to 10."""
    prompt: str = "none"
    """`none`, `prompteol`, `bare`, or a template of your own that contains {text}."""
    instruction: str = "none"
    """How a task's instruction precedes its texts: `none`, `gritlm`, `plain`, or a format that contains
    {instruction}. Without a task there is no instruction."""
    end_mark: bool = True
    """Add a full stop to a text that ends in none of . ? ! " '"""
    single_quotes: bool = True
    """Turn double quotes in the text to single ones, since the templates quote it by double ones."""
    underscores: bool = True
    """Turn underscores to spaces."""
    max_length: int | None = Field(default=None, ge=8)
    """Most tokens, template included; the text is cut at its end, the template stays. None is the model's context."""
    pad_id: int | None = Field(default=None, ge=0)
    """Token id of padding, always on the left; None is the tokenizer's, else 0 as in the code of MoEE. Masked, so it
    changes nothing."""
    standardise: Standardise = "none"
    """Shift and scale each dimension to mean 0 and deviation 1. `fitted`: by statistics of texts given beforehand.
    `batch`: by those of the texts encoded along with it, as the code of MoEE does; an embedding then depends on its
    neighbours. The hidden state by itself (`hs`) is never standardised, as there."""
    standardise_over: int = Field(default=128, ge=2)
    """Texts in a row that share statistics under `batch`; 128 in the settings of USMoE."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per forward pass; changes nothing but speed and rounding."""
    causal: bool = False
    """Route by the decode twins. A text is embedded whole, so a rule that looks at its later tokens sees nothing that
    it should not."""

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, prompt: str) -> str:
        return _known(prompt, templates(), "{text}", "prompt")

    @field_validator("instruction")
    @classmethod
    def _instruction(cls, instruction: str) -> str:
        return _known(instruction, instruction_formats(), "{instruction}", "instruction")

    @property
    def reads_routing(self) -> bool:
        """Whether router logits are part of the embedding."""
        return self.kind != "hs"

    def instructed(self, instruction: str) -> str:
        """What precedes each text of a task with this instruction; empty for an empty one."""
        form = instruction_formats().get(self.instruction, self.instruction)
        return form.replace("{instruction}", instruction.strip(": \n")) if instruction else ""

    def render(self, text: str, prefix: str = "") -> str:
        """The whole prompt of a text, after the prefix of its task if it has one."""
        text = prefix + text or "."
        if self.end_mark and text[-1] not in ".?!\"'":
            text += "."
        if self.single_quotes:
            text = text.replace('"', "'")
        prompt = templates().get(self.prompt, self.prompt).replace("{text}", text)
        return (prompt.replace("_", " ") if self.underscores else prompt).strip()


def _known(name: str, known: dict[str, str], place: str, field: str) -> str:
    if name not in known and place not in name:
        raise UserError(
            f"unknown {field} {name!r}{nearest(name, list(known))}; known: {', '.join(known)}, or a text "
            f"that contains {place}"
        )
    return name
