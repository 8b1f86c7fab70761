"""Selections: maps from scores to the chosen pairs. One file per rule; `base.Selection` is the contract."""

from crossways.rules.select.base import Selection, build_selection, selection_catalogue
from crossways.rules.select.base_layer import Base
from crossways.rules.select.capacity import Capacity
from crossways.rules.select.expert_choice import ExpertChoice
from crossways.rules.select.group_limited import GroupLimited
from crossways.rules.select.positive import Positive
from crossways.rules.select.sampled_top_k import SampledTopK
from crossways.rules.select.scheduled_top_k import ScheduledTopK
from crossways.rules.select.sinkhorn import Sinkhorn
from crossways.rules.select.threshold import Threshold
from crossways.rules.select.top_c import TopC
from crossways.rules.select.top_k import TopK
from crossways.rules.select.top_p import TopP

__all__ = [
    "Base",
    "Capacity",
    "ExpertChoice",
    "GroupLimited",
    "Positive",
    "SampledTopK",
    "ScheduledTopK",
    "Selection",
    "Sinkhorn",
    "Threshold",
    "TopC",
    "TopK",
    "TopP",
    "build_selection",
    "selection_catalogue",
]
