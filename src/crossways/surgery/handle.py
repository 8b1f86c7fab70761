"""The handle of a rerouted model: what was changed, and how to take it back.

Legend: E experts, C cutoffs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.routing import Decided, Replay
from crossways.surgery import trainer_checkpoint
from crossways.surgery.copying import copy_with
from crossways.surgery.rule import Rule
from crossways.surgery.site import RoutedBlock
from crossways.surgery.site_router import SiteRouter
from crossways.surgery.stack import Stack

CONFIG_KEY = "crossways_routing"
"""Under which the rule travels in a model's configuration."""
ATTRIBUTE = "crossways_handle"
"""Under which a rerouted model holds its handle."""
UNCHANGED = "unchanged"
"""What a block that routes as before says instead of a rule."""
ESTIMATES = ("cutoff", "normaliser")


@dataclass(frozen=True)
class Change:
    """What was changed at one block."""

    block: str
    """Path of the block in the model."""
    before: str
    """How the family routes."""
    after: str
    """How it routes now."""
    note: str = ""
    """What else there is to know."""


class Handle:
    """A rerouted model. Ends with `undo`, or as a context manager.

    `always_causal` makes every pass route by the decode twins, not only generation; `replay` says what to execute
    while decisions are replayed (`crossways.replay`).

    Nothing of the model's class, code or weights is changed: there are hooks on it, three attributes of the instance
    (`generate` and `save_pretrained`, wrapped, and the handle), an entry of its configuration, and where experts
    would compute every token, something in the place of their instance's `forward`.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        stacks: Sequence[tuple[nn.Module, Sequence[RoutedBlock]]],
        changes: list[Change],
        left: Sequence[Change] = (),
    ) -> None:
        """
        Args:
            model: is rerouted.
            rule: by which.
            stacks: every module that is called with ids or embeddings and a mask, with the routed blocks in it.
            changes: what was changed, block by block.
            left: which blocks were left alone, and why.
        """
        self.model, self.rule, self.changes, self.left = model, rule, changes, list(left)
        self.blocks = [block for _, blocks in stacks for block in blocks]
        self.active = True
        self.always_causal = False
        self.replay: Replay | None = None
        self._causal: bool | None = None
        for block in self.blocks:
            block.model = model
        self._loading = model.register_load_state_dict_pre_hook(self._take_up)
        self.stacks = [Stack(self, module, blocks) for module, blocks in stacks]
        if hasattr(type(model), "generate"):
            model.generate = CausalGenerate(self)  # type: ignore[assignment]
        if hasattr(type(model), "save_pretrained"):
            model.save_pretrained = SaveWithRule(self)  # type: ignore[assignment]
        setattr(model, ATTRIBUTE, self)
        self.write_config()

    @property
    def routers(self) -> dict[str, SiteRouter]:
        """What decides now, by the path of the block."""
        return {block.block.name or "block": block.router for block in self.blocks}

    @property
    def decoder(self) -> nn.Module:
        """The stack that says the output: the last one."""
        return self.stacks[-1].module

    @property
    def leaky(self) -> bool:
        """Whether a token's experts depend on later tokens or on other rows, but in generation."""
        return not self.always_causal and any(
            not (rule.causal and rule.batch_invariant)
            for block in self.blocks
            for rule in (block.router.select, block.router.score)
        )

    def undo(self) -> None:
        """Take everything back: the model is what it was, bit for bit. Twice does nothing more."""
        if not self.active:
            return
        self.active = False
        for block in self.blocks:
            block.remove()
        for stack in self.stacks:
            stack.remove()
        self._loading.remove()
        for name in ("generate", "save_pretrained", ATTRIBUTE):
            vars(self.model).pop(name, None)
        config = getattr(self.model, "config", None)
        if config is not None:
            vars(config).pop(CONFIG_KEY, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    @contextmanager
    def causal(self, on: bool = True) -> Iterator[None]:
        """Route by the decode twins while the context lasts, as `generate` does; with `on` false, by the rule itself
        even there."""
        before, self._causal = self._causal, on
        try:
            yield
        finally:
            self._causal = before

    def write_config(self) -> None:
        """Bring the configuration up to date, estimates of decode twins included."""
        config = getattr(self.model, "config", None)
        if config is not None:
            setattr(config, CONFIG_KEY, {"rule": self.rule.to_json(), "estimates": self.estimates()})

    def estimates(self) -> list[dict[str, list[float]]]:
        """What each router's decode twin needs and knows, as plain numbers; empty where nothing is known."""
        known = []
        for block in self.blocks:
            buffers = {name: block.router.snapshot(name) for name in ESTIMATES}
            known.append({n: b.tolist() for n, b in buffers.items() if b is not None and not b.isnan().any()})
        return known

    def set_estimates(self, known: Sequence[dict[str, list[float]]]) -> None:
        """The reverse of `estimates`.

        Raises:
            UserError: if they are those of another model.
        """
        if len(known) != len(self.blocks):
            raise UserError(f"estimates of {len(known)} routers were given for a model with {len(self.blocks)}")
        for block, values in zip(self.blocks, known, strict=True):
            for name, numbers in values.items():
                buffer = block.router._buffers.get(name)
                if buffer is None or buffer.numel() != len(numbers):
                    raise UserError(f"{block.block.name}: the rule has no {name} of {len(numbers)} numbers")
                buffer.copy_(torch.tensor(numbers))
        self.write_config()

    def _take_up(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before weights are loaded: the estimates that `SaveWithRule` put beside them, if any."""
        if (packed := state_dict.pop(prefix + trainer_checkpoint.KEY, None)) is not None:
            self.set_estimates(trainer_checkpoint.from_tensor(packed))

    def table(self) -> Table:
        """The changes, for a terminal."""
        table = Table(title=f"{type(self.model).__name__}: {len(self.blocks)} blocks", title_justify="left")
        for name in ("block", "before", "now", "note"):
            table.add_column(name)
        for change in (*self.changes, *self.left):
            table.add_row(change.block, change.before, change.after, change.note)
        return table

    def describe(self) -> str:
        """The rule on one line; of the first block, if their budgets differ."""
        words = dict.fromkeys(c.before if c.after == UNCHANGED else c.after for c in self.changes)
        first = next(iter(words))
        return (
            first if len(words) == 1 else f"{first} in the first of {len(self.blocks)} layers, others in the others"
        )

    def __repr__(self) -> str:
        state = "" if self.active else ", undone"
        first = self.changes[0]
        return f"<{type(self.model).__name__}, {len(self.blocks)} blocks: {first.before} -> {first.after}{state}>"

    def causal_now(self, decoding: bool) -> bool:
        """Whether a pass is routed by the decode twins.

        Args:
            decoding: whether a cache holds earlier tokens.
        """
        return self.always_causal or (decoding if self._causal is None else self._causal)

    def decided_now(self, ids_BS: Tensor | None) -> Iterable[Decided | None]:
        """What each block is to execute in a pass, while decisions are replayed.

        Raises:
            UserError: for a model of several stacks, whose passes need not come in the order of the recorded ones.
        """
        if self.replay is None:
            return repeat(None)
        if len(self.stacks) > 1:
            raise UserError(
                f"{type(self.model).__name__} has {len(self.stacks)} stacks, whose passes need not come in the order "
                "of the recorded ones: decisions cannot be replayed; record and replay one stack, such as its encoder"
            )
        return self.replay(ids_BS)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"replay": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return copy_with(self, self.model, memo)

    def loads(self) -> list[Tensor]:
        """Pairs of each expert in the last pass, int64 (E,), for each router."""
        return [block.routing.assignment.load_E() for block in self.blocks if block.routing is not None]


class CausalGenerate:
    """`generate` under the decode twins."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.handle.model
        with self.handle.causal(on=self.handle._causal is not False):
            return type(model).generate(model, *args, **kwargs)


class SaveWithRule:
    """`save_pretrained` with the estimates as they are now; where `Trainer` saves, in a form that it can resume."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        self.handle.write_config()
        model: Any = self.handle.model
        if trainer_checkpoint.is_trainers(save_directory):
            kwargs |= trainer_checkpoint.settings(model, self.handle.estimates(), kwargs)
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a rerouted model, also through wrappers such as adapters; None for any other."""
    for module in model.modules():
        handle = vars(module).get(ATTRIBUTE)
        if isinstance(handle, Handle):
            return handle
    return None
