"""Selections: maps from scores to the chosen pairs. One file per rule; `base.Selection` is the contract."""

from crossways.rules.select.base import Selection, build_selection, selection_catalogue
from crossways.rules.select.expert_choice import ExpertChoice
from crossways.rules.select.scheduled_top_k import ScheduledTopK
from crossways.rules.select.threshold import Threshold
from crossways.rules.select.top_c import TopC
from crossways.rules.select.top_k import TopK

__all__ = [
    "ExpertChoice",
    "ScheduledTopK",
    "Selection",
    "Threshold",
    "TopC",
    "TopK",
    "build_selection",
    "selection_catalogue",
]
