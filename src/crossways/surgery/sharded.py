"""Weights that are spread over devices: which can be lived with."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from crossways.surgery.find import Block, UnknownRoutingError

OTHER_MESHES = ("tp", "ep")
"""Names of the dimensions along which transformers spreads single layers."""


def refuse_spread(model: nn.Module, block: Block) -> None:
    """Refuse a block that computes on a part of its weights. Under FSDP2 (`fully_shard`) every device has the whole
    of them while it computes, so that is no hindrance.

    Raises:
        UnknownRoutingError: for tensor and expert parallelism, and for anything that is not known to be FSDP2 alone.
    """
    weights = [*block.router.parameters(), *block.experts.parameters()]
    spread = [weight for weight in weights if hasattr(weight, "device_mesh")]
    if getattr(block.experts, "_is_expert_parallel", False) or not all(map(_along_data, spread)):
        raise UnknownRoutingError(
            f"{block}: its weights are spread over devices (tensor or expert parallel), so that one device sees "
            "a part of the choice alone; load the model without that"
        )
    if spread and not _under_fsdp(model, block):
        raise UnknownRoutingError(
            f"{block}: its weights are spread over devices, and not by fully_shard (FSDP2), which alone is known to "
            "gather them where they are used; reroute the model first"
        )


def _along_data(weight: Tensor) -> bool:
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    return getattr(mesh, "ndim", None) == 1 and not set(mesh.mesh_dim_names or ()) & set(OTHER_MESHES)


def _under_fsdp(model: nn.Module, block: Block) -> bool:
    parts = block.name.split(".") if block.name else []
    around = itertools.accumulate(parts, "{}.{}".format) if parts else iter(())
    return any(isinstance(module, FSDPModule) for module in (model, *map(model.get_submodule, around)))
