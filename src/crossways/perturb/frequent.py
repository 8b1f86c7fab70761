"""Restrict a model to the K most frequent paths.

Legend: B batch, S sequence, R routers, T = B * S tokens, E experts, N paths, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crossways.perturb.base import ModelPerturbation, Stage
from crossways.perturb.force import force_top
from crossways.routing import Decide, Perturbation, Routing
from crossways.sites import Site

CHUNK_ENTRIES = 2**22
"""Most entries of the token-by-path matrix that are held at once."""


@dataclass(frozen=True, eq=False)
class FrequentPaths(ModelPerturbation):
    """Tokens may only take the given paths (PathMoE, arXiv 2603.18297, inference limited to the K most frequent
    paths).

    Paths are counted on training data, `FrequentPaths(trace.top_paths(K))`; each token takes the allowed path of
    greatest summed log-probability over the routers, where an expert's probability is its share of the token's
    scores.

    What the paper leaves open is settled so: every forward pass runs twice. The first is free and gives the scores of
    all routers; the path is chosen from them; the second is forced along it. The scores of later layers are thus
    those of the free pass, not those that the forced choices of earlier layers would lead to. With k > 1 experts per
    token the path fixes the top one, as in `ForcePaths`. A path's entry -1 (nobody) leaves the token to the rule and
    counts as an expert of probability 1 / E.
    """

    stage: ClassVar[Stage] = Stage.PATHS

    path_NR: Tensor
    """Allowed paths, int64 (N, R), at least one."""
    alone: bool = False
    """Execute nothing but the expert on the path."""

    def __post_init__(self) -> None:
        if self.path_NR.dim() != 2 or self.path_NR.shape[0] == 0:
            raise ValueError(f"paths must be a non-empty (N, R) tensor, got shape {tuple(self.path_NR.shape)}")

    @contextmanager
    def installed(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[list[Perturbation | None]]:
        """Put a first, free pass before every forward pass of the model."""
        if self.path_NR.shape[1] != len(sites):
            raise ValueError(f"paths of {self.path_NR.shape[1]} routers given to a model with {len(sites)}")
        state = _TwoPasses(self.path_NR, self.alone)
        handle = model.register_forward_pre_hook(state.free_pass, with_kwargs=True, prepend=True)
        try:
            yield [state.at(site) for site in sites]
        finally:
            handle.remove()


@dataclass(eq=False)
class _TwoPasses:
    """What the free pass leaves to the forced one."""

    path_NR: Tensor
    alone: bool
    free: bool = False
    log_prob_R: list[Tensor] = field(default_factory=list)
    expert_TR: Tensor | None = None

    def free_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.free:
            return
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise ValueError("paths cannot be restricted while a key-value cache is in use: pass use_cache=False")
        self.free, self.log_prob_R, self.expert_TR = True, [], None
        try:
            with torch.no_grad():
                # Not `model(...)`: hooks on the model, such as a trace's, are for the pass that counts.
                model.forward(*args, **(kwargs | {"use_cache": False}))
        finally:
            self.free = False
        self.expert_TR = best_paths(self.log_prob_R, self.path_NR)

    def at(self, site: Site) -> Perturbation:
        def forced(logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
            routing = decide(logits_BSE, allowed_BSE)
            if self.free:
                self.log_prob_R.append(log_shares(routing.scores_TE))
                return routing
            if self.expert_TR is None:
                raise ValueError("the model whose paths are restricted must itself be called, not a part of it")
            expert_T = self.expert_TR[:, site.index]
            return force_top(routing, expert_T, allowed_BSE, site.router.sums_to_one, alone=self.alone)

        return forced


def log_shares(scores_TE: Tensor) -> Tensor:
    """Log of each expert's share of its token's scores, (T, E), finite for a score of zero."""
    tiny = torch.finfo(scores_TE.dtype).tiny
    scores_TE = scores_TE.clamp(min=tiny)
    return scores_TE.log() - scores_TE.sum(-1, keepdim=True).log()


def best_paths(log_prob_R: Sequence[Tensor], path_NR: Tensor) -> Tensor:
    """The path of greatest summed log-probability of each token.

    Args:
        log_prob_R: for each router, (T, E).
        path_NR: allowed paths, int64 (N, R); an entry -1 counts as probability 1 / E.

    Returns:
        int64 (T, R).
    """
    device = log_prob_R[0].device
    path_NR = path_NR.to(device)
    size = max(CHUNK_ENTRIES // path_NR.shape[0], 1)
    best = []
    for start in range(0, log_prob_R[0].shape[0], size):
        total_CN = sum(
            _with_nobody(log_prob_TE[start : start + size])[:, path_N]  # index -1 is the added column
            for log_prob_TE, path_N in zip(log_prob_R, path_NR.t(), strict=True)
        )
        best.append(path_NR[total_CN.argmax(-1)])  # type: ignore[union-attr]
    return torch.cat(best)


def _with_nobody(log_prob_CE: Tensor) -> Tensor:
    """One more column, for nobody: log(1 / E)."""
    return nn.functional.pad(log_prob_CE, (0, 1), value=-math.log(log_prob_CE.shape[1]))
