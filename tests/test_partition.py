"""Partitions against the paper's floor formula written as a plain loop."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabfold.errors import UserError
from vocabfold.heads import Partition, equal_partition
from vocabfold.heads.partition import LEAST_RISING, bands_of, equal_boundaries, rising_boundaries

SIZES = [(1, 1), (2, 1), (2, 2), (97, 1), (97, 10), (97, 60), (97, 97), (1000, 32), (50257, 14), (50257, 50257)]


def naive_num_groups(vocabulary_size: int, group_size: int) -> int:
    """The number of groups whose largest comes nearest to the wanted size, found by trying every number."""
    return min(
        range(1, vocabulary_size + 1), key=lambda groups: (abs(-(-vocabulary_size // groups) - group_size), groups)
    )


def check_partition(partition: Partition, vocabulary_size: int, num_groups: int, order: list[int]) -> None:
    """Every token where the floor formula puts it, found by walking through the groups one position at a time."""
    assert partition.vocabulary_size == vocabulary_size
    assert partition.num_groups == num_groups
    group_of, slot_of = [-1] * vocabulary_size, [-1] * vocabulary_size
    sizes = []
    for group in range(num_groups):
        start, stop = (vocabulary_size * group) // num_groups, (vocabulary_size * (group + 1)) // num_groups
        sizes.append(stop - start)
        for position in range(start, stop):
            group_of[order[position]] = group
            slot_of[order[position]] = position - start
    assert -1 not in group_of
    assert partition.group_of.tolist() == group_of
    assert partition.slot_of.tolist() == slot_of
    assert partition.sizes.tolist() == sizes
    assert partition.num_slots == max(sizes)
    assert max(sizes) - min(sizes) <= 1
    assert len(set(zip(group_of, slot_of, strict=True))) == vocabulary_size
    tokens = torch.arange(vocabulary_size)
    assert torch.equal(partition.token_at(partition.group_of, partition.slot_of), tokens)
    assert torch.equal(partition.order[partition.position_of], tokens)
    assert partition.slot_exists.sum(dim=1).tolist() == sizes
    assert partition.slot_exists[partition.group_of, partition.slot_of].all()


@pytest.mark.parametrize(("vocabulary_size", "group_size"), SIZES)
def test_equal_groups_follow_the_floor_formula(vocabulary_size: int, group_size: int) -> None:
    partition = equal_partition(vocabulary_size, group_size)
    check_partition(
        partition, vocabulary_size, naive_num_groups(vocabulary_size, group_size), list(range(vocabulary_size))
    )


@pytest.mark.parametrize(("group_size", "num_groups"), [(14, 3590), (225, 224), (3588, 14), (3864, 13)])
def test_group_counts_at_the_papers_vocabulary(group_size: int, num_groups: int) -> None:
    partition = equal_partition(50257, group_size)
    check_partition(partition, 50257, num_groups, list(range(50257)))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), vocabulary_size=st.integers(1, 400), shuffled=st.booleans())
def test_any_size_and_order(data: st.DataObject, vocabulary_size: int, shuffled: bool) -> None:
    group_size = data.draw(st.integers(1, vocabulary_size))
    order = data.draw(st.permutations(range(vocabulary_size))) if shuffled else list(range(vocabulary_size))
    partition = equal_partition(vocabulary_size, group_size, torch.tensor(order))
    check_partition(partition, vocabulary_size, naive_num_groups(vocabulary_size, group_size), order)


@pytest.mark.parametrize("vocabulary_size", [1, 2, 10, 97, 1000, 50257, 184320])
def test_the_default_group_size_is_near_the_square_root(vocabulary_size: int) -> None:
    partition = equal_partition(vocabulary_size)
    assert abs(partition.num_slots - vocabulary_size**0.5) <= 1
    assert abs(partition.num_groups - vocabulary_size**0.5) <= 1


def test_boundaries_may_be_uneven() -> None:
    partition = Partition(torch.tensor([4, 2, 0, 1, 3]), torch.tensor([0, 1, 2, 5]))
    assert partition.sizes.tolist() == [1, 1, 3]
    assert partition.group_of.tolist() == [2, 2, 1, 2, 0]
    assert partition.slot_of.tolist() == [0, 1, 0, 2, 0]
    assert partition.num_slots == 3
    assert partition.slot_exists.tolist() == [[True, False, False], [True, False, False], [True, True, True]]


@pytest.mark.parametrize("group_size", [0, -3, 98])
def test_group_size_out_of_range_is_refused(group_size: int) -> None:
    with pytest.raises(UserError, match=f"group_size is {group_size}: choose between 1 and the vocabulary size 97"):
        equal_partition(97, group_size)


@pytest.mark.parametrize("order", [[0, 1, 1, 3], [0, 1, 2, 4], [-1, 0, 1, 2]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(UserError, match="each of the 4 tokens exactly once"):
        equal_partition(4, 2, torch.tensor(order))


def test_an_order_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="the order holds 5 tokens: give one of all 4"):
        equal_partition(4, 2, torch.arange(5))


@pytest.mark.parametrize(
    "boundaries", [[0], [1, 4], [0, 3], [0, 5], [0, 2, 2, 4], [0, 3, 2, 4], [4, 0], torch.empty(0).tolist()]
)
def test_bad_boundaries_are_refused(boundaries: list[int]) -> None:
    with pytest.raises(UserError, match="boundaries must rise from 0 to 4 with at least one token a group"):
        Partition(torch.arange(4), torch.tensor(boundaries, dtype=torch.int64))


def test_orders_of_any_integer_type_are_taken() -> None:
    partition = equal_partition(4, 2, torch.tensor([3, 2, 1, 0], dtype=torch.int32))
    assert partition.group_of.tolist() == [1, 1, 0, 0]


def test_casts_and_copies_keep_the_integers() -> None:
    order = torch.randperm(50257, generator=torch.Generator().manual_seed(0))
    expected = equal_partition(50257, 225, order)
    cast = equal_partition(50257, 225, order).to(torch.bfloat16)
    copies = [cast, cast.half(), copy.deepcopy(expected), pickle.loads(pickle.dumps(expected))]
    for partition in copies:
        for name, buffer in expected.named_buffers():
            found = getattr(partition, name)
            assert found.dtype == buffer.dtype == torch.int64
            assert torch.equal(found, buffer)
        assert partition.num_slots == expected.num_slots


def test_loading_rebuilds_what_is_derived_in_a_copy_too() -> None:
    saved = equal_partition(50, 7, torch.arange(50).flip(0))
    original = equal_partition(50, 7)
    loaded = copy.deepcopy(original)
    assert set(saved.state_dict()) == {"order", "boundaries"}
    loaded.load_state_dict(saved.state_dict())
    check_partition(loaded, 50, 8, list(range(49, -1, -1)))
    check_partition(original, 50, 8, list(range(50)))


def test_a_shortlist_is_groups_of_one_token() -> None:
    partition = equal_partition(20, 5, torch.arange(20).flip(0), shortlist=4)
    assert partition.sizes.tolist() == [1, 1, 1, 1, 5, 5, 6]
    assert partition.order[:4].tolist() == [19, 18, 17, 16]
    assert partition.single_groups.tolist() == [0, 1, 2, 3]
    assert partition.multi_groups.tolist() == [4, 5, 6]
    assert partition.multi_index.tolist() == [-1, -1, -1, -1, 0, 1, 2]
    assert partition.multi_positions.tolist() == list(range(4, 20))
    assert partition.multi_tokens.tolist() == list(range(15, -1, -1))
    assert partition.multi_bounds == partition.multi_starts.tolist() == [0, 5, 10, 16]
    assert partition.first_multi_token is None
    index = torch.tensor([[2, 0], [1, 1]])
    assert partition.exists_in(index).equal(partition.multi_slot_exists[index])
    assert partition.exists_in(index).equal(partition.places_of(index)[1])
    assert equal_partition(20, 5, shortlist=4).first_multi_token == 4
    assert equal_partition(20, 20).first_multi_token == 0
    assert equal_partition(3, 1).first_multi_token is None
    assert equal_partition(1004, shortlist=4).num_slots == 32


@pytest.mark.parametrize("shortlist", [-1, 97, 200])
def test_a_shortlist_outside_the_vocabulary_is_refused(shortlist: int) -> None:
    with pytest.raises(UserError, match=f"shortlist is {shortlist}: choose 0 or more, below the vocabulary size 97"):
        equal_partition(97, 3, shortlist=shortlist)
    with pytest.raises(UserError, match="group_size is 88: choose between 1 and the 87 tokens outside the shortlist"):
        equal_partition(97, 88, shortlist=10)


def least_cost(probabilities: np.ndarray, num_groups: int) -> float:
    """The least sum of probability times group size that so many groups of successive tokens can have, by trying all
    starts of the last group."""
    mass = np.concatenate([[0.0], probabilities.cumsum()])
    best = np.full((num_groups + 1, len(mass)), np.inf)
    best[0, 0] = 0.0
    for groups in range(1, num_groups + 1):
        for stop in range(groups, len(mass)):
            starts = np.arange(groups - 1, stop)
            best[groups, stop] = (best[groups - 1, starts] + (mass[stop] - mass[starts]) * (stop - starts)).min()
    return float(best[num_groups, -1])


@pytest.mark.parametrize("num_groups", [5, 20, 40])
def test_rising_groups_cost_little_more_than_the_best_of_as_many(num_groups: int) -> None:
    size = 400
    boundaries = rising_boundaries(size, size // num_groups)
    least = min(LEAST_RISING, size / num_groups / 2)
    offset = (least * num_groups / 2) ** 2 / size
    probabilities = 1 / (np.arange(size) + offset)[1:]
    probabilities = np.concatenate([[probabilities[0]], probabilities]) / probabilities.sum()

    def cost(starts: torch.Tensor) -> float:
        mass = np.add.reduceat(probabilities, starts[:-1].numpy())
        return float((mass * starts.diff().numpy()).sum())

    assert len(boundaries) == num_groups + 1
    assert cost(boundaries) < 1.06 * least_cost(probabilities, num_groups)
    assert cost(boundaries) < 0.9 * cost(equal_boundaries(size, size // num_groups))
    assert (boundaries.diff().diff() >= -1).all()  # rounded


@pytest.mark.parametrize("size_and_group", [(1, 1), (2, 1), (2, 2), (97, 1), (97, 97), (97, 10), (50_257, 126)])
@pytest.mark.parametrize("shortlist", [0, 1, 30])
def test_rising_groups_are_as_many_as_equal_ones_and_none_is_empty(
    size_and_group: tuple[int, int], shortlist: int
) -> None:
    size, group_size = size_and_group
    size += shortlist
    boundaries = rising_boundaries(size, group_size, shortlist)
    assert len(boundaries) == len(equal_boundaries(size, group_size, shortlist))
    assert boundaries[0] == 0 and boundaries[-1] == size and (boundaries.diff() >= 1).all()
    assert torch.equal(boundaries[: shortlist + 1], torch.arange(shortlist + 1))
    bands = bands_of(boundaries, shortlist)
    assert len(bands) == len(boundaries) - 1 - shortlist and (bands.diff() >= 0).all() and bands[0] == 0


def test_sizes_of_rising_groups_at_the_papers_vocabulary() -> None:
    sizes = rising_boundaries(50_257, 225).diff()
    assert (len(sizes), int(sizes[0]), int(sizes[-1])) == (224, 9, 440)
    assert int(bands_of(rising_boundaries(50_257, 225)).max()) == 15
