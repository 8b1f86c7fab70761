"""One rerouted block: hooks on its router and its experts.

The family's router still computes its logits; a hook replaces what it chose. Chosen pairs leave in the family's own
form, weights and indices (T, K), with K the most experts any token has and E as the index of an empty place. Then our
expert compute takes them as they are (see `ragged`); where it cannot, choices become one row per pair before the
family's own experts see them. Exactly the chosen pairs are computed either way.

Legend: B batch, S sequence, T tokens, D model width, E experts, K most experts of a token, P chosen pairs.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rectangle import to_rectangle
from crossways.routing import Context, Decided, Routing
from crossways.surgery.copying import copy_with
from crossways.surgery.find import Block
from crossways.surgery.pass_state import PassState
from crossways.surgery.ragged import Experts, RaggedExperts, take_over
from crossways.surgery.reading import Reading, tensor_at
from crossways.surgery.site_router import SiteRouter


@dataclass(frozen=True)
class BlockPass:
    """What a block must know of a pass of the decoder. Estimates are copies, so that recomputation under gradient
    checkpointing decides alike after they have been updated."""

    state: PassState | None = None
    causal: bool = False
    cutoff_C: Tensor | None = None
    normaliser_E: Tensor | None = None
    decided: Decided | None = None
    """What to execute instead of deciding."""


class RoutedBlock:
    """The hooks of one block, and what they remember within a pass."""

    model: nn.Module | None = None
    """The whole model, once a handle holds the block. A copy of that copies the block; a copy of a part of it, such
    as adapters make of a router that they train, keeps asking this one."""
    active = True
    """Whether the hooks do anything; false on copies of a router that outlive `remove`."""

    def __init__(
        self, block: Block, reading: Reading, router: SiteRouter, *, own: bool, experts: Experts | None = None
    ) -> None:
        """
        Args:
            block: what is rerouted.
            reading: what its router does by itself.
            router: what decides instead.
            own: whether the rule is the family's own, which then runs untouched.
            experts: who computes the chosen pairs; None is ours where it is known to be faster.
        """
        self.block, self.reading, self.router, self.own = block, reading, router, own
        self.passing = BlockPass()
        self.live = False
        self.routing: Routing | None = None
        self._flat: tuple[Tensor, int] | None = None
        self._said: Tensor | None = None
        self._handles = [block.router.register_forward_hook(self.after_router)]
        if reading.logits_from is not None:
            source = block.router.get_submodule(reading.logits_from)
            self._handles.append(source.register_forward_hook(self.after_logits))
        self.ragged: RaggedExperts | None = None
        self.computed_by = ""
        if reading.hands_over == "pairs" and not own:
            self.ragged, self.computed_by = take_over(block.experts, self, experts)
        if reading.hands_over == "pairs" and self.ragged is None:
            self._handles += [
                block.experts.register_forward_pre_hook(self.before_experts, with_kwargs=True),
                block.experts.register_forward_hook(self.after_experts),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        self.active = False
        for handle in self._handles:
            handle.remove()
        if self.ragged is not None:
            self.ragged.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a pass, which may hold a graph of gradients."""
        return vars(self) | {"passing": BlockPass(), "live": False, "routing": None, "_flat": None, "_said": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedBlock:
        return copy_with(self, self.model, memo)

    def begin(self, state: PassState | None, *, causal: bool, decided: Decided | None = None) -> None:
        """Start a pass."""
        self.live, self.routing = True, None
        if torch.is_grad_enabled():
            estimates = self.router.snapshot("cutoff"), self.router.snapshot("normaliser")
        else:  # nothing is computed again
            estimates = self.router._buffers.get("cutoff"), self.router._buffers.get("normaliser")
        self.passing = BlockPass(state, causal, *estimates, decided)

    def end(self) -> None:
        """End it. What is decided from here on repeats an earlier pass, under gradient checkpointing."""
        self.live = False

    @torch.compiler.disable
    def after_router(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the family's router: the same logits, other pairs."""
        if not self.active:
            return output
        logits_TE = output[1] if self.reading.hands_over == "dense" else output[0]
        self.router.follow(logits_TE.device, training=module.training)
        untouched = self._untouched()
        with self.router.repeating(self._executed(output)) if untouched else nullcontext():
            logits_BSE = self._rows(logits_TE)
            tokens = logits_BSE.shape[0] * logits_BSE.shape[1]
            routing = self.router(logits_BSE, self._context(tokens, logits_BSE.device))
        if self.live:
            self.routing = detached(routing)
        return output if untouched else self._handed_over(output, self._scaled(routing.assignment))

    def _untouched(self) -> bool:
        """Whether the family's own decision stands."""
        return self.own and self.router.perturbation is None and self.passing.decided is None

    def _rows(self, logits_TE: Tensor) -> Tensor:
        """Float32 logits (B, S, E); of one row if the router was called by itself."""
        num_experts = logits_TE.shape[-1]
        logits_TE = logits_TE.reshape(-1, num_experts).float()
        if self.reading.probabilities:
            logits_TE = self._before_softmax(logits_TE)
        state = self._state(len(logits_TE))
        shape = (1, len(logits_TE)) if state is None else (state.rows, state.length)
        return logits_TE.reshape((*shape, num_experts))

    def after_logits(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the part of the router that says its logits, where the router itself does not."""
        self._said = output

    def _before_softmax(self, probs_TE: Tensor) -> Tensor:
        """The logits behind probabilities; without the part that says them, up to a shift for each token."""
        said, self._said = self._said, None
        if said is None:
            return probs_TE.log()
        logits_TE = said.reshape(probs_TE.shape).float()
        if not torch.allclose(logits_TE.softmax(-1), probs_TE, atol=1e-2):
            raise UserError(
                f"{self.block.name}: the router's probabilities are no longer those of its "
                f"{self.reading.logits_from} (an adapter on it?); put adapters on the router before rerouting"
            )
        return logits_TE

    def _state(self, tokens: int) -> PassState | None:
        """The pass, if it is one of this many tokens."""
        state = self.passing.state
        if state is not None and state.rows * state.length == tokens:
            return state
        if self.live and self._looks_around():
            shape = "unknown shape" if state is None else f"{state.rows} x {state.length} tokens"
            raise UserError(
                f"{self.block.name}: the router was called with {tokens} tokens in a pass of {shape}, so sequences "
                "cannot be told apart; take a rule that decides for each token by itself, such as threshold"
            )
        return None

    def _looks_around(self) -> bool:
        if self.passing.causal or self._untouched():
            return False
        return not all(rule.causal and rule.batch_invariant for rule in (self.router.select, self.router.score))

    def _context(self, tokens: int, device: torch.device) -> Context:
        passing, state, bias = self.passing, self._state(tokens), None
        if self.reading.bias is not None and self.router.score == self.reading.score:
            bias = tensor_at(self.block.parent, self.reading.bias).float().flatten()
        return Context(
            valid_BS=_to(state.valid_BS, device) if state else None,
            causal=passing.causal,
            token_ids_BS=state.token_ids_BS if state else None,
            cutoff_C=_to(passing.cutoff_C, device),
            normaliser_E=_to(passing.normaliser_E, device),
            bias_E=bias,
            decided=passing.decided,
        )

    def _executed(self, output: Any) -> Assignment:
        """The family's own choice; padding, which it routes too, is not recorded."""
        num_experts = self.reading.num_experts
        if self.reading.hands_over == "dense":
            weight_TE = output[0].reshape(-1, num_experts)
            mask_TE = weight_TE > 0
            return Assignment.from_mask(mask_TE & self._valid(mask_TE), weight_TE)
        weight_TK, index_TK = (part.reshape(-1, part.shape[-1]) for part in output[1:])
        mask_TE = torch.zeros(len(index_TK), num_experts, dtype=torch.bool, device=index_TK.device)
        mask_TE = mask_TE.scatter(-1, index_TK, True)
        weight_TE = weight_TK.new_zeros(mask_TE.shape).scatter(-1, index_TK, weight_TK)
        return Assignment.from_mask(mask_TE & self._valid(mask_TE), weight_TE)

    def _valid(self, mask_TE: Tensor) -> Tensor:
        state = self._state(len(mask_TE))
        if state is None or state.valid_BS is None:
            return torch.ones_like(mask_TE[:, :1])
        return state.valid_BS.reshape(-1, 1).to(mask_TE.device)

    def _scaled(self, assignment: Assignment) -> Assignment:
        """With the family's factor of each expert, if it has one."""
        if self.reading.factor is None:
            return assignment
        factor_E = tensor_at(self.block.parent, self.reading.factor).flatten()
        return assignment.with_weights(assignment.weight_P * factor_E[assignment.expert_P].to(assignment.weight_P))

    def _handed_over(self, output: Any, assignment: Assignment) -> Any:
        """The assignment in the form in which the family's router hands over its own."""
        if self.reading.hands_over == "dense":
            return assignment.to_dense().to(output[0].dtype).reshape(output[0].shape), output[1]
        weight_TK, index_TK = to_rectangle(assignment.compact())
        lead = output[2].shape[:-1]
        index_TK = index_TK.to(output[2].dtype).reshape(*lead, -1)
        return output[0], weight_TK.to(output[1].dtype).reshape(*lead, -1), index_TK

    @torch.compiler.disable
    def before_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the experts: one row per chosen pair, unless every place is taken."""
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        _, x, index, weight = list(bound.arguments)[:4]
        x_TD, index_TK, weight_TK = (bound.arguments[name] for name in (x, index, weight))
        taken_TK = index_TK < self.reading.num_experts
        self._flat = None
        if bool(taken_TK.all()):
            return None
        token_P = taken_TK.nonzero()[:, 0]
        expert_P, weight_P = index_TK[taken_TK], weight_TK[taken_TK]
        self._flat = (token_P, len(x_TD))
        if not len(token_P):  # no pair at all: experts need a row, and a weight of zero makes it nothing
            token_P, expert_P = token_P.new_zeros(1), expert_P.new_zeros(1)
            weight_P = weight_P.new_zeros(1)
            self._flat = (token_P, len(x_TD))
        bound.arguments |= {x: x_TD[token_P], index: expert_P[:, None], weight: weight_P[:, None]}
        return bound.args[1:], bound.kwargs

    @torch.compiler.disable
    def after_experts(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the experts: sum the rows of each token, in float32 as a 16-bit sum would lose digits."""
        if self._flat is None:
            return None
        token_P, tokens = self._flat
        self._flat = None
        wide_PD = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        summed_TD = wide_PD.new_zeros(tokens, output.shape[-1]).index_add(0, token_P, wide_PD)
        return summed_TD.to(output.dtype)


def detached(routing: Routing) -> Routing:
    """Without the graph of gradients, which would otherwise live until the next pass."""
    if not (routing.logits_TE.requires_grad or routing.assignment.weight_P.requires_grad):
        return routing
    pairs = routing.assignment.with_weights(routing.assignment.weight_P.detach())
    logits_TE, scores_TE = routing.logits_TE.detach(), routing.scores_TE.detach()
    return replace(routing, logits_TE=logits_TE, scores_TE=scores_TE, assignment=pairs)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
