"""The chosen pairs of a rerouted block straight to our expert compute.

transformers' implementations of the experts want the same number of pairs for every token. A rule that chooses as
many as it likes would have to give each pair a row of its own, gathered before and summed up afterwards, which costs
more than the pairs that it saves. Our own expert compute takes pairs as they are, so where the experts have the plain
layout it stands in for their `forward`, on the instance, until the handle is undone.

Legend: T tokens, E experts, D model width, K most experts of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from crossways.experts.activation import Activation
from crossways.experts.compute import resolve_backend, why_not
from crossways.experts.register import NAME, compute_module, plain_activation
from crossways.rectangle import from_rectangle

Experts = Literal["own", "crossways"]
"""Who computes the chosen pairs: what the model computes its experts by, or our expert compute."""
DEFAULT = "grouped_mm"
"""What transformers computes experts by unless told otherwise."""


class Site(Protocol):
    """What is needed of a rerouted block, where the experts have to run as the family has them."""

    active: bool

    def before_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: one row per pair."""

    def after_experts(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: rows summed up."""


class RaggedExperts:
    """Stands in for the `forward` of one experts module.

    Decides at every call, so that it follows the module to another device or dtype and into adapters, and runs the
    module as the family has it where ours cannot.
    """

    def __init__(self, module: nn.Module, site: Site, asked: bool) -> None:
        """
        Args:
            module: the experts.
            site: the rerouted block.
            asked: whether somebody asked for our expert compute. Otherwise it runs only where it is known to be
                faster, and never instead of an implementation that somebody chose.
        """
        self.module, self.site, self.asked = module, site, asked
        self._plans: dict[tuple[Any, ...], tuple[Activation, str] | str] = {}
        self._names = list(inspect.signature(type(module).forward).parameters)[1:4]

    def install(self) -> str | None:
        """Put it in place; returns the reason if the module's `forward` is not the one of its class any more."""
        name = self._place()
        present = vars(self.module).get(name)
        if present is not None and getattr(present, "__func__", None) is not type(self.module).forward:
            return "its experts' forward was replaced by somebody else"
        setattr(self.module, name, self)
        return None

    def _place(self) -> str:
        """Below accelerate's hooks, which fetch and move weights first."""
        return "_old_forward" if "_hf_hook" in vars(self.module) else "forward"

    def remove(self) -> None:
        """Take it away again, from below accelerate's hooks too."""
        own = vars(self.module)
        if own.get("forward") is self:
            del own["forward"]
        if own.get("_old_forward") is self:
            own["_old_forward"] = MethodType(type(self.module).forward, self.module)

    def plan(self) -> tuple[Activation, str] | str:
        """The activation and the backend to compute by now, or why the family's own compute is left in place.

        Made once for each state of the module, as making it takes longer than the pairs of one token.
        """
        module: Any = self.module
        weight = module.down_proj
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        state = (chosen, device.type, dtype, type(weight), type(module), module.act_fn)
        plan = self._plans.get(state)
        if plan is None:
            plan = self._plans[state] = self._plan(chosen, device, dtype)
        return plan

    def _plan(self, chosen: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Activation, str] | str:
        if not self.asked and chosen not in (None, DEFAULT, NAME):
            return f"the model computes its experts by {chosen!r}"
        activation = plain_activation(self.module)
        if isinstance(activation, str):
            return activation
        if self.asked or chosen == NAME:
            return activation, resolve_backend("auto", device, dtype)
        if device.type != "cpu":
            return f"on {device.type} they are computed by crossways only if asked for"
        return why_not("fused", device, dtype) or (activation, "fused")

    def __getstate__(self) -> dict[str, Any]:
        """Without plans, which belong to this machine."""
        return vars(self) | {"_plans": {}}

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module is called with: x (T, D), indices and weights (T, K) with E in empty places."""
        forward: Callable[..., Tensor] = type(self.module).forward
        if not self.site.active:
            return forward(self.module, *args, **kwargs)
        plan = self.plan()
        if isinstance(plan, str):
            return self._as_the_family(forward, args, kwargs)
        x_TD, index_TK, weight_TK = args if len(args) == 3 else self._arguments(forward, args, kwargs)
        module: Any = self.module
        assignment = from_rectangle(index_TK, weight_TK, module.down_proj.shape[0])
        return compute_module(module, x_TD, assignment, *plan)

    def _arguments(self, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(forward).bind(self.module, *args, **kwargs).arguments
        return [bound[name] for name in self._names]

    def _as_the_family(self, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        args, kwargs = self.site.before_experts(self.module, args, kwargs) or (args, kwargs)
        output = forward(self.module, *args, **kwargs)
        summed = self.site.after_experts(self.module, args, output)
        return output if summed is None else summed


def take_over(module: nn.Module, site: Site, experts: Experts | None) -> tuple[RaggedExperts | None, str]:
    """Let our expert compute stand in where that is possible.

    Args:
        module: the experts.
        site: the rerouted block.
        experts: who shall compute; None is ours where it is known to be faster.

    Returns:
        What stands in for the module's `forward`, None where nothing can; and in words who computes.
    """
    if experts == "own":
        return None, ""
    ragged = RaggedExperts(module, site, asked=experts == NAME)
    activation = plain_activation(module)
    reason = activation if isinstance(activation, str) else ragged.install()
    if reason is not None:
        return None, f"experts by transformers: {reason}"
    plan = ragged.plan()
    who = f"transformers: {plan}" if isinstance(plan, str) else f"crossways ({plan[1]})"
    return ragged, f"experts by {who}"
