"""The dense network that is upcycled, and what its neurons become.

Legend: F neurons, D model width, E experts, W expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseFFN:
    """A gated feed-forward network, down(f(gate x) * up x): neuron n is row n of `gate` and `up` and column n of
    `down`, and the output is the sum over neurons, which is why any division of them into experts is exact."""

    gate_FD: Tensor
    """Inside the activation."""
    up_FD: Tensor
    """Multiplied with it."""
    down_DF: Tensor
    """Writes to the residual stream."""

    @property
    def width(self) -> int:
        """F."""
        return self.gate_FD.shape[0]

    def experts(self, neurons_EW: Tensor) -> tuple[Tensor, Tensor]:
        """`gate_up_proj` (E, 2W, D), gate rows first, and `down_proj` (E, D, W) of experts made of these neurons."""
        gate_up_EHD = torch.cat([self.gate_FD[neurons_EW], self.up_FD[neurons_EW]], dim=1)
        return gate_up_EHD, self.down_DF[:, neurons_EW].transpose(0, 1).contiguous()

    def shared_expert(self, neurons_S: Tensor) -> tuple[Tensor, Tensor]:
        """`up_proj.weight` (2S, D) and `down_proj.weight` (D, S) of a shared expert made of these neurons."""
        return torch.cat([self.gate_FD[neurons_S], self.up_FD[neurons_S]]), self.down_DF[:, neurons_S].contiguous()


def disturb(
    gate_up_EHD: Tensor, down_EDW: Tensor, noise: float, redraw: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Experts with noise, and with some neurons drawn anew; each expert by itself, so that copies part.

    Args:
        gate_up_EHD: (E, 2W, D).
        down_EDW: (E, D, W).
        noise: standard deviation relative to the matrix's.
        redraw: share of each expert's neurons drawn from a normal distribution with the matrix's mean and deviation
            (Drop-Upcycling, Nakamura et al. 2025, arXiv 2502.19261, section 3.2).
        generator: on the CPU.
    """
    parts = [*gate_up_EHD.chunk(2, dim=1), down_EDW.transpose(1, 2)]  # each (E, W, D): a neuron is a row
    experts, width = down_EDW.shape[0], down_EDW.shape[2]
    if redraw:
        chosen_EW = torch.rand(experts, width, generator=generator).argsort(1) < round(redraw * width)
        parts = [
            torch.where(
                chosen_EW[..., None].to(part.device), part.mean() + part.std() * _normal(part, generator), part
            )
            for part in parts
        ]
    if noise:
        parts = [part + noise * part.std() * _normal(part, generator) for part in parts]
    gate_EWD, up_EWD, down_EWD = parts
    return torch.cat([gate_EWD, up_EWD], dim=1), down_EWD.transpose(1, 2).contiguous()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
