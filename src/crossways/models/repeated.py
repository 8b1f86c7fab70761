"""What a layer that is gone through several times needs for each time but the first: a router, a place in the cache.

A model with `distinct_layers` builds that many and goes through them again and again (Universal Transformers,
Dehghani et al. 2019, arXiv 1807.03819; several layers to a round are the layer grouping of MoEUT, Csordás et al.
2024, arXiv 2405.16039). The parameters are the layers', gates included. A router has none; what it learns without
gradients (a cutoff, a bias) and what is traced or perturbed belongs to one place in the pass, so every place has its
own router.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from crossways.router import Router


class RepeatedRouter(nn.Module):
    """The router of one factor of a layer that is gone through again."""

    def __init__(self, router: Router, factor: int) -> None:
        super().__init__()
        self.router, self.factor = router, factor


class CacheFrom:
    """A cache as a layer sees it that is gone through again: the layer's own index counts from `first`."""

    def __init__(self, cache: Cache, first: int) -> None:
        self.cache, self.first = cache, first

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update`."""
        return self.cache.update(key, value, self.first + layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
