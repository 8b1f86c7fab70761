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
from typing import Any

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.routing import Context, Decided, Routing
from crossways.surgery.copying import copy_with
from crossways.surgery.dense_experts import ChosenOnly
from crossways.surgery.family_weights import balancing_bias, scaled, shared_logits, shared_weights
from crossways.surgery.find import Block
from crossways.surgery.forms import chosen_in, handed_over, logits_behind, logits_in
from crossways.surgery.pair_rows import PairRows, one_row_per_pair
from crossways.surgery.pass_state import BlockPass, PassState
from crossways.surgery.ragged import Experts, RaggedExperts, take_over
from crossways.surgery.reading import Reading
from crossways.surgery.site_router import SiteRouter, detached


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
        self._given: PairRows | None = None
        self._said: Tensor | None = None
        self._handles = [block.router.register_forward_hook(self.after_router)]
        if reading.logits_from is not None:
            source = block.router.get_submodule(reading.logits_from)
            self._handles.append(source.register_forward_hook(self.after_logits))
        self._chosen_only = ChosenOnly(block.experts) if reading.hands_over == "dense" else None
        self.ragged: RaggedExperts | None = None
        self.computed_by = ""
        if not own and (reading.hands_over != "pairs" or self._filler is not None):
            self.computed_by = "experts by transformers: they are not handed plain pairs"
        elif not own:
            self.ragged, self.computed_by = take_over(block.experts, self, experts)
        if reading.hands_over in ("pairs", "late") and self.ragged is None:
            self._handles += [
                block.experts.register_forward_pre_hook(self.before_experts, with_kwargs=True),
                block.experts.register_forward_hook(self.after_experts),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        self.active = False
        for handle in self._handles:
            handle.remove()
        if self._chosen_only is not None:
            self._chosen_only.remove()
        if self.ragged is not None:
            self.ragged.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a pass, which may hold a graph of gradients."""
        return vars(self) | {
            "passing": BlockPass(),
            "live": False,
            "routing": None,
            "_given": None,
            "_said": None,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedBlock:
        return copy_with(self, self.model, memo)

    @property
    def _filler(self) -> int | None:
        """An expert that computes nothing and that the experts know, for places that nobody wants."""
        return self.reading.num_experts - 1 if self.reading.free and not self.reading.skips else None

    @property
    def own_to_each_row(self) -> bool:
        """Whether the rule decides for each row of the batch by itself."""
        return self.router.select.batch_invariant and self.router.score.batch_invariant

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
        if self.reading.hands_over == "late":  # the choice is made of it afterwards, in the block
            self._said = output
            return output
        return self._rerouted(output, module.training, args[:1])

    def _rerouted(self, output: Any, training: bool, given: tuple[Tensor, ...]) -> Any:
        """What the family's router returned, with another choice in it.

        Args:
            output: of the router.
            training: whether it is in training.
            given: what the router was called with, hidden states first.
        """
        reading = self.reading
        logits_TE = logits_in(output, reading.hands_over)
        self.router.follow(logits_TE.device, training=training)
        untouched = self._untouched()
        state = self._state(logits_TE.numel() // logits_TE.shape[-1])
        packing = None if state is None else state.packing
        beside = shared_logits(self.block, reading, given[0], packing) if reading.shared and not untouched else None
        self.router.beside = beside
        with self.router.repeating(self._executed(output)) if untouched else nullcontext():
            logits_BSE = self._rows(logits_TE, state)
            routing = self.router(logits_BSE, self._context(state, logits_BSE.device))
        if self.live:
            self.routing = detached(routing)
        if untouched:
            return output
        self.router.beside = None
        pairs = routing.assignment if packing is None else packing.gather_pairs(routing.assignment)
        if self._chosen_only is not None:
            self._chosen_only.assignment = pairs
        return handed_over(
            output,
            reading.hands_over,
            scaled(self.block, reading, pairs),
            skips=reading.skips,
            filler=self._filler,
            shared_TN=None if beside is None else shared_weights(self.block, reading, beside, packing),
        )

    def _untouched(self) -> bool:
        """Whether the family's own decision stands."""
        return self.own and self.router.perturbation is None and self.passing.decided is None

    def _rows(self, logits_TE: Tensor, state: PassState | None) -> Tensor:
        """Float32 logits (B, S, E); of one row if the router was called by itself."""
        num_experts = logits_TE.shape[-1]
        logits_TE = logits_TE.reshape(-1, num_experts).float()
        if self.reading.probabilities:
            said, self._said = self._said, None
            logits_TE = logits_behind(logits_TE, said, f"{self.block.name}'s {self.reading.logits_from}")
        shape = (1, len(logits_TE)) if state is None else (state.rows, state.length)
        if state is not None and state.packing is not None:
            logits_TE = state.packing.spread(logits_TE)
        return logits_TE.reshape((*shape, num_experts))

    def after_logits(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the part of the router that says its logits, where the router itself does not."""
        self._said = output

    def _state(self, tokens: int) -> PassState | None:
        """The pass, if it is one of this many tokens."""
        state = self.passing.state
        if state is not None and state.tokens == tokens:
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

    def _context(self, state: PassState | None, device: torch.device) -> Context:
        passing, of_family = self.passing, self.router.score == self.reading.score
        return Context(
            valid_BS=_to(state.valid_BS, device) if state else None,
            causal=passing.causal,
            token_ids_BS=state.token_ids_BS if state else None,
            cutoff_C=_to(passing.cutoff_C, device),
            normaliser_E=_to(passing.normaliser_E, device),
            bias_E=balancing_bias(self.block, self.reading) if of_family else None,
            decided=passing.decided,
        )

    def _executed(self, output: Any) -> Assignment:
        """The family's own choice; padding, which it routes too, is not recorded."""
        reading = self.reading
        mask_TE, weight_TE = chosen_in(output, reading.hands_over, reading.num_experts, skips=reading.skips)
        state = self._state(len(mask_TE))
        if state is not None and state.packing is not None:  # every token is one of a sequence
            return state.packing.spread_pairs(Assignment.from_mask(mask_TE, weight_TE))
        if state is not None and state.valid_BS is not None:
            mask_TE = mask_TE & state.valid_BS.reshape(-1, 1).to(mask_TE.device)
        return Assignment.from_mask(mask_TE, weight_TE)

    @torch.compiler.disable
    def before_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the experts: one row per chosen pair, unless every place is taken."""
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        _, x, index, weight = list(bound.arguments)[:4]
        x_TD, index_TK, weight_TK = (bound.arguments[name] for name in (x, index, weight))
        if self.reading.hands_over == "late":
            said, self._said = self._said, None
            _, weight_TK, index_TK = self._rerouted((said, weight_TK, index_TK), module.training, (x_TD,))
            bound.arguments |= {index: index_TK, weight: weight_TK}
        rows = one_row_per_pair(x_TD, index_TK, weight_TK, self.reading.num_places)
        self._given = None
        if rows is not None:
            self._given, x_PD, expert_P, weight_P = rows
            bound.arguments |= {x: x_PD, index: expert_P, weight: weight_P}
        return bound.args[1:], bound.kwargs

    @torch.compiler.disable
    def after_experts(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the experts: the rows of each token summed up."""
        rows, self._given = self._given, None
        return None if rows is None else rows.summed(output)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
