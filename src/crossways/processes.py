"""The processes that train one model together, each on text of its own: sums and means over all of them.

Nothing happens where `torch.distributed` is not initialised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Processes:
    """Whose loads count together."""

    group: distributed.ProcessGroup | None = None
    """The process group; None is the default group."""
    alone: bool = False
    """Whether each process is by itself, though there are others."""

    def __len__(self) -> int:
        """How many there are; 1 outside a group."""
        if self.alone or not distributed.is_available() or not distributed.is_initialized():
            return 1
        return max(distributed.get_world_size(self.group), 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, of tensors of one shape; without gradient."""
        if len(self) == 1:
            return x
        x = x.detach().clone()
        distributed.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes whose number is not NaN, entry by entry; NaN where none has one."""
        if len(self) == 1:
            return x
        known = self.sum(torch.stack([x.nan_to_num(0.0), (~x.isnan()).to(x.dtype)]))
        return torch.where(known[1] > 0, known[0] / known[1].clamp(min=1), torch.nan)

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        """Itself: a group is no part of a model, and cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its group, which means nothing elsewhere."""
        return type(self), (None, self.alone)


def balance_over(model: nn.Module, group: distributed.ProcessGroup | None = None, *, alone: bool = False) -> None:
    """Say with which other processes the routers of a model count loads and estimate cutoffs.

    Without it they do so with all processes of the default group, if there is one. All of these must then run the
    same number of training passes and steps, as they do under data parallelism; with tensor or pipeline parallelism
    give the group that is parallel in data.

    Args:
        model: any module with routers, or a rerouted model of transformers.
        group: processes that see different text.
        alone: count the loads of this process by themselves.
    """
    from crossways.sites import router_sites  # which needs routers, which need this

    for site in router_sites(model):
        site.router.processes = Processes(group, alone)
