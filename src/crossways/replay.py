"""Replayed decisions: record which experts some passes execute, and have later passes execute the same.

The weights are those that the router now gives these experts, so gradients reach it (`moe_enable_routing_replay` of
Megatron-core; used in reinforcement learning, where training must route as the rollout did).

    with recorded(model) as decisions:
        model(ids_BS)
    ...                                     # other weights, another dtype, another copy of the model
    with replayed(model, decisions):
        model(ids_BS, labels=ids_BS).loss.backward()

Legend: B batch, S sequence, T = B * S tokens, P pairs, R routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.models import CrosswaysModel
from crossways.routing import Decided, Routing
from crossways.sites import router_sites
from crossways.surgery.attach import own_routing
from crossways.surgery.handle import handle_of
from crossways.trace.recording import each_pass


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """What one forward pass executed."""

    decided_R: tuple[Decided, ...]
    """The pairs of each router, in the order of a forward pass."""
    token_ids_BS: Tensor | None = None
    """The ids that were routed, int64 (B, S), where routers knew them; a replay on others is refused."""


@dataclass(eq=False)
class Decisions:
    """What a sequence of forward passes executed: about 6 bytes for each pair, on the device it was recorded on."""

    passes: list[RecordedPass] = field(default_factory=list)

    def record(self, routings: Sequence[Routing], token_ids_T: Tensor | None = None) -> None:
        """Add one forward pass.

        Args:
            routings: what its routers executed, in order.
            token_ids_T: int64 (T,) with padding, or None.
        """
        decided_R = tuple(_decided(routing) for routing in routings)
        ids_BS = None if token_ids_T is None else token_ids_T.view(decided_R[0].rows, -1).clone()
        self.passes.append(RecordedPass(decided_R, ids_BS))

    def joined(self) -> Decisions:
        """Passes that went on with the same rows, as `generate` makes them with a cache, as one pass over all their
        tokens. Rows must not have changed places (beam search)."""
        if len({one.decided_R[0].rows for one in self.passes}) != 1:
            raise UserError("only passes of equally many rows, and at least one, can be joined")
        routers = zip(*(one.decided_R for one in self.passes), strict=True)
        ids = [one.token_ids_BS for one in self.passes if one.token_ids_BS is not None]
        ids_BS = torch.cat(ids, dim=1) if len(ids) == len(self.passes) else None
        return Decisions([RecordedPass(tuple(_joined(parts) for parts in routers), ids_BS)])


@contextmanager
def recorded(model: nn.Module) -> Iterator[Decisions]:
    """Record what every forward pass of a model executes while the context lasts, perturbations and decode twins
    included. The given module itself must be called (`generate` does); routed models of transformers need no
    preparation.

    Raises:
        ValueError: if the model has no router, or was not called.
    """
    decisions = Decisions()
    with own_routing(model), each_pass(model, decisions.record):
        yield decisions
    if not decisions.passes:
        raise ValueError(f"nothing was recorded: {type(model).__name__} was not called inside the context")


@contextmanager
def replayed(model: nn.Module, decisions: Decisions) -> Iterator[None]:
    """Have the next forward passes of a model execute recorded pairs: the first pass in the context the first that
    was recorded, and so on, each once.

    Padding, and pairs that a perturbation forbids, are left out; balancing counts what is executed. Several passes
    may wait for their backward pass, and layers that gradient checkpointing computes again repeat the pairs of their
    own pass, also after the context has ended; with a model of transformers that is not rerouted they are refused.

    Raises:
        UserError: if the model has other routers than the recorded one, a pass other tokens, or there are more passes
            than were recorded; for PhiMoE, whose weights hang on its own choice.
        ValueError: if the context ends with recorded passes left over.
    """
    attaching = handle_of(model) is None
    with own_routing(model):
        handle = handle_of(model)
        deciders = [handle] if handle else [m for m in model.modules() if isinstance(m, CrosswaysModel)]
        if len(deciders) != 1:
            raise UserError(f"{type(model).__name__} holds {len(deciders)} routed decoders; give one that has one")
        if handle and attaching and _checkpointing(model):
            raise UserError(
                "gradient checkpointing decides again in the backward pass, when this context may have taken its "
                "hooks off: reroute(model, 'own') first, and keep that until gradients are taken"
            )
        if handle and any(router.weigh is not None for router in handle.routers.values()):
            raise UserError(
                f"{type(model).__name__} weighs an expert by what comes near it, so that other experts than its own "
                "choice have no weight: decisions cannot be replayed; reroute it by another score first, for example "
                "reroute(model, 'token-choice', score='softmax')"
            )
        feed = _Feed(decisions, len(router_sites(model)))
        decider = deciders[0]
        before, decider.replay = decider.replay, feed
        try:
            yield
        finally:
            decider.replay = before
    if feed.left:
        raise ValueError(f"{feed.left} of {len(decisions.passes)} recorded passes were not replayed")


def _checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class _Feed:
    """Hands out the recorded passes, one for each forward pass."""

    def __init__(self, decisions: Decisions, num_routers: int) -> None:
        for one in decisions.passes:
            if len(one.decided_R) != num_routers:
                raise UserError(f"decisions of {len(one.decided_R)} routers, the model has {num_routers}")
        self.passes = list(decisions.passes)

    @property
    def left(self) -> int:
        """Passes that nobody asked for yet."""
        return len(self.passes)

    def __call__(self, token_ids_BS: Tensor | None) -> tuple[Decided, ...]:
        """The next pass."""
        if not self.passes:
            raise UserError("there are more forward passes in the context than were recorded")
        one = self.passes.pop(0)
        if one.token_ids_BS is not None and token_ids_BS is not None:
            same = one.token_ids_BS.shape == token_ids_BS.shape
            if not same or not torch.equal(one.token_ids_BS.to(token_ids_BS.device), token_ids_BS):
                raise UserError(
                    f"decisions were recorded on other tokens, of shape {tuple(one.token_ids_BS.shape)}; this pass "
                    f"has {tuple(token_ids_BS.shape)}"
                )
        return one.decided_R


def _decided(routing: Routing) -> Decided:
    pairs = routing.assignment.compact()
    length = pairs.num_tokens // max(routing.num_rows, 1)
    return Decided(pairs.token_P.int(), pairs.expert_P.to(torch.int16), routing.num_rows, length)


def _joined(parts: Sequence[Decided]) -> Decided:
    length = sum(part.length for part in parts)
    tokens, start = [], 0
    for part in parts:
        row_P, position_P = part.token_P // part.length, part.token_P % part.length
        tokens.append(row_P * length + start + position_P)
        start += part.length
    experts_P = torch.cat([part.expert_P for part in parts])
    return replace(parts[0], token_P=torch.cat(tokens), expert_P=experts_P, length=length)
