"""The heads that are measured on a card, by name: with rows of their own and a plain order of the vocabulary.

Token ids fall in frequency here (targets are drawn from Zipf's law), so that the order of the ids is that of a
frequency list and no order has to be computed.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from vocabfold.heads import HeadSettings, PartitionSettings

SHORTLIST = 2048
FULL, COMPILED, CHUNKED, CCE, CCE_FILTERED, LIGER = "full", "full_compiled", "chunked", "cce", "cce_filtered", "liger"
ADAPTIVE, PAPER, SCALE_SHIFT, LINEAR, FOLDED = "adaptive", "paper", "scale_shift", "linear", "folded"
LOW_RANK, SHORT, FOLDED_CAPTURED, WIDE = "low_rank", "shortlist", "folded_captured", "folded_wide"


def folded(scorer: str, shortlist: int = 0) -> HeadSettings:
    """A folded head with groups of the default size."""
    partition = PartitionSettings("bpe", shortlist=shortlist)
    return HeadSettings(scorer, "folded", False, None, partition, scorer)


SETTINGS = {
    FULL: HeadSettings("full", "full", tied=False, init_std=None),
    COMPILED: HeadSettings("full", "full", tied=False, init_std=None),
    CHUNKED: HeadSettings("chunked", "chunked", tied=False, init_std=None),
    CCE: HeadSettings("fused", "fused", tied=False, init_std=None, kernel="cce"),
    CCE_FILTERED: HeadSettings("fused", "fused", tied=False, init_std=None, kernel="cce"),
    LIGER: HeadSettings("fused", "fused", tied=False, init_std=None, kernel="liger"),
    ADAPTIVE: HeadSettings("adaptive", "adaptive", tied=False),
    PAPER: folded("scale_shift"),
    SCALE_SHIFT: folded("scale_shift_sorted"),
    LINEAR: folded("linear_sorted"),
    FOLDED: replace(folded("linear_conditioned"), count_biases=True),
    FOLDED_CAPTURED: replace(folded("linear_conditioned"), count_biases=True),
    WIDE: replace(folded("linear_conditioned"), count_biases=True, group_scorer="wide"),
    LOW_RANK: folded("low_rank_sorted"),
    SHORT: folded("linear_sorted", SHORTLIST),
}
WORDS = {
    FULL: "full",
    COMPILED: "full, torch.compile",
    CHUNKED: "torch's chunked",
    CCE: "cut-cross-entropy, all gradients",
    CCE_FILTERED: "cut-cross-entropy as shipped",
    LIGER: "Liger",
    ADAPTIVE: "adaptive",
    PAPER: "paper's (scale and shift)",
    SCALE_SHIFT: "paper's, computed faster",
    LINEAR: "linear",
    FOLDED: "linear, sees its group",
    FOLDED_CAPTURED: "linear, sees its group, as a CUDA graph",
    WIDE: "head=folded",
    LOW_RANK: "low rank",
    SHORT: f"linear, shortlist {SHORTLIST:,}",
}


def for_small_vocabulary(settings: HeadSettings, vocabulary_size: int) -> HeadSettings:
    """The same with cutoffs and a shortlist that a rehearsal's few tokens have room for."""
    if vocabulary_size > 4 * SHORTLIST:
        return settings
    partition = settings.partition
    fewer = replace(partition, shortlist=min(partition.shortlist, vocabulary_size // 8))
    cutoffs = [vocabulary_size // 8, vocabulary_size // 3]
    return replace(settings, partition=fewer, cutoffs=cutoffs, div_value=2.0)


@functools.lru_cache(maxsize=4)
def zipf_tokens(count: int, vocabulary_size: int, device: torch.device) -> Tensor:
    """``count`` tokens, token v in proportion to 1 / (v + 1), every time the same."""
    weights = 1.0 / torch.arange(1, vocabulary_size + 1)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(weights, count, replacement=True, generator=generator).to(device)
