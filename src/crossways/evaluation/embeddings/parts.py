"""The two parts of an embedding, and their combinations.

Legend: N texts, D model width, W routing width (the sum of E over routers), Z embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossways.errors import UserError
from crossways.evaluation.embeddings.settings import EmbeddingSettings


@dataclass(frozen=True)
class Parts:
    """What a model says of N texts at their last tokens."""

    hidden_ND: Tensor
    """After the last layer and norm, float32."""
    routing_NW: Tensor
    """Router logits of all layers in a row, float32; of width 0 if they were not asked for."""

    def __getitem__(self, rows: slice | Tensor) -> Parts:
        return Parts(self.hidden_ND[rows], self.routing_NW[rows])

    def __len__(self) -> int:
        return len(self.hidden_ND)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each dimension of both parts."""

    hidden_mean_D: Tensor
    hidden_std_D: Tensor
    routing_mean_W: Tensor
    routing_std_W: Tensor

    @classmethod
    def of(cls, parts: Parts) -> Statistics:
        """Those of some texts, at least two; the deviation is the unbiased one, as in the code of MoEE."""
        if len(parts) < 2:
            raise UserError(f"standardising needs two texts or more, got {len(parts)}")
        return cls(*(stat for x_NZ in (parts.hidden_ND, parts.routing_NW) for stat in (x_NZ.mean(0), x_NZ.std(0))))

    def apply(self, parts: Parts) -> Parts:
        """Standardised parts."""
        return Parts(
            (parts.hidden_ND - self.hidden_mean_D) / (self.hidden_std_D + 1e-8),
            (parts.routing_NW - self.routing_mean_W) / (self.routing_std_W + 1e-8),
        )

    def state(self) -> dict[str, Tensor]:
        """Named tensors, to be saved."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def standardised(parts: Parts, settings: EmbeddingSettings, statistics: Statistics | None) -> Parts:
    """Parts standardised as the settings say; a last group of a single text joins the one before."""
    if settings.kind == "hs" or settings.standardise == "none":
        return parts
    if settings.standardise == "fitted":
        if statistics is None:
            raise UserError(
                "standardise is `fitted`, but nothing was fitted: call fit on some texts (--fit-on) first"
            )
        return statistics.apply(parts)
    starts = list(range(0, len(parts), settings.standardise_over))
    if len(starts) > 1 and len(parts) - starts[-1] < 2:
        starts.pop()
    groups = [parts[slice(a, b)] for a, b in zip(starts, [*starts[1:], len(parts)], strict=True)]
    done = [Statistics.of(group).apply(group) for group in groups]
    return Parts(torch.cat([p.hidden_ND for p in done]), torch.cat([p.routing_NW for p in done]))


def combined(parts: Parts, settings: EmbeddingSettings) -> Tensor:
    """The embedding, float32 (N, Z), of standardised or raw parts.

    `moee-sum` is the paper's weighted sum of similarities, cos(h, h') + alpha cos(r, r'), as one vector: unit vectors
    in a row, the second scaled by sqrt(alpha). Dot products are that sum, cosines that sum over 1 + alpha. (The
    paper's code sums similarities where it has pairs, and averages cluster labels for clustering; as a vector the
    same idea serves every task.)
    """
    if settings.kind == "hs":
        return parts.hidden_ND
    if settings.kind == "rw":
        return parts.routing_NW
    if settings.kind == "moee":
        return torch.cat([parts.hidden_ND, parts.routing_NW], -1)
    hidden_ND = torch.nn.functional.normalize(parts.hidden_ND, dim=-1)
    routing_NW = torch.nn.functional.normalize(parts.routing_NW, dim=-1)
    return torch.cat([hidden_ND, settings.alpha**0.5 * routing_NW], -1)
