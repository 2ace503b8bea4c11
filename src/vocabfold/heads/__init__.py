"""Output heads: hidden states to loss, log-probabilities and samples. Take one out for a model of your own."""

from vocabfold.heads.adaptive import AdaptiveHead
from vocabfold.heads.base import Head, HeadLoss
from vocabfold.heads.build import build_head, folded_head
from vocabfold.heads.chunked import ChunkedHead
from vocabfold.heads.conditioned import ConditionedLinearScorer
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.fused import FusedHead
from vocabfold.heads.linear import LoopedLinearScorer, SortedLinearScorer
from vocabfold.heads.loss_options import LossOptions
from vocabfold.heads.low_rank import LowRankScorer, SortedLowRankScorer
from vocabfold.heads.mixture import MixtureHead
from vocabfold.heads.partition import Partition, equal_partition
from vocabfold.heads.scorers import ScaleShiftScorer, SortedScaleShiftScorer, TokenScorer
from vocabfold.heads.settings import HeadSettings, PartitionSettings

__all__ = [
    "AdaptiveHead",
    "ChunkedHead",
    "ConditionedLinearScorer",
    "FoldedHead",
    "FullHead",
    "FusedHead",
    "Head",
    "HeadLoss",
    "HeadSettings",
    "LoopedLinearScorer",
    "LossOptions",
    "LowRankScorer",
    "MixtureHead",
    "Partition",
    "PartitionSettings",
    "ScaleShiftScorer",
    "SortedLinearScorer",
    "SortedLowRankScorer",
    "SortedScaleShiftScorer",
    "TokenScorer",
    "build_head",
    "equal_partition",
    "folded_head",
]
