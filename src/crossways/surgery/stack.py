"""One stack of layers of a rerouted model, and what its blocks must know of each of its passes.

Most models have one; a model that encodes and decodes has two, each with its own passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crossways.surgery.copying import copy_with
from crossways.surgery.pass_state import BlockPass, read_pass
from crossways.surgery.site import RoutedBlock

if TYPE_CHECKING:
    from crossways.surgery.handle import Handle


class Stack:
    """The hooks on a module that is called with embeddings or ids and an attention mask."""

    def __init__(self, handle: Handle, module: nn.Module, blocks: Sequence[RoutedBlock]) -> None:
        """
        Args:
            handle: of the model; says when to route by the decode twins.
            module: the stack.
            blocks: the routed blocks in it.
        """
        self.handle, self.module, self.blocks = handle, module, list(blocks)
        self.both_ways = _looks_both_ways(module)
        self._training = False
        self._checkpointed: dict[nn.Module, Any] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = read_pass(module.forward, args, kwargs)
        decoding = state is not None and state.decoding and not self.both_ways
        causal = self.handle.causal_now(decoding)
        self._training = module.training and torch.is_grad_enabled()
        replayed = self.handle.decided_now(None if state is None else state.token_ids_BS)
        for block, decided in zip(self.blocks, replayed, strict=False):
            by_twin = causal and not (self.both_ways and block.own_to_each_row)
            block.begin(state, causal=by_twin, decided=decided)
        self._remember(module)

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a training pass the estimates follow the batch, once: recomputation does not come by here."""
        for block in self.blocks:
            block.end()
            if self._training and output is not None and block.routing is not None:
                block.router.observe(block.routing)
        for layer, function in self._checkpointed.items():
            layer._gradient_checkpointing_func = function
        self._checkpointed = {}

    def _remember(self, module: nn.Module) -> None:
        """For the length of a pass, let layers that are computed again in the backward pass find this one's state
        then, whatever was run in between."""
        if not self._training:
            return
        for layer in module.modules():
            if getattr(layer, "gradient_checkpointing", False) and "_gradient_checkpointing_func" in vars(layer):
                self._checkpointed[layer] = function = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = Repeating(self.blocks, function)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_checkpointed": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return copy_with(self, self.handle.model, memo)


class Repeating:
    """A checkpointing function whose layers decide by the state of their own pass when they are repeated."""

    def __init__(self, blocks: Sequence[RoutedBlock], function: Any) -> None:
        self.blocks, self.function = blocks, function

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        then = [block.passing for block in self.blocks]

        def as_then(*args: Any, **kwargs: Any) -> Any:
            now = [block.passing for block in self.blocks]
            self._set(then)
            try:
                return layer(*args, **kwargs)
            finally:
                self._set(now)

        return self.function(as_then, *args, **kwargs)

    def _set(self, passes: Sequence[BlockPass]) -> None:
        for block, passing in zip(self.blocks, passes, strict=True):
            block.passing = passing


def _looks_both_ways(module: nn.Module) -> bool:
    """Whether attention in it sees later tokens too, by what attention modules say of themselves. Then a rule that
    looks at the whole sequence sees no more than they do, and generation needs a twin only against other rows."""
    said = [vars(part).get("is_causal") for part in module.modules()]
    return False in said and True not in said
