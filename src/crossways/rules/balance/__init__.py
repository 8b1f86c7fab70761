"""Balancing losses, one number per router, from the assignment that was executed and the raw logits or scores."""

from crossways.rules.balance.excess import excess_load_loss
from crossways.rules.balance.groups import communication_balance_loss, device_balance_loss
from crossways.rules.balance.load import balance_product, load_balance_loss, normalised, sequence_balance_loss
from crossways.rules.balance.logits import (
    entropy_loss,
    mutual_information_loss,
    router_z_loss,
    sequence_entropy_loss,
    sparsity_loss,
)
from crossways.rules.balance.slots import over_experts, zero_reward
from crossways.rules.balance.variation import importance_loss, load_loss

__all__ = [
    "balance_product",
    "communication_balance_loss",
    "device_balance_loss",
    "entropy_loss",
    "excess_load_loss",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "mutual_information_loss",
    "normalised",
    "over_experts",
    "router_z_loss",
    "sequence_balance_loss",
    "sequence_entropy_loss",
    "sparsity_loss",
    "zero_reward",
]
