"""How many groups a folded head looks into while it decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from vocabfold.heads.base import Head
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.partition import Partition
from vocabfold.heads.scorers import TokenScorer


@dataclass
class Visits:
    """Counts, while it stands in for the scorer's methods, the groups whose tokens are looked at: ``num_groups``."""

    partition: Partition
    scorer: TokenScorer
    num_groups: int = 0
    methods: dict[str, Callable[..., Tensor]] = field(default_factory=dict)

    def __enter__(self) -> Visits:
        scorer = self.scorer
        self.methods = {"group_log_prob": scorer.group_log_prob, "position_log_prob": scorer.position_log_prob}

        def some(hidden: Tensor, groups: Tensor) -> Tensor:
            self.num_groups += groups.numel()
            return self.methods["group_log_prob"](hidden, groups)

        def every(hidden: Tensor) -> Tensor:
            self.num_groups += len(hidden) * len(self.partition.multi_groups)
            return self.methods["position_log_prob"](hidden)

        scorer.group_log_prob, scorer.position_log_prob = some, every  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self.scorer.group_log_prob, self.scorer.position_log_prob


def visits_of(head: Head) -> Visits | None:
    """A context that counts the groups whose tokens ``head`` looks at; None for a head without groups."""
    return Visits(head.partition, head.scorer) if isinstance(head, FoldedHead) else None
