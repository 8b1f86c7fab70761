"""Gates: modules that map hidden states to router logits. One file per idea; `base.Gate` is the contract."""

from crossways.gates.base import Gate, GateSpec, build_gate, gate_catalogue
from crossways.gates.cosine import Cosine, CosineGate
from crossways.gates.hash import Hash, HashGate
from crossways.gates.linear import Linear, LinearGate
from crossways.gates.low_rank import LowRank, LowRankGate
from crossways.gates.mlp import Mlp, MlpGate
from crossways.gates.noisy import Noisy, NoisyGate
from crossways.gates.random import Random, RandomGate
from crossways.gates.recurrent import Recurrent, RecurrentGate
from crossways.gates.stable import Stable, StableGate

__all__ = [
    "Cosine",
    "CosineGate",
    "Gate",
    "GateSpec",
    "Hash",
    "HashGate",
    "Linear",
    "LinearGate",
    "LowRank",
    "LowRankGate",
    "Mlp",
    "MlpGate",
    "Noisy",
    "NoisyGate",
    "Random",
    "RandomGate",
    "Recurrent",
    "RecurrentGate",
    "Stable",
    "StableGate",
    "build_gate",
    "gate_catalogue",
]
