"""Heads of every kind at awkward sizes for the tests, and the slow definition that they are compared with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.heads import (
    AdaptiveHead,
    ChunkedHead,
    ConditionedLinearScorer,
    FoldedHead,
    FullHead,
    Head,
    LoopedLinearScorer,
    LowRankScorer,
    MixtureHead,
    Partition,
    ScaleShiftScorer,
    SortedLinearScorer,
    SortedLowRankScorer,
    SortedScaleShiftScorer,
    TokenScorer,
    equal_partition,
)
from vocabfold.heads.adaptive import ClusterScorer
from vocabfold.heads.conditioned import ConditionOptions
from vocabfold.heads.readers import GroupReader, ResidualReader, WideReader

HIDDEN_SIZE = 6
SCORERS: dict[str, Callable[[Partition, nn.Parameter | None], TokenScorer]] = {
    "scale_shift_sorted": lambda partition, _: SortedScaleShiftScorer(HIDDEN_SIZE, partition),
    "scale_shift": lambda partition, _: ScaleShiftScorer(HIDDEN_SIZE, partition),
    "low_rank_sorted": lambda partition, _: SortedLowRankScorer(HIDDEN_SIZE, partition, rank=2),
    "low_rank": lambda partition, _: LowRankScorer(HIDDEN_SIZE, partition, rank=2),
    "sorted_free": lambda partition, _: SortedLinearScorer(HIDDEN_SIZE, partition),
    "sorted_tied": lambda partition, weight: SortedLinearScorer(HIDDEN_SIZE, partition, weight),
    "conditioned_free": lambda partition, _: ConditionedLinearScorer(HIDDEN_SIZE, partition, 5),
    "conditioned_tied": lambda partition, weight: ConditionedLinearScorer(HIDDEN_SIZE, partition, 5, weight),
    "looped_free": lambda partition, _: LoopedLinearScorer(HIDDEN_SIZE, partition),
    "looped_tied": lambda partition, weight: LoopedLinearScorer(HIDDEN_SIZE, partition, weight),
}
# With what the groups are scored from, or with a variant of the scorer that sees the group.
READERS: dict[str, Callable[[], GroupReader | None]] = {
    "sorted_free_residual": lambda: ResidualReader(HIDDEN_SIZE, 4),
    "looped_free_wide": lambda: WideReader(HIDDEN_SIZE, 4),
    "conditioned_free_wide": lambda: WideReader(HIDDEN_SIZE, 4),
}
VARIANTS = {
    "conditioned_free_gated": ConditionOptions(scale=0.3, gated=True),
    "conditioned_free_shared": ConditionOptions(scale=0.3, shared=True),
}
FOLDED_KINDS = (*SCORERS, "sorted_free_bias", "looped_free_bias", "scale_shift_bias", *READERS, *VARIANTS)
FAST_KINDS = ("scale_shift_sorted", "low_rank_sorted", "sorted_free", "sorted_tied", "sorted_free_bias")
MIXED = ("sorted_free_bias", "looped_free_bias")  # the parts of a mixture, the second in reversed order
FULL_KINDS = ("full_tied", "full_free", "full_bias_tied", "chunked_tied", "chunked_free", "chunked_bias_tied")
KINDS = (*FULL_KINDS, *FOLDED_KINDS, "adaptive", "mixture_free")


@dataclass(frozen=True)
class Layout:
    """A vocabulary of V tokens, the wanted group size S (None: the default), whether its order is shuffled, how many of
    its first tokens have a group to themselves, and whether that order is reversed, as in a mixture's second part."""

    vocabulary_size: int
    group_size: int | None
    shuffled: bool = False
    shortlist: int = 0
    reversed: bool = False

    def order(self) -> Tensor:
        tokens = torch.arange(self.vocabulary_size)
        if self.shuffled:
            tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(5))]
        return tokens.flip(0) if self.reversed else tokens


LAYOUTS = {
    "prime": Layout(97, None),
    "group_size_not_dividing": Layout(50, 7, shuffled=True),
    "one_slot": Layout(11, 1, shuffled=True),
    "one_group": Layout(23, 23, shuffled=True),
    "two_tokens": Layout(2, 1),
    "shortlist": Layout(61, 9, shuffled=True, shortlist=13),
    "shortlist_in_token_order": Layout(40, None, shortlist=1),
    "all_but_one_group_single": Layout(12, 5, shuffled=True, shortlist=7),
}


def every_pair(*axes: Iterable[Any]) -> list[Any]:
    """Cases of three axes for ``parametrize`` in which each value meets each value of the other axes: all pairs of the
    first two, while the third, which is no longer than either, takes turns. A mapping gives its values, by name."""
    rows, columns, turns = map(_named, axes)
    assert len(turns) <= min(len(rows), len(columns))
    cases = [
        (row, column, turns[(i + j) % len(turns)]) for i, row in enumerate(rows) for j, column in enumerate(columns)
    ]
    return [pytest.param(*(value for _, value in case), id="-".join(name for name, _ in case)) for case in cases]


def one_case_a_kind(
    axis: Mapping[str, Any] | Sequence[Any],
    turns: Mapping[str, Any] | Sequence[Any] = (),
    kinds: Sequence[str] = KINDS,
) -> Callable[[Any], Any]:
    """For a test of (kind, value, ...): a case for each kind that takes all values of ``axis`` one after the other, as
    cases cost more time than such small heads. Its third argument, where there are ``turns``, takes turns as in
    ``every_pair``. What fails is told with its values."""
    values, others = _named(axis), _named(turns)
    assert len(others) <= min(len(kinds), len(values))

    def decorate(test: Callable[..., None]) -> Any:
        signature = inspect.signature(test)
        first, *looped = list(signature.parameters)[: 3 if others else 2]

        @functools.wraps(test)
        def every(**given: Any) -> None:
            for number, (name, value) in enumerate(values, start=kinds.index(given[first])):
                turn = [others[number % len(others)]] if others else []
                try:
                    test(**given, **dict(zip(looped, [value, *(each for _, each in turn)], strict=True)))
                except BaseException as error:
                    error.add_note(", ".join([name, *(its_name for its_name, _ in turn)]))
                    raise

        kept = [each for each in signature.parameters.values() if each.name not in looped]
        every.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return pytest.mark.parametrize(first, kinds)(every)

    return decorate


def _named(axis: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    return [(str(name), axis[name] if isinstance(axis, Mapping) else name) for name in axis]


def adaptive_cutoffs(vocabulary_size: int) -> list[int]:
    """Of the adaptive heads in the tests: two, or one where that is all there is room for."""
    return sorted({max(1, vocabulary_size // 10), max(1, vocabulary_size // 3)})


class Model(nn.Module):
    """An embedding and the head that may share its rows, as a language model holds them."""

    def __init__(self, embedding: nn.Embedding, head: Head) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = head


def make_head(
    kind: str,
    layout: Layout,
    weight_std: float = 0.7,
    order: Tensor | None = None,
    seed: int = 0,
    softcap: float | None = None,
) -> tuple[Head, Model]:
    """A float64 head with every parameter drawn from normal(0, ``weight_std``), and the model that holds it."""
    if kind.startswith("chunked") and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch's linear_cross_entropy needs torch 2.13")
    torch.manual_seed(seed)
    embedding = nn.Embedding(layout.vocabulary_size, HIDDEN_SIZE)
    tied_weight = embedding.weight if kind.endswith("tied") else None
    assert tied_weight is None or isinstance(tied_weight, nn.Parameter)
    head: Head
    order = layout.order() if order is None else order
    if kind.startswith("full"):
        with_bias = kind.startswith("full_bias")
        head = FullHead(HIDDEN_SIZE, layout.vocabulary_size, tied_weight, softcap=softcap, with_bias=with_bias)
    elif kind.startswith("chunked"):
        with_bias = kind.startswith("chunked_bias")
        head = ChunkedHead(HIDDEN_SIZE, layout.vocabulary_size, tied_weight, chunk_rows=4, with_bias=with_bias)
    elif kind == "adaptive":
        cutoffs = adaptive_cutoffs(layout.vocabulary_size)
        head = AdaptiveHead(HIDDEN_SIZE, layout.vocabulary_size, cutoffs, 2.0, order, softcap)
    elif kind.startswith("mixture"):
        kinds = zip(MIXED, (order, order.flip(0)), strict=True)
        parts = [make_head(part, layout, weight_std, its, seed)[0] for part, its in kinds]
        head = MixtureHead([part for part in parts if isinstance(part, FoldedHead)])
    else:
        partition = equal_partition(layout.vocabulary_size, layout.group_size, order, layout.shortlist)
        if kind in VARIANTS:
            scorer: TokenScorer = ConditionedLinearScorer(HIDDEN_SIZE, partition, 5, options=VARIANTS[kind])
        else:
            scorer = SCORERS[kind.removesuffix("_bias") if kind not in READERS else kind.rpartition("_")[0]](
                partition, tied_weight
            )
        reader = READERS[kind]() if kind in READERS else None
        with_bias = kind.endswith("_bias") or reader is not None
        head = FoldedHead(HIDDEN_SIZE, partition, scorer, softcap=softcap, with_bias=with_bias, group_reader=reader)
    module = Model(embedding, head).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=weight_std)
    return head, module


def make_hidden(num_rows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, HIDDEN_SIZE, dtype=torch.float64, generator=generator)


def naive_groups(layout: Layout, kind: str = "") -> list[list[int]]:
    """The tokens of each group by the paper's floor formula, token by token; of an adaptive head by its cutoffs."""
    shortlist, order = layout.shortlist, layout.order().tolist()
    if kind == "adaptive":
        first, *ends = [*adaptive_cutoffs(layout.vocabulary_size), layout.vocabulary_size]
        return [[token] for token in order[:first]] + [
            order[start:end] for start, end in zip([first, *ends], ends, strict=False)
        ]
    rest = layout.vocabulary_size - shortlist
    group_size = layout.group_size or min(s for s in range(1, rest + 1) if s * s >= rest)
    num_groups = min(range(1, rest + 1), key=lambda groups: (abs(-(-rest // groups) - group_size), groups))
    return [[token] for token in order[:shortlist]] + [
        [order[shortlist + p] for p in range(rest * g // num_groups, rest * (g + 1) // num_groups)]
        for g in range(num_groups)
    ]


def naive_logits(
    kind: str, layout: Layout, head: Head, hidden: Tensor
) -> tuple[Tensor, list[tuple[list[int], Tensor]]]:
    """Token by token: the logits of the groups [N, G] and, for each group, its tokens and their logits [N, its tokens].

    In a full softmax each token is a group, and a token that is alone in its group has no logit within it.
    """
    assert isinstance(head, FullHead | FoldedHead)
    if isinstance(head, FullHead):
        bias = hidden.new_zeros(layout.vocabulary_size) if head.bias is None else head.bias
        logits = [hidden @ head.weight[token] + bias[token] for token in range(layout.vocabulary_size)]
        return _capped(logits, head), [([token], hidden[:, :0]) for token in range(layout.vocabulary_size)]
    members = []
    place = index = 0  # among the tokens, and the groups, that have parameters
    for tokens in naive_groups(layout, kind):
        if len(tokens) == 1:
            members.append((tokens, hidden[:, :0]))
            continue
        scores = []
        scorer, seen = head.scorer, hidden
        if isinstance(scorer, ConditionedLinearScorer):
            inner = _gelu(_norm(hidden) @ scorer.into.weight.t() + scorer.group_embedding[index])
            if scorer.group_gate is not None:
                inner = inner * (1 + scorer.group_gate[index])
            hidden = hidden + scorer.options.scale * (inner @ scorer.out.t())
        for slot, token in enumerate(tokens):
            if isinstance(scorer, ScaleShiftScorer):
                score = scorer.scale[index, slot] * (hidden @ scorer.shared[slot]) + scorer.shift[index, slot]
                if isinstance(scorer, LowRankScorer):
                    score = score + hidden @ scorer.down[index].t() @ scorer.up[index, slot]
            elif isinstance(scorer, ClusterScorer):
                down, rows = scorer.tail[index]
                score = hidden @ down.weight.t() @ rows.weight[slot]
            else:
                assert isinstance(scorer, LoopedLinearScorer)
                row = token if kind.endswith("tied") else place
                score = hidden @ scorer.weight[row] + scorer.bias[place]
            scores.append(score)
            place += 1
        members.append((tokens, _capped(scores, head)))
        index += 1
        hidden = seen
    group_scores = [_features(head, hidden) @ row for row in head.group_weight]
    if head.group_bias is not None:
        group_scores = [score + bias for score, bias in zip(group_scores, head.group_bias, strict=True)]
    return _capped(group_scores, head), members


def _features(head: FoldedHead, hidden: Tensor) -> Tensor:
    """What the groups are scored from."""
    reader, scorer = head.group_reader, head.scorer
    if isinstance(scorer, ConditionedLinearScorer) and scorer.no_group is not None:
        inner = _gelu(_norm(hidden) @ scorer.into.weight.t() + scorer.no_group)
        return hidden + scorer.options.scale * (inner @ scorer.out.t())
    if reader is None:
        return hidden
    inner = _gelu(_norm(hidden) @ reader.into.weight.t() + reader.into.bias)
    return hidden + inner @ reader.out.t() if isinstance(reader, ResidualReader) else torch.cat([hidden, inner], dim=1)


def _norm(hidden: Tensor) -> Tensor:
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()


def _gelu(inner: Tensor) -> Tensor:
    return inner * 0.5 * (1 + torch.erf(inner / 2**0.5))


def naive_parts(kind: str, layout: Layout, head: Head) -> list[tuple[str, Layout, Head]]:
    """Kind, layout and head of each part of a mixture; of any other head itself."""
    if not isinstance(head, MixtureHead):
        return [(kind, layout, head)]
    return list(zip(MIXED, (layout, replace(layout, reversed=True)), head.heads, strict=True))


def naive_log_prob(kind: str, layout: Layout, head: Head, hidden: Tensor) -> Tensor:
    """log P [N, V] token by token: P(v) = softmax over groups [g] * softmax over the tokens of group g."""
    if not isinstance(head, MixtureHead):
        return joined_log_prob(*naive_logits(kind, layout, head, hidden))
    weights = _log_softmax(hidden @ head.mix.weight.t() + head.mix.bias).exp()
    probability = torch.zeros(len(hidden), layout.vocabulary_size, dtype=hidden.dtype)
    for index, part in enumerate(naive_parts(kind, layout, head)):
        probability = probability + weights[:, index, None] * joined_log_prob(*naive_logits(*part, hidden)).exp()
    return probability.log()


def joined_log_prob(group_logits: Tensor, members: list[tuple[list[int], Tensor]]) -> Tensor:
    """log P [N, V] from what naive_logits returns."""
    group_log_prob = _log_softmax(group_logits)
    columns: dict[int, Tensor] = {}
    for group, (tokens, logits) in enumerate(members):
        within = _log_softmax(logits) if len(tokens) > 1 else torch.zeros_like(group_logits[:, :1])
        for slot, token in enumerate(tokens):
            columns[token] = group_log_prob[:, group] + within[:, slot]
    return torch.stack([columns[token] for token in range(len(columns))], dim=1)


def _capped(scores: Sequence[Tensor], head: FullHead | FoldedHead) -> Tensor:
    stacked = torch.stack(list(scores), dim=1)
    return stacked if head.softcap is None else head.softcap * torch.tanh(stacked / head.softcap)


def _log_softmax(scores: Tensor) -> Tensor:
    return scores - scores.exp().sum(dim=1, keepdim=True).log()
