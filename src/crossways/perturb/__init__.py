"""What if a router erred? Perturbations of routing decisions, put on and taken off by a context manager.

One file per idea; `base.ModelPerturbation` is the contract, `base.perturbed` the context manager.
"""

from crossways.perturb.base import ModelPerturbation, Stage, perturbed
from crossways.perturb.disable import DisableTop, top_pairs
from crossways.perturb.drop import DropExperts
from crossways.perturb.force import ForcePaths
from crossways.perturb.frequent import FrequentPaths
from crossways.perturb.noise import LogitNoise
from crossways.perturb.permute import PermuteExperts
from crossways.perturb.random_logits import RandomLogits

__all__ = [
    "DisableTop",
    "DropExperts",
    "ForcePaths",
    "FrequentPaths",
    "LogitNoise",
    "ModelPerturbation",
    "PermuteExperts",
    "RandomLogits",
    "Stage",
    "perturbed",
    "top_pairs",
]
