"""What a family does to weights after the choice, read from its own parameters: factors, biases, shared experts that
are scored like chosen ones.

Legend: T tokens, D model width, E experts, P chosen pairs, N shared experts.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.surgery.find import Block
from crossways.surgery.packing import Packing
from crossways.surgery.reading import Reading, tensor_at
from crossways.surgery.site_router import Beside


def balancing_bias(block: Block, reading: Reading) -> Tensor | None:
    """The bias that the family adds for choosing, float32 (E,), None if it has none."""
    return None if reading.bias is None else tensor_at(block.parent, reading.bias).float().flatten()


def scaled(block: Block, reading: Reading, pairs: Assignment) -> Assignment:
    """With the family's factor of each expert or of all, if it has one."""
    if reading.factor is None:
        return pairs
    factor_E = tensor_at(block.parent, reading.factor).flatten()
    factor_P = factor_E if factor_E.numel() == 1 else factor_E[pairs.expert_P]
    return pairs.with_weights(pairs.weight_P * factor_P.to(pairs.weight_P))


def shared_logits(block: Block, reading: Reading, x_TD: Tensor, packing: Packing | None) -> Beside:
    """The logits of shared experts, which the family's router computes and does not say."""
    assert reading.shared is not None
    weight_ND = tensor_at(block.parent, reading.shared)[reading.num_experts :]
    logits_TN = functional.linear(x_TD.reshape(-1, x_TD.shape[-1]).float(), weight_ND.float())
    return Beside(logits_TN if packing is None else packing.spread(logits_TN))


def shared_weights(block: Block, reading: Reading, beside: Beside, packing: Packing | None) -> Tensor:
    """The weights of shared experts that belong to the choice, (T, N), with the family's factor."""
    weight_TN = beside.weight_TN if packing is None else packing.gather(beside.weight_TN)
    if reading.factor is None:
        return weight_TN
    return weight_TN * tensor_at(block.parent, reading.factor).flatten().float()
