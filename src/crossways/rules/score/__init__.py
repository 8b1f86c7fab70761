"""Scores: maps from router logits to non-negative scores. One file per idea; `base.Score` is the contract."""

from crossways.rules.score.among_top import AmongTop
from crossways.rules.score.base import Score, build_score, score_catalogue
from crossways.rules.score.relu import Relu
from crossways.rules.score.sigmoid import Sigmoid
from crossways.rules.score.softmax import Softmax
from crossways.rules.score.sqrt_softplus import SqrtSoftplus
from crossways.rules.score.token_softmax import TokenSoftmax
from crossways.rules.score.unified import Unified

__all__ = [
    "AmongTop",
    "Relu",
    "Score",
    "Sigmoid",
    "Softmax",
    "SqrtSoftplus",
    "TokenSoftmax",
    "Unified",
    "build_score",
    "score_catalogue",
]
