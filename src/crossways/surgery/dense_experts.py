"""Experts that are given every token once for each expert, already weighted: let them compute the chosen pairs alone.

Legend: T tokens, D model width, E experts, R = E T rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crossways.assignment import Assignment

SLOTS = ("_old_forward", "forward")
"""Where an instance may hold its forward: accelerate keeps the original in the first and stands in the second."""
CLOSE = 0.02
"""Relative error up to which experts one by one count as the experts together; 16 bits included."""


class ChosenOnly:
    """Stands in the instance for the `forward` of experts that take (E T, D), expert by expert. Their own forward is
    called for one expert at a time, on the rows of its pairs; the other rows stay zero.

    Weights are on the inputs there, E(p x), so a row that is left out would have been E(0). That this is zero, and
    that experts one by one say the same as together, is tried out on random numbers before the first use; where it
    does not hold, they are left to compute everything.
    """

    def __init__(self, module: nn.Module) -> None:
        """
        Args:
            module: the experts.
        """
        self.module = module
        self.assignment: Assignment | None = None
        """What to compute in the next call; everything, if None."""
        self.understood: bool | None = None
        """Whether that works with these experts; None until it was tried."""
        slot = next((slot for slot in SLOTS if slot in vars(module)), SLOTS[-1])
        self.before: Callable[..., Any] | None = vars(module).get(slot)
        setattr(module, slot, self)

    def remove(self) -> None:
        """Take it away, from wherever it has been put since."""
        for slot in SLOTS:
            if vars(self.module).get(slot) is not self:
                continue
            if self.before is None and slot == "forward":
                del vars(self.module)[slot]
            else:
                setattr(self.module, slot, self.before or self._together)

    @torch.compiler.disable
    def __call__(self, x_RD: Tensor) -> Tensor:
        """The output rows (R, D) of input rows (R, D)."""
        assignment, self.assignment = self.assignment, None
        if assignment is None:
            return self._together(x_RD)
        experts = _OneByOne(self.module)
        if self.understood is None:
            self.understood = self._try_out(experts, x_RD)
        return experts.of_pairs(x_RD, assignment) if self.understood else self._together(x_RD)

    def _together(self, x_RD: Tensor) -> Tensor:
        said: Tensor = type(self.module).forward(self.module, x_RD)
        return said

    @torch.no_grad()
    def _try_out(self, experts: _OneByOne, x_RD: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2 * experts.number, x_RD.shape[-1], generator=generator).to(x_RD)
        each = [experts(e, rows[2 * e : 2 * e + 2]) for e in range(experts.number)]
        whole = self._together(rows)
        nothing = experts(0, torch.zeros_like(rows[:1]))
        return bool((torch.cat(each) - whole).norm() <= CLOSE * whole.norm()) and not bool(nothing.any())


class _OneByOne:
    """Experts as they are in this call, each by itself."""

    def __init__(self, module: nn.Module) -> None:
        names = [*module._parameters, *getattr(module, "parametrizations", ())]
        self.tensors: dict[str, Tensor] = {name: getattr(module, name) for name in names}
        self.number = max(tensor.shape[0] for tensor in self.tensors.values())
        self.kind: Any = parametrize.type_before_parametrizations(module)
        self.one: Any = object.__new__(self.kind)  # modules with parametrizations refuse to be copied
        self.one.__dict__.update(vars(module))

    def __call__(self, expert: int, x_PD: Tensor) -> Tensor:
        """The output (P, D) of one expert for its own rows (P, D)."""
        vars(self.one)["_parameters"] = {name: t[expert : expert + 1] for name, t in self.tensors.items()}
        said: Tensor = self.kind.forward(self.one, x_PD)
        return said

    def of_pairs(self, x_RD: Tensor, assignment: Assignment) -> Tensor:
        """The output rows (R, D) of the pairs, zero elsewhere."""
        pairs, rows, outputs = assignment.compact(), [], []
        bounds = pairs.offsets_E1.tolist()
        for expert, (first, end) in enumerate(itertools.pairwise(bounds)):
            if end > first:
                rows.append(pairs.token_P[first:end] + expert * pairs.num_tokens)
                outputs.append(self(expert, x_RD[rows[-1]]))
        if not rows:
            return torch.zeros_like(x_RD)
        return torch.zeros_like(x_RD).index_copy(0, torch.cat(rows), torch.cat(outputs))
