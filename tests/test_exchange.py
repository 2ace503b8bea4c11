"""Groups learned by exchange: the criterion against a plain loop, sweeps that never lower it, planted groups found."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads import exchange
from vocabfold.heads.exchange import Exchange, count_bigrams, exchanged_order, mutual_information
from vocabfold.heads.partition import Partition, equal_boundaries


def stream_of(vocabulary_size: int, length: int, seed: int = 0) -> np.ndarray:
    """A Zipf law's tokens, many of the vocabulary never; each fifth is that before it once more."""
    tokens = np.random.default_rng(seed).zipf(1.4, length) % max(1, vocabulary_size - 2)
    for place in range(5, length, 5):
        tokens[place] = tokens[place - 1]
    return tokens.astype(np.uint16)


def plain_criterion(tokens: np.ndarray, group_of: list[int]) -> float:
    """The module's formula, over all pairs of groups."""

    def f(number: int) -> float:
        return number * math.log(number) if number > 0 else 0.0

    groups = [group_of[token] for token in tokens.tolist()]
    pairs = Counter(pairwise(groups))
    result = 0.0
    for first in set(group_of):
        for second in set(group_of):
            result += f(pairs[first, second])
        result -= f(sum(number for (left, _), number in pairs.items() if left == first))
        result -= f(sum(number for (_, right), number in pairs.items() if right == first))
    return result


def groups_of(order: Tensor, boundaries: Tensor) -> list[int]:
    groups: list[int] = Partition(order, boundaries).group_of.tolist()
    return groups


CASES = [(23, [0, 5, 10, 15, 23]), (23, [0, 1, 4, 11, 23]), (7, list(range(8))), (7, [0, 7]), (2, [0, 1, 2])]


@pytest.mark.parametrize(("vocabulary_size", "bounds"), CASES)
@pytest.mark.parametrize("length", [0, 1, 2, 400])
def test_the_criterion_is_that_of_a_plain_loop_and_no_sweep_lowers_it(
    vocabulary_size: int, bounds: list[int], length: int
) -> None:
    tokens, boundaries = stream_of(vocabulary_size, length), torch.tensor(bounds)
    order = torch.randperm(vocabulary_size, generator=torch.Generator().manual_seed(1))
    state = Exchange(count_bigrams(tokens, vocabulary_size), order.numpy(), boundaries.numpy())
    criterion = state.criterion
    assert criterion == pytest.approx(plain_criterion(tokens, groups_of(order, boundaries)), rel=1e-12, abs=1e-9)
    for _ in range(4):
        num_exchanged = state.sweep()
        groups = groups_of(torch.from_numpy(state.order), boundaries)
        assert state.criterion == pytest.approx(plain_criterion(tokens, groups), rel=1e-12, abs=1e-9)
        assert state.criterion > criterion if num_exchanged else state.criterion == criterion
        criterion = state.criterion


def test_a_sweep_finds_more_than_a_thousand_random_orders() -> None:
    tokens, boundaries = stream_of(23, 2000), equal_boundaries(23, 5)
    bigrams, random = count_bigrams(tokens, 23), np.random.default_rng(0)
    start = np.arange(23)
    best = max(Exchange(bigrams, random.permutation(23), boundaries.numpy()).criterion for _ in range(1000))
    state = Exchange(bigrams, start, boundaries.numpy())
    while state.sweep():
        pass
    assert state.criterion > best
    assert start.tolist() == list(range(23))  # the order that was given stays as it was


@pytest.mark.parametrize("shortlist", [1, 4])
def test_the_shortlist_stays_and_its_neighbours_count(shortlist: int) -> None:
    tokens, boundaries = stream_of(30, 3000), equal_boundaries(30, 5, shortlist)
    order = torch.from_numpy(np.bincount(tokens, minlength=30)).argsort(descending=True, stable=True)
    bigrams = count_bigrams(tokens, 30)
    state = Exchange(bigrams, order.numpy(), boundaries.numpy(), shortlist)
    plain = plain_criterion(tokens, groups_of(order, boundaries))
    criterion = state.criterion
    assert state.sweep() > 0
    found = torch.from_numpy(state.order)
    assert torch.equal(found[:shortlist], order[:shortlist])
    assert torch.equal(found.sort().values, torch.arange(30))
    gain = plain_criterion(tokens, groups_of(found, boundaries)) - plain
    assert gain > 0
    assert state.criterion - criterion == pytest.approx(gain, rel=1e-9)


def test_a_token_stays_in_its_band() -> None:
    tokens, boundaries, bands = stream_of(30, 3000), equal_boundaries(30, 5, 2), np.array([0, 0, 1, 1, 1, 4])
    order = torch.from_numpy(np.bincount(tokens, minlength=30)).argsort(descending=True, stable=True)
    free = exchanged_order(tokens, order, boundaries, 2)
    bound = exchanged_order(tokens, order, boundaries, 2, torch.from_numpy(bands))
    edges = boundaries[[0, 1, 2, 4, 7, 8]].tolist()
    kept = [[set(found[start:stop].tolist()) for start, stop in pairwise(edges)] for found in (order, bound, free)]
    assert kept[0] == kept[1] != kept[2]
    criteria = [plain_criterion(tokens, groups_of(found, boundaries)) for found in (order, bound, free)]
    assert criteria[0] < criteria[1]
    one_band = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(free, exchanged_order(tokens, order, boundaries, 2, one_band))


def test_planted_groups_are_found_again() -> None:
    """Six kinds of tokens, of which each likes to follow one other kind."""
    random = np.random.default_rng(0)
    kinds = [0]
    for _ in range(12_000):
        kinds.append((kinds[-1] + 1) % 6 if random.random() < 0.8 else int(random.integers(6)))
    token_of = random.permutation(48).reshape(6, 8)
    tokens = token_of[kinds, random.integers(8, size=len(kinds))].astype(np.uint16)
    kind_of = np.empty(48, dtype=np.int64)
    kind_of[token_of] = np.arange(6)[:, None]
    shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    order = exchanged_order(tokens, shuffled, equal_boundaries(48, 8))
    groups = kind_of[order.numpy()].reshape(6, 8)
    assert sum(len(set(group)) == 1 for group in groups.tolist()) == 6


def test_bigrams_are_those_of_the_whole_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stream_of(20, 500)
    expected = Counter(pairwise(tokens.tolist()))
    for block in (1, 7, 1000):
        monkeypatch.setattr(exchange, "BLOCK_TOKENS", block)
        bigrams = count_bigrams(tokens, 20)
        found: Counter[tuple[int, int]] = Counter()
        for token in range(20):
            part = slice(bigrams.starts[token], bigrams.starts[token + 1])
            for other, number in zip(bigrams.others[part].tolist(), bigrams.numbers[part].tolist(), strict=True):
                found[(token, other) if other < 20 else (other - 20, token)] += int(number)
            found[token, token] += 2 * int(bigrams.repeats[token])
        assert found == Counter({pair: 2 * number for pair, number in expected.items()})  # once from either side


@pytest.mark.parametrize("block", [3, 1000])
def test_mutual_information_is_that_of_the_groups_frequencies(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BLOCK_TOKENS", block)
    tokens = stream_of(20, 800)
    group_of = torch.arange(20) % 3
    pairs = Counter(pairwise(group_of[tokens.astype(np.int64)].tolist()))
    total = sum(pairs.values())
    left, right = Counter(), Counter()  # type: Counter[int], Counter[int]
    for (first, second), number in pairs.items():
        left[first] += number
        right[second] += number
    expected = sum(
        number / total * math.log(number * total / (left[first] * right[second]))
        for (first, second), number in pairs.items()
    )
    assert mutual_information(tokens, group_of) == pytest.approx(expected, rel=1e-9)
    assert mutual_information(tokens[:1], group_of) == 0.0
    assert mutual_information(tokens, torch.zeros(20, dtype=torch.int64)) == pytest.approx(0.0, abs=1e-12)


def test_more_groups_than_fit_into_memory_are_refused() -> None:
    tokens = np.arange(2, dtype=np.uint16)
    with pytest.raises(UserError, match=r"takes 75 GiB for 50,257 groups: choose a larger head\.partition"):
        exchanged_order(tokens, torch.arange(50_257), torch.arange(50_258))
