"""Find the routed blocks of a model that somebody else wrote.

transformers' families share one shape: a module with the weights of all experts in one tensor each, and beside it a
router that is called first. Nothing here knows a family by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from crossways.errors import UserError
from crossways.router import Router


class UnknownRoutingError(UserError):
    """A model whose routing is not understood well enough to be changed."""


class FixedChoiceError(UnknownRoutingError):
    """A router whose choice cannot be another one, since it follows from something else than its scores, such as the
    token, or since what comes after needs just as many: there is no rule to change."""


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
    """The path of the experts in the parent; empty where the parent itself holds them."""
    experts: nn.Module

    @property
    def num_experts(self) -> int:
        """E, by what the experts themselves hold; those that compute nothing may have a place in one of the
        weights."""
        stacked = [p.shape[0] for p in self.experts._parameters.values() if p is not None and p.dim() == 3]
        stacked += [weight.shape[0] for weight in _projections(self.experts)]
        return max(stacked, default=0) or int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def num_computing(self) -> int:
        """Those of them that compute something: the first ones, with a down projection."""
        down = self.experts._parameters.get("down_proj")
        return self.num_experts if down is None or down.dim() != 3 else down.shape[0]

    def __str__(self) -> str:
        return f"{self.name}.{self.router_name} ({type(self.router).__name__})"


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
        raise UnknownRoutingError(_why_none(model, modules))
    return _routed(blocks)


def _routed(blocks: list[Block]) -> list[Block]:
    """Of several stacks beside one router, the one that is told most: shared experts may be stacked too, but are not
    told whom they serve."""
    best: dict[int, Block] = {}
    for block in blocks:
        other = best.get(id(block.router))
        if other is None or _arguments(other) < _arguments(block):
            best[id(block.router)] = block
    return list(best.values())


def _arguments(block: Block) -> int:
    return len(inspect.signature(type(block.experts).forward).parameters)


def _why_none(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """What stands in the way, where there is something that looks routed."""
    kind = type(model).__name__
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and re.search(r"(Experts|Moe)$", type(module).__name__):
            return (
                f"{kind} keeps its experts as modules of their own ({name}, {type(module).__name__}), not as stacked "
                "weights; only those can be handed single pairs"
            )
        if isinstance(module, FullyShardedDataParallel):
            return (
                f"{kind}: {name or 'it'} holds its weights flattened and spread over devices "
                "(FullyShardedDataParallel); take fully_shard (FSDP2)"
            )
    routed = next((name for name, module in modules.items() if type(module).__name__.endswith(("MoE", "Moe"))), None)
    if routed is not None:
        return (
            f"{kind} keeps the experts of {routed} ({type(modules[routed]).__name__}) in another form than stacked "
            "projections beside a router, so single pairs cannot be handed to them"
        )
    return (
        f"{kind} has no module with stacked expert weights (a three-dimensional `down_proj`), so there is no routing "
        "to change"
    )


def language_blocks(model: nn.Module, blocks: list[Block]) -> list[Block]:
    """Those that route text, where a wrapper holds routed encoders of images or sound as well: the blocks inside what
    transformers calls the model's decoder, and inside another module that is called with token ids and does not hold
    that, as an encoder of text. All of them if there are none."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    modules = dict(model.named_modules())
    path = next((name for name, module in modules.items() if module is decoder), "")
    inside = set(modules[path].modules())
    for name, module in modules.items():
        holds_decoder = f"{path}.".startswith(f"{name}.") or not name
        if not holds_decoder and "input_ids" in inspect.signature(module.forward).parameters:
            inside |= set(module.modules())
    return [block for block in blocks if block.experts in inside] or blocks


def has_stacked_experts(module: nn.Module) -> bool:
    """Whether the module itself holds the projections of several experts, all of one kind in one tensor: with a
    dimension for the experts, in a module for each kind, or row under row."""
    own = module._parameters
    if _three_dimensional(own, "down_proj") and any(
        _three_dimensional(own, name) for name in ("gate_up_proj", "up_proj")
    ):
        return True
    return len(_projections(module)) > 1 or _row_under_row(module)


def _projections(module: nn.Module) -> list[nn.Parameter]:
    """Weights of children that are one stacked projection each, beside a router."""
    if not any(_is_router(name, child) for name, child in module.named_children()):
        return []
    stacked = [
        child.get_parameter("weight")
        for child in module.children()
        if _three_dimensional(child._parameters, "weight")
    ]
    return stacked if len({weight.shape[0] for weight in stacked}) == 1 else []


def _row_under_row(module: nn.Module) -> bool:
    """Whether experts are blocks of rows of matrices, as many in each as the module says it has experts."""
    num_experts = vars(module).get("num_experts")
    if not isinstance(num_experts, int) or num_experts < 2 or not type(module).__name__.endswith("Experts"):
        return False
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    weights = list(module.parameters())
    return len(weights) > 1 and all(
        weight.dim() == 2 and weight.shape[0] > num_experts and weight.shape[0] % num_experts == 0
        for weight in weights
    )


def _three_dimensional(parameters: dict[str, nn.Parameter | None], name: str) -> bool:
    tensor = parameters.get(name)
    return isinstance(tensor, Tensor) and tensor.dim() == 3


def _block(modules: dict[str, nn.Module], experts_path: str) -> Block:
    """The block of some experts; adapters may stand between them and the block's own module."""
    if _projections(modules[experts_path]):
        ((name, router),) = _routers_in(modules[experts_path])
        return Block(experts_path, modules[experts_path], name, router, "", modules[experts_path])
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
        if _is_router(name, child):
            yield name, child


def _is_router(name: str, module: nn.Module) -> bool:
    return name in ("gate", "router") or bool(re.search(r"(Router|Gate|Gating)$", type(module).__name__))
