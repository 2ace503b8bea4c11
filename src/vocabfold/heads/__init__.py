"""Output heads: hidden states to loss, log-probabilities and samples. Take one out for a model of your own."""

from vocabfold.heads.base import Head, HeadLoss
from vocabfold.heads.build import HeadSettings, build_head
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.partition import Partition, equal_partition
from vocabfold.heads.scorers import LoopedLinearScorer, ScaleShiftScorer, TokenScorer

__all__ = [
    "FoldedHead",
    "FullHead",
    "Head",
    "HeadLoss",
    "HeadSettings",
    "LoopedLinearScorer",
    "Partition",
    "ScaleShiftScorer",
    "TokenScorer",
    "build_head",
    "equal_partition",
]
