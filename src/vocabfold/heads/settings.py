"""What a configuration says of a head."""

from __future__ import annotations

from dataclasses import dataclass, field

ORDERS = ("bpe", "frequency", "random", "clustered", "clustered_before", "clustered_after", "exchanged")
GROUP_SIZES = ("equal", "rising")
SYMBOLS = (2, 3)  # a token
GROUP_SCORERS = ("linear", "residual", "wide", "shared")
# How the best folded head so far scores its groups and tokens: that of conf/head/folded.yaml and of folded_head.
BEST_ORDER, BEST_SCORER, BEST_GROUP_SCORER = "exchanged", "linear_conditioned", "wide"
EXTRAS = ("label_smoothing", "z_loss", "softcap")  # settings that any head may have; off, they change nothing


@dataclass
class PartitionSettings:
    """``order`` of the vocabulary and the sizes of its groups: ``shortlist`` K groups of one token, then equal groups
    with the wanted ``group_size`` S (None: the root of the number of tokens in them, or the cube root for 3 symbols).
    ``group_sizes``, one of GROUP_SIZES: ``rising`` makes as many groups, small ones of frequent tokens
    (``rising_boundaries``), and learned orders keep each token near its place by frequency (``bands_of``).

    ``clustered``: tokens with the same neighbours share a group; ``clustered_before`` looks at those before a token
    alone, ``clustered_after`` at those after it; ``exchanged`` begins with the clustered groups (exchange.py). ``seed``
    decides the random order. ``clustered_from``: the folder of a trained run whose input embedding is clustered; None
    clusters tokens by their neighbours in the training stream. ``symbols`` a token: 2, group and token, or 3, whose
    groups are in groups too (nested.py).
    """

    order: str = "bpe"
    group_size: int | None = None
    shortlist: int = 0
    seed: int = 0
    clustered_from: str | None = field(default=None, metadata={"folder": True})
    symbols: int = 2
    group_sizes: str = "equal"


@dataclass
class HeadSettings:
    """One node of conf/head. ``type``, one of BUILDERS, is the class that builds it; ``name`` is what it is called, and
    decides nothing. ``init_std`` None: that of torch's own Linear, see ``initial_std``.

    ``label_smoothing`` and ``z_loss`` are LossOptions of training, ``softcap`` bounds the logits; each is for every
    head that does not refuse it, and 0 or None is off. ``count_biases`` gives full and
    folded heads biases that start from the tokens' counts in the training stream. ``condition_width`` is that of
    linear_conditioned (None: see readers.default_width), whose other variants are the ``condition_`` settings: see
    ConditionOptions. ``group_scorer``, one of GROUP_SCORERS, is what a folded head's groups are scored from, and
    ``group_width`` its width.

    ``mixture``, of a head of that type: the order of each part's partition, whose other settings are ``partition``'s.

    ``partition``, ``scorer`` and ``rank`` (of low_rank's correction) describe a folded head, ``chunk_rows`` the
    chunked, ``cutoffs`` and ``div_value`` the adaptive and ``kernel`` the fused one; the others leave them unread.
    """

    name: str = "full"
    type: str = "full"
    tied: bool = True
    init_std: float | None = 0.02
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    scorer: str = "scale_shift"
    rank: int = 4
    chunk_rows: int = 512
    cutoffs: list[int] = field(default_factory=lambda: [2000, 10_000])
    div_value: float = 4.0
    kernel: str = "cce"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    count_biases: bool = False
    condition_width: int | None = None
    condition_scale: float = 1.0
    condition_std: float = 0.02
    condition_gated: bool = False
    condition_detached: bool = False
    group_scorer: str = "linear"
    group_width: int | None = None
    mixture: list[str] = field(default_factory=list)
