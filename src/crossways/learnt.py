"""What routers learn without gradients: the estimates of decode twins, the load-balancing bias, ReMoE's weight.

Legend: T tokens, E experts, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.processes import Processes
from crossways.routing import Routing
from crossways.rules.balance.quantile import balancing_price
from crossways.rules.score import Score
from crossways.rules.select import Selection, Threshold


@dataclass(frozen=True)
class Sparsity:
    """How the weight of the sparsity loss follows the density of what is executed (ReMoE, Wang et al. 2024, arXiv
    2412.14711, section 3.3, eq. 7-8): multiplied by `growth` after a step that is too dense, divided by it after a
    too sparse one."""

    target: float
    """Share of pairs to execute, k / E, above 0 and at most 1."""
    start: float = 1e-8
    """First weight; 1e-8 in the paper, small enough that training starts dense."""
    growth: float = 1.2
    """Factor, above 1; 1.2 in the paper."""

    def change(self, density: Tensor) -> Tensor:
        """What to multiply the weight by after a batch of this density, scalar; 1 where it is NaN."""
        return self.growth ** torch.sign(density - self.target).nan_to_num(0.0)


class Pass(NamedTuple):
    """What one training pass of a step has to say to it."""

    load_E: Tensor
    """Executed pairs per expert, float32 (E,)."""
    price_E: Tensor | None
    """The prices that would have balanced this batch, float32 (E,), for quantile balancing."""
    density: Tensor | None
    """Share of pairs executed, scalar, for routers that adapt the weight of a sparsity loss."""


class Learnt(nn.Module):
    """Buffers, float32 and part of the checkpoint, only where they are needed: `cutoff` (C,), the running estimate of
    the decode twin's threshold; `normaliser` (E,), that of its score; `bias` (E,), what balancing adds when choosing;
    and `sparsity_coef` (), the weight of the sparsity loss that ReMoE adapts.

    The estimates follow every training pass, the other two every optimizer step, from all its passes. Where several
    processes train one model together, all follow from what all of them saw; see `crossways.processes`.
    """

    cutoff: Tensor
    normaliser: Tensor
    bias: Tensor
    sparsity_coef: Tensor

    def __init__(
        self,
        num_experts: int,
        score: Score,
        select: Selection,
        *,
        cutoff_momentum: float,
        bias_update_rate: float,
        price_momentum: float | None,
        sparsity: Sparsity | None,
    ) -> None:
        """As for `Router`."""
        super().__init__()
        if bias_update_rate and price_momentum is not None:
            raise UserError("loss-free and quantile balancing both move the bias: choose one")
        self.num_experts, self.score, self.select = num_experts, score, select
        self.cutoff_momentum, self.sparsity = cutoff_momentum, sparsity
        self.bias_update_rate, self.price_momentum = bias_update_rate, price_momentum
        self.passes: list[Pass] = []
        self.processes = Processes()
        twin = select.decode_twin()
        self.has_cutoff = isinstance(twin, Threshold) and twin.value is None
        self.has_normaliser = score.normaliser(torch.zeros(1, 1, num_experts, device="cpu")) is not None
        self.has_bias = bool(bias_update_rate) or price_momentum is not None
        shapes = {
            "cutoff": (num_experts if twin.per_expert else 1,) if isinstance(twin, Threshold) else None,
            "normaliser": (num_experts,) if self.has_normaliser else None,
            "bias": (num_experts,) if self.has_bias else None,
            "sparsity_coef": () if sparsity else None,
        }
        for name, shape in shapes.items():
            if shape is not None and (name != "cutoff" or self.has_cutoff):
                self.register_buffer(name, torch.full(shape, self.initial(name), dtype=torch.float32))

    def initial(self, buffer: str) -> float:
        """The value with which a buffer starts; NaN means that nothing is known yet."""
        if buffer == "sparsity_coef":
            return self.sparsity.start if self.sparsity else 0.0
        return 0.0 if buffer == "bias" else torch.nan

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert as any module, but keep the buffers in float32: they are compared with float32 scores, and
        an update of one per cent is lost in bfloat16."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def snapshot(self, buffer: str) -> Tensor | None:
        """A copy of `cutoff`, `normaliser` or `bias` as it is now, None for a router without."""
        current = self._buffers.get(buffer)
        return None if current is None else current.clone()

    def _running(self, buffer: str, given: Tensor | None, seen: Tensor | None, rule: str) -> Tensor:
        """The running estimate; a rule's first training step has nothing but its own batch to go by."""
        running = getattr(self, buffer) if given is None else given
        if not running.isnan().any():
            return running
        if seen is not None:
            return seen
        raise UserError(
            f"the router of {rule!r} has no {buffer} yet for its causal decode twin: train the model for a step or "
            "calibrate it on text first"
        )

    @torch.no_grad()
    def observe(self, routing: Routing, density: Tensor | None = None, step_ends: bool = True) -> None:
        """Learn from a training pass what is not learnt by gradients. Called once per forward pass, outside any
        recomputation.

        A batch without an estimate (padding alone, or NaN scores) leaves the old one as it is.

        Args:
            routing: what this router decided.
            density: mean of `Routing.density` over the routers that share one sparsity target, as in ReMoE; by
                default that of this routing.
            step_ends: whether the pass is an optimizer step by itself; otherwise `finish_step` follows its last one.
        """
        if routing.reused:
            return
        self._blend("cutoff", routing.cutoff_C)
        self._blend("normaliser", routing.normaliser_E)
        price_E = balancing_price(routing, self.bias) if self.price_momentum is not None else None
        density = routing.density() if density is None and self.sparsity is not None else density
        self.passes.append(Pass(routing.assignment.load_E().float(), price_E, density))
        if step_ends:
            self.finish_step()

    @torch.no_grad()
    def finish_step(self) -> None:
        """Move the bias and the weight of the sparsity loss by what the passes of an optimizer step have shown."""
        if not self.passes:
            return
        if self.bias_update_rate:
            load_E = self.processes.sum(torch.stack([one.load_E for one in self.passes]).sum(0))
            self.bias += self.bias_update_rate * torch.sign(load_E.mean() - load_E)
        if self.price_momentum is not None:
            price_E = torch.stack([one.price_E for one in self.passes if one.price_E is not None]).mean(0)
            price_E = torch.lerp(self.processes.mean(price_E), -self.bias, self.price_momentum)
            self.bias.copy_(price_E.mean() - price_E)
        if self.sparsity is not None:
            densities = [one.density for one in self.passes if one.density is not None]
            self.sparsity_coef *= self.sparsity.change(self.processes.mean(torch.stack(densities).mean()))
        self.passes.clear()

    def step_load(self) -> Tensor | None:
        """Executed pairs per expert in the passes of this step so far, float32 (E,); None before the first."""
        return torch.stack([one.load_E for one in self.passes]).sum(0) if self.passes else None

    def _blend(self, buffer: str, seen: Tensor | None) -> None:
        if seen is None:
            return
        running = getattr(self, buffer)
        seen = self.processes.mean(seen.to(running.dtype))
        updated = torch.where(running.isnan(), seen, torch.lerp(seen, running, self.cutoff_momentum))
        running.copy_(torch.where(seen.isnan(), running, updated))
