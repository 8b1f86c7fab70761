"""Ask a copy of a router what it does.

A float32 copy gets random weights and random inputs. What comes out is put into one shape, whatever the family's own.
Where a router returns logits alone, a copy of the block around it is asked, with experts that only listen.

Legend: T tokens, D model width, E experts, K experts per token, P chosen pairs, N any width.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.surgery.find import Block, FixedChoiceError, UnknownRoutingError
from crossways.surgery.forms import Form, chosen_in, logits_in
from crossways.surgery.reading import tensor_at

TOKENS = 96


@dataclass(frozen=True)
class Answer:
    """What the copy of a router said. Paths are from the block."""

    x_TD: Tensor
    """What it was given."""
    form: Form
    """How it handed over its choice."""
    logits_TE: Tensor
    weight_TK: Tensor
    index_TK: Tensor
    skips: bool
    """Whether it knows one class more than there are experts; such a choice has the last index and weight zero."""
    further: tuple[Tensor, ...]
    """What it returned beside these, each (T, N)."""
    tensors: dict[str, Tensor]
    """Its parameters and buffers, and what the block gave it."""
    inside: dict[str, Tensor]
    """What its own parts said, (T, E), by their path from the router."""
    again: Callable[[str, Tensor], Answer] = field(repr=False)
    """Asks once more, with other numbers at a path."""

    @property
    def per_expert(self) -> dict[str, Tensor]:
        """Every E numbers in reach."""
        return {path: t.flatten() for path, t in self.tensors.items() if t.numel() == self.logits_TE.shape[-1]}

    @property
    def single(self) -> dict[str, Tensor]:
        """Every one number in reach."""
        return {path: t.flatten() for path, t in self.tensors.items() if t.numel() == 1}


def ask(block: Block, seed: int) -> Answer:
    """What a copy of the block's router says, with random numbers drawn from the seed.

    Raises:
        FixedChoiceError: for a router whose choice cannot be changed.
        UnknownRoutingError: for one that cannot be asked, or whose answer has no known shape.
    """
    _refuse_without_forward(block)
    twin = _randomised(block.router, seed)
    return _first_answer(block, twin, _extra_arguments(block, seed), seed)


def _first_answer(block: Block, twin: nn.Module, extra: dict[str, Tensor], seed: int) -> Answer:
    """By the first input that the router takes."""
    problem: Exception | None = None
    for x in _inputs(twin, seed):
        try:
            with torch.no_grad(), _listening(twin, block.num_experts) as inside:
                said = twin(x, **extra)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            problem = error
            continue
        if isinstance(said, Tensor) and said.shape[-1] == block.num_experts:
            return _ask_block(block, x, seed)
        return _answer(block, _Asked(twin, f"{block.router_name}.", extra, x), said, inside)
    raise UnknownRoutingError(f"{block.name}.{block.router_name}: cannot be called on its own: {problem}")


@dataclass
class _Asked:
    """What was asked, and with what."""

    twin: nn.Module
    prefix: str
    """Path of the twin's original, from the block."""
    extra: dict[str, Tensor]
    x: Tensor

    def tensors(self) -> dict[str, Tensor]:
        named = [*self.twin.named_parameters(), *self.twin.named_buffers()]
        return {self.prefix + name: tensor.detach().clone() for name, tensor in named} | self.extra

    def put(self, path: str, values: Tensor) -> None:
        target = self.extra[path] if path in self.extra else tensor_at(self.twin, path.removeprefix(self.prefix))
        with torch.no_grad():
            target.copy_(values.reshape(target.shape))


class _Deaf(nn.Module):
    """Stands where experts were: remembers what it was given and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[Any, ...] = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros shaped as x."""
        self.given = (*args, *kwargs.values())
        return torch.zeros_like(x)


def _ask_block(block: Block, x_TD: Tensor, seed: int) -> Answer:
    """For a router that returns logits alone: what the block makes of them on the way to the experts."""
    deaf = _Deaf()
    twin = _randomised(block.parent, seed, {id(block.experts): deaf})
    x = x_TD.reshape(1, TOKENS, -1)
    logits: list[Tensor] = []
    twin.get_submodule(block.router_name).register_forward_hook(lambda _, args, said: logits.append(said))
    with torch.no_grad():
        twin(x)
    tensors = [given for given in deaf.given if isinstance(given, Tensor)]
    weights = [given for given in tensors if given.is_floating_point()]
    indices = [given for given in tensors if not given.is_floating_point()]
    if len(weights) != 1 or len(indices) != 1 or weights[0].shape != indices[0].shape:
        raise UnknownRoutingError(
            f"{block}: returns logits alone, and the block does not make one tensor of weights and one of indices of "
            f"them for its experts, but hands over {[tuple(each.shape) for each in tensors]}"
        )
    return _answer(block, _Asked(twin, "", {}, x), (logits[-1], weights[0], indices[0]), {}, late=True)


def _refuse_without_forward(block: Block) -> None:
    """Experts whose block is no layer: what was chosen becomes part of something else, as heads of an attention."""
    if block.experts_name:
        return
    stacks = {id(child): _Deaf() for child in block.parent.children() if child is not block.router}
    twin = _randomised(block.parent, 0, stacks)
    width = next(p.shape[-1] for p in twin.parameters() if p.dim() == 2)
    try:
        with torch.no_grad():
            twin(torch.zeros(1, 2, width))
    except NotImplementedError:
        raise FixedChoiceError(
            f"{block} serves a block that is no layer by itself ({type(block.parent).__name__}): what it chooses "
            "becomes part of something else, such as the heads of an attention, which has room for just as many"
        ) from None
    except (RuntimeError, ValueError, IndexError, TypeError):  # the experts were taken out; it has a forward pass
        return


def _randomised(module: nn.Module, seed: int, instead: dict[int, Any] | None = None) -> nn.Module:
    """A copy on the CPU in float32, without hooks, its parameters random: all-zero weights would tell nothing. Of the
    weights it takes the shapes alone, which are whole even where the weights are spread over devices.

    Args:
        module: is copied.
        seed: of the numbers.
        instead: what to put in the place of its parts, by their `id`.
    """
    memo: dict[int, Any] = dict(instead or {})
    memo |= {id(p): nn.Parameter(torch.empty(p.shape), requires_grad=False) for p in module.parameters()}
    twin = copy.deepcopy(module, memo)
    remove_hook_from_module(twin, recurse=True)  # accelerate's would fetch the weights again
    twin = twin.to_empty(device="cpu").float().eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(2 * seed)
    with torch.no_grad():
        for tensor in itertools.chain(twin.parameters(), twin.buffers()):
            if tensor.is_floating_point():
                _fill(tensor, generator)
            else:
                tensor.zero_()
    return twin


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.dim() >= 2:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.5 / tensor.shape[-1] ** 0.5)
    else:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.2)


def _extra_arguments(block: Block, seed: int) -> dict[str, Tensor]:
    """What the block hands its router beside hidden states: tensors of its own, by the argument's name."""
    generator = torch.Generator().manual_seed(2 * seed + 1)
    extra = {}
    for name in list(inspect.signature(block.router.forward).parameters)[1:]:
        given = getattr(block.parent, name, None)
        if isinstance(given, Tensor):
            extra[name] = torch.empty(given.shape)
            _fill(extra[name], generator)
    return extra


@contextmanager
def _listening(twin: nn.Module, num_experts: int) -> Iterator[dict[str, Tensor]]:
    """What submodules say in the context, if it has E columns."""
    heard: dict[str, Tensor] = {}

    def listen(path: str, said: Any) -> None:
        if isinstance(said, Tensor) and said.shape[-1:] == (num_experts,):
            heard[path] = said.detach().reshape(-1, num_experts).float()

    with ExitStack() as stack:
        for path, module in twin.named_modules():
            if path:
                hook = module.register_forward_hook(lambda _, args, said, path=path: listen(path, said))
                stack.callback(hook.remove)
        yield heard


def _inputs(twin: nn.Module, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed + 2)
    widths = [p.shape[-1] for p in twin.parameters() if p.dim() == 2]
    for width in dict.fromkeys(widths):
        x_TD = torch.randn(TOKENS, width, generator=generator)
        yield x_TD
        yield x_TD[None]


def _answer(block: Block, asked: _Asked, said: Any, inside: dict[str, Tensor], *, late: bool = False) -> Answer:
    """What was said, in one shape.

    Raises:
        UnknownRoutingError: if it has no known one.
    """
    form: Form = "late" if late else _form(block, said)
    logits_TE = logits_in(said, form)
    classes = logits_TE.shape[-1]
    logits_TE = logits_TE.reshape(-1, classes).float()
    skips = form == "pairs" and classes == block.num_experts + 1
    if form in ("dense", "sorted"):
        mask_TE, weight_TE = chosen_in(said, form, classes)
        count_T = mask_TE.sum(-1)
        if not bool((count_T == count_T[0]).all()):
            raise UnknownRoutingError(f"{block}: gives tokens {count_T.unique().tolist()} experts, not all as many")
        index_TK = weight_TE.topk(int(count_T[0])).indices
        weight_TK = weight_TE.gather(-1, index_TK)
    else:
        weight_TK, index_TK = (part.reshape(-1, part.shape[-1]) for part in said[1:3])
        index_TK = index_TK.masked_fill(weight_TK == 0, classes - 1) if skips else index_TK

    def again(path: str, values: Tensor) -> Answer:
        asked.put(path, values)
        with torch.no_grad():
            return _answer(block, asked, asked.twin(asked.x, **asked.extra), {})

    further = () if form in ("dense", "sorted") else tuple(said[3:])
    return Answer(
        x_TD=asked.x.reshape(TOKENS, -1),
        form=form,
        logits_TE=logits_TE,
        weight_TK=weight_TK.float(),
        index_TK=index_TK.long(),
        skips=skips,
        further=tuple(part.reshape(TOKENS, -1).float() for part in further),
        tensors=asked.tensors(),
        inside=inside,
        again=again,
    )


def _form(block: Block, said: Any) -> Form:
    num_experts = block.num_experts
    shapes = [tuple(part.shape) for part in said if isinstance(part, Tensor)] if isinstance(said, tuple) else said
    if isinstance(said, tuple) and all(isinstance(part, Tensor) for part in said):
        if len(said) == 2 and said[0].shape[-1] == said[1].shape[-1] == num_experts:
            return "dense"
        if len(said) >= 3 and said[0].shape[-1] in (num_experts, num_experts + 1):
            if said[2].is_floating_point() or said[2].shape != said[1].shape:
                raise UnknownRoutingError(f"{block}: expected weights and indices of one shape, got {shapes}")
            return "pairs"
    if isinstance(said, tuple) and len(said) == 5 and isinstance(said[3], list) and len(said[3]) == num_experts:
        _, token_P, weight_P, load_E, logits_TE = said
        if logits_TE.shape[-1] == num_experts and len(token_P) == len(weight_P) == sum(load_E):
            return "sorted"
    raise UnknownRoutingError(
        f"{block}: expected (logits, weights, indices) over {num_experts} experts, got {shapes}"
    )
