"""Batches: each token predicted once, the same from any starting point and over any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vocabfold.data.batches import Batches
from vocabfold.data.token_file import TokenFile, write_token_file
from vocabfold.errors import UserError
from vocabfold.tokens import IGNORE_INDEX

END = 999


def token_file(folder: Path, lengths: list[int], vocabulary_size: int = 1000) -> TokenFile:
    """Documents of distinct rising ids (so that a token tells its position), each ending in END."""
    total = sum(lengths)
    tokens = np.arange(total)
    if vocabulary_size == 1000:
        tokens[np.cumsum(lengths) - 1] = END
    else:
        tokens += vocabulary_size - total
    return write_token_file(folder, [(tokens, np.array(lengths))], vocabulary_size, {})


def make(tokens: TokenFile, **settings: Any) -> Batches:
    return Batches(tokens, **{"sequence_length": 8, "batch_size": 4, "seed": 1, "end_token": END, **settings})


def predicted_pairs(batches: list[tuple[Tensor, Tensor]]) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == torch.int64
        kept = targets != IGNORE_INDEX
        counts.update(zip(inputs[kept].tolist(), targets[kept].tolist(), strict=True))
    return counts


@pytest.mark.parametrize("total", [2, 9, 10, 65, 97, 100])
def test_packed_evaluation_predicts_every_token_but_the_first_once(tmp_path: Path, total: int) -> None:
    tokens = token_file(tmp_path / "f", [total])
    stream = tokens.tokens.tolist()
    pairs = predicted_pairs(list(make(tokens, shuffle=False).evaluation_batches()))
    assert pairs == Counter(pairwise(stream))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_target_positions_are_those_of_the_evaluation(tmp_path: Path, layout: str) -> None:
    tokens = token_file(tmp_path / "f", [1, 20, 3, 9, 10, 2, 40])  # one without a target when padded, others cut
    batches = make(tokens, layout=layout, shuffle=False)
    targets = torch.cat([targets[targets != IGNORE_INDEX] for _, targets in batches.evaluation_batches()])
    positions = batches.target_positions()
    assert np.asarray(tokens.tokens)[positions].tolist() == targets.tolist()
    assert len(np.unique(positions)) == len(positions) and positions.min() >= 1
    if layout == "packed":
        assert positions.tolist() == list(range(1, 85))


@pytest.mark.parametrize("total", [97, 100, 104])
def test_packed_epoch_predicts_every_token_but_the_first_once(tmp_path: Path, total: int) -> None:
    """Twelve full windows in three batches; what is past them is the ragged rest that training leaves out."""
    tokens = token_file(tmp_path / "f", [total])
    stream = tokens.tokens.tolist()[:97]
    batches = make(tokens)
    assert batches.batches_per_epoch == 3
    for epoch in range(3):
        shapes = [batches.batch(3 * epoch + i) for i in range(3)]
        assert all(inputs.shape == targets.shape == (4, 8) for inputs, targets in shapes)
        assert predicted_pairs(shapes) == Counter(pairwise(stream))


def test_each_epoch_has_its_own_order_and_each_seed(tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "f", [801])
    batches = make(tokens)
    first = batches.batch(0)[0]
    assert not torch.equal(first, batches.batch(batches.batches_per_epoch)[0])
    assert not torch.equal(first, make(tokens, seed=2).batch(0)[0])
    assert not torch.equal(first, make(tokens, shuffle=False).batch(0)[0])
    assert make(tokens, shuffle=False).batch(0)[0].flatten().tolist() == list(range(32))


def test_resumes_at_any_index(tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "f", [500])
    straight = make(tokens)
    run = [straight.batch(index) for index in range(40)]
    for index in (17, 39, 3, 25):
        inputs, targets = make(tokens).batch(index)
        assert torch.equal(inputs, run[index][0]) and torch.equal(targets, run[index][1])
        assert torch.equal(straight.batch(index)[0], run[index][0])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_are_one_process(tmp_path: Path, world_size: int, layout: str) -> None:
    tokens = token_file(tmp_path / "f", [5, 20, 1, 9, 12, 8, 3, 30, 7, 6, 11])
    whole = make(tokens, layout=layout)
    ranks = [make(tokens, layout=layout, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(5):
        parts = [rank.batch(index) for rank in ranks]
        for which in (0, 1):
            joined = torch.stack([part[which] for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, whole.batch(index)[which])
    evaluated = [list(rank.evaluation_batches()) for rank in ranks]
    assert len({len(batches) for batches in evaluated}) == 1
    together = sum((predicted_pairs(batches) for batches in evaluated), Counter())
    assert together == predicted_pairs(list(whole.evaluation_batches()))


def test_padded_rows(tmp_path: Path) -> None:
    """Lengths with the end token: shorter than, equal to and longer than T + 1 = 9; an empty one predicts nothing."""
    tokens = token_file(tmp_path / "f", [4, 1, 9, 12])
    ((inputs, targets),) = make(tokens, layout="padded", shuffle=False).evaluation_batches()
    none = IGNORE_INDEX
    assert inputs.tolist() == [
        [0, 1, 2, END, END, END, END, END],
        [5, 6, 7, 8, 9, 10, 11, 12],
        [14, 15, 16, 17, 18, 19, 20, 21],
    ]
    assert targets.tolist() == [
        [1, 2, END, none, none, none, none, none],
        [6, 7, 8, 9, 10, 11, 12, END],
        [15, 16, 17, 18, 19, 20, 21, 22],
    ]


def test_padded_training_takes_documents_once_an_epoch(tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "f", [5] * 11)
    batches = make(tokens, layout="padded")
    assert batches.batches_per_epoch == 2
    rows = torch.cat([batches.batch(0)[0], batches.batch(1)[0]])[:, 0].tolist()
    assert len(set(rows)) == 8 and all(row % 5 == 0 for row in rows)


def test_packed_without_an_end_token_pads_the_last_window(tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "f", [12])
    ((inputs, targets),) = make(tokens, end_token=None, shuffle=False).evaluation_batches()
    assert inputs[1].tolist() == [8, 9, 10, END, 0, 0, 0, 0]
    assert targets[1].tolist() == [9, 10, END] + [IGNORE_INDEX] * 5


def test_large_vocabulary(tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "f", [100], vocabulary_size=1_000_000)
    assert tokens.tokens.dtype == np.uint32
    inputs, targets = make(tokens, end_token=None, shuffle=False).batch(0)
    assert inputs[0, 0] == 999_900 and targets[0, 0] == 999_901


@pytest.mark.parametrize("total", [32, 30, 2])
def test_less_than_a_batch(tmp_path: Path, total: int) -> None:
    tokens = token_file(tmp_path / "f", [total])
    with pytest.raises(UserError, match="less than one batch of 4; give it more text"):
        make(tokens)
    evaluation = make(tokens, shuffle=False)
    assert predicted_pairs(list(evaluation.evaluation_batches())).total() == total - 1
    with pytest.raises(UserError, match="less than one batch"):
        evaluation.batch(0)


def test_exactly_one_batch(tmp_path: Path) -> None:
    assert make(token_file(tmp_path / "f", [33])).batches_per_epoch == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "ragged"}, "packed or padded"),
        ({"layout": "padded", "end_token": None}, "end token"),
        ({"sequence_length": 0}, "sequence length"),
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 5, "world_size": 2}, "multiple"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(token_file(tmp_path / "f", [100]), **settings)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_nothing_to_predict(tmp_path: Path, layout: str) -> None:
    lengths = [1] if layout == "packed" else [1, 1, 1]
    with pytest.raises(UserError, match="no token to predict"):
        make(token_file(tmp_path / "f", lengths), layout=layout, shuffle=False)
