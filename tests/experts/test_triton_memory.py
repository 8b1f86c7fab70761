"""How many bytes one layer's expert compute holds on its way forward and back, counted without a GPU: the operators
run on tensors of the device `meta`, with kernels that do nothing, and every allocation is counted while it lives.

Against it stands what ScatterMoE's `GLUMLP` holds, by its source.

Legend: T tokens, P pairs, E experts, D model width, F expert width.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.triton import (
    hidden_grad,
    op,
    passes,
    plan,
    rows,
    token_sum,
    up,
    weight_grad,
)

KERNELS = [
    (plan, "tile_kernel"),
    (up, "up_kernel"),
    (rows, "row_kernel"),
    (token_sum, "token_sum_kernel"),
    (hidden_grad, "hidden_grad_kernel"),
    (weight_grad, "weight_grad_kernel"),
]
# T, D, F, E, K
SHAPES = {
    "fine-grained": (16384, 2048, 1024, 64, 8),
    "narrow experts": (16384, 2048, 512, 128, 8),
    "wide experts": (16384, 1024, 4096, 8, 2),
    "one each": (4096, 1024, 1024, 16, 1),
}


class NoKernel:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most at once; our operators are seen from inside.

    Tensors of the shapes `left_out` do not count.
    """

    def __init__(self, left_out):
        super().__init__()
        self.left_out = left_out
        self.known = weakref.WeakSet()
        self.now = self.most = 0

    def ignore(self, *tensors):
        """What exists anyway."""
        self.known.update(tensor.untyped_storage() for tensor in tensors)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known and tensor.shape not in self.left_out:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = {"crossways::experts": passes.forward_pass, "crossways::experts_backward": passes.backward_pass}
        run = inside.get(func._schema.name)
        if run is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = run(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out


def meta(*shape, dtype=torch.bfloat16, grad=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def ours(shape, monkeypatch):
    """Bytes kept between forward and backward, and the most at any time, gradients of parameters left out."""
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, NoKernel())
    T, D, F, E, K = shape
    leaves = meta(T, D), meta(T * K), meta(E, 2 * F, D), meta(E, D, F)
    token_P, expert_P, offsets_E1 = (meta(size, dtype=torch.int64, grad=False) for size in (T * K, T * K, E + 1))
    grad_TD = meta(T, D, grad=False)
    with Count({leaf.shape for leaf in leaves[2:]}) as count:
        count.ignore(*leaves, grad_TD)
        for tensor in (token_P, expert_P, offsets_E1):  # the assignment is ours to account for
            count._add(tensor)
        assignment = Assignment(token_P, expert_P, leaves[1], offsets_E1, T)
        y_TD = op.experts(leaves[0], assignment, leaves[2], leaves[3], Activation("swiglu"))
        kept = count.now
        y_TD.backward(grad_TD)
    assert all(leaf.grad is not None for leaf in leaves)
    return kept, count.most


def scatter_moe(shape, size=2):
    """The same of ScatterMoE, never more than it truly holds.

    github.com/shawntan/scattermoe, commit 47b5e15, `scattermoe/mlp.py` (GLUMLP.forward) and `parallel_experts.py`
    (ParallelLinear): kept are both halves of the first product, what the activation gives, its product with the
    other half (the second layer's input), the second layer's rows, the output, and two index tensors. On the way back
    the second layer's input gradient comes on top; later the two factors' gradients stand beside the first product
    and the activation's result, and at last the grouped inputs beside the first product's gradient. Gradients of
    parameters, which it fills with zeros first, are left out.
    """
    T, D, F, E, K = shape
    P = T * K
    indices = 16 * P + 8 * E
    kept = size * (4 * P * F + P * D + T * D) + indices
    second_layer = kept + size * P * F
    activation = size * (6 * P * F + T * D) + indices
    first_layer = size * (2 * P * F + P * D + (1 + (K > 1)) * T * D) + indices
    return kept, max(second_layer, activation, first_layer)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_less_than_scatter_moe(shape, monkeypatch):
    (kept, most), (their_kept, their_most) = ours(shape, monkeypatch), scatter_moe(shape)
    assert kept < their_kept
    assert most < their_most


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_what_the_design_says(shape, monkeypatch):
    """Kept: the rows before the activation, the output, three numbers a pair. At most: these, and on the way back
    either gradients of the hidden rows and of what came before, or the latter and the rows of the input gradient."""
    T, D, F, E, K = shape
    P = T * K
    kept, most = ours(shape, monkeypatch)
    assert kept == 2 * (2 * P * F + T * D) + 8 * (3 * P + E + 1 + T + 1)
    assert most == pytest.approx(kept + 2 * max(3 * P * F, 2 * P * F + P * D), rel=0.03)
