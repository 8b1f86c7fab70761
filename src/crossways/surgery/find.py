"""Find the routed blocks of a model that somebody else wrote.

transformers' families share one shape: a module with stacked (three-dimensional) expert weights, and beside it a
router that is called first. Nothing here knows a family by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from crossways.errors import UserError
from crossways.router import Router


class UnknownRoutingError(UserError):
    """A model whose routing is not understood well enough to be changed."""


class FixedChoiceError(UnknownRoutingError):
    """A router that chooses by something else than its scores, such as the token: there is no rule to change."""


@dataclass(frozen=True, eq=False)
class Block:
    """A router and the experts it routes to, in their parent module."""

    name: str
    """Dotted path of the parent in the model."""
    parent: nn.Module
    router_name: str
    """The router's path in the parent."""
    router: nn.Module
    experts_name: str
    """The path of the experts in the parent."""
    experts: nn.Module

    @property
    def num_experts(self) -> int:
        """E, by the experts' own weights."""
        return self.experts.get_parameter("down_proj").shape[0]


def find_blocks(model: nn.Module) -> list[Block]:
    """Every routed block, in the order in which modules are registered, which is that of a forward pass.

    Raises:
        UnknownRoutingError: for a model without stacked experts, or experts without exactly one router beside them.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, Router) for module in modules.values()):
        raise UnknownRoutingError(
            f"{type(model).__name__} routes by crossways already: choose its rule in its configuration (`score`, "
            "`select`), or load its weights into a model with another one"
        )
    blocks = [_block(modules, name) for name, module in modules.items() if has_stacked_experts(module)]
    if not blocks:
        raise UnknownRoutingError(
            f"{type(model).__name__} has no module with stacked expert weights (a three-dimensional `down_proj`), so "
            "there is no routing to change"
        )
    return blocks


def language_blocks(model: nn.Module, blocks: list[Block]) -> list[Block]:
    """Those that route text, where a wrapper holds routed encoders of images or sound as well: the blocks inside what
    transformers calls the model's decoder. All of them if that holds none."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    return [block for block in blocks if block.experts in inside] or blocks


def has_stacked_experts(module: nn.Module) -> bool:
    """Whether the module itself holds the up and down projections of several experts."""
    own = module._parameters
    return _three_dimensional(own, "down_proj") and any(
        _three_dimensional(own, name) for name in ("gate_up_proj", "up_proj")
    )


def _three_dimensional(parameters: dict[str, nn.Parameter | None], name: str) -> bool:
    tensor = parameters.get(name)
    return isinstance(tensor, Tensor) and tensor.dim() == 3


def _block(modules: dict[str, nn.Module], experts_path: str) -> Block:
    """The block of some experts; adapters may stand between them and the block's own module."""
    path = experts_path
    while path:
        path = path.rpartition(".")[0]
        parent = modules[path]
        routers = list(_routers_in(parent))
        if len(routers) == 1:
            name, router = routers[0]
            return Block(path, parent, name, router, experts_path[len(path) :].lstrip("."), modules[experts_path])
        if routers or not isinstance(parent, nn.Module) or path.count(".") < experts_path.count(".") - 2:
            break
    raise UnknownRoutingError(
        f"{experts_path}: found no single router beside these experts, but {[name for name, _ in routers] or 'none'}"
    )


def _routers_in(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in parent.named_children():
        if has_stacked_experts(child):
            continue
        if name in ("gate", "router") or re.search(r"(Router|Gate|Gating)$", type(child).__name__):
            yield name, child
