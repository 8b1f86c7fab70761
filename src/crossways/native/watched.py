"""Whether somebody looks at operators, so that what we do has to be one."""

from __future__ import annotations

from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter


def is_watched(*tensors: Tensor) -> bool:
    """Whether operators on these have another meaning than their plain values: compilers, tracers, transforms,
    subclasses, forward-mode derivatives. Without them what we do need not go through PyTorch's dispatcher, which is a
    good part of the time that a few tokens take. Reverse-mode gradients are for the caller to ask about.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return True
    return (
        is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of these carries a forward-mode derivative."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
