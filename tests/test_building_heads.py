"""From settings to a head: the one that they name, tied or not, its description, and what no head can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from head_cases import HIDDEN_SIZE
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead, HeadSettings, LoopedLinearScorer, ScaleShiftScorer, build_head
from vocabfold.heads.describe import describe_head
from vocabfold.heads.settings import PartitionSettings


@pytest.mark.parametrize("name", ["full", "grouped"])
def test_a_tied_head_uses_the_embedding_itself(name: str) -> None:
    embedding = nn.Embedding(30, HIDDEN_SIZE)
    before = embedding.weight.detach().clone()
    head = build_head(HeadSettings(name=name, tied=True, scorer="linear_sorted"), 30, embedding)
    assert any(parameter is embedding.weight for parameter in head.parameters())
    assert torch.equal(embedding.weight, before)
    head.loss(torch.randn(4, HIDDEN_SIZE), torch.tensor([1, 2, 3, 29])).loss.backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[29].abs().sum() > 0


@pytest.mark.parametrize("scorer", ["scale_shift", "linear_looped"])
def test_build_grouped_head(scorer: str) -> None:
    settings = HeadSettings(
        name="grouped", tied=False, scorer=scorer, init_std=0.1, partition=PartitionSettings(group_size=7)
    )
    embedding = nn.Embedding(5000, HIDDEN_SIZE)
    head = build_head(settings, 5000, embedding)
    assert isinstance(head, FoldedHead)
    assert isinstance(head.scorer, ScaleShiftScorer if scorer == "scale_shift" else LoopedLinearScorer)
    assert all(parameter is not embedding.weight for parameter in head.parameters())
    assert float(head.group_weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert describe_head(settings, head) == {
        "head": "grouped",
        "tied": False,
        "scorer": scorer,
        "partition_order": "bpe",
        "group_size": 7,
        "num_groups": 715,
        "shortlist": 0,
    }
    settings.scorer, settings.partition = "low_rank", PartitionSettings("random", 7, seed=3)
    row = describe_head(settings, build_head(settings, 5000, embedding))
    assert (row["scorer"], row["partition_order"]) == ("low_rank_rank4", "random_seed3")
    full = HeadSettings(tied=False)
    assert describe_head(full, build_head(full, 5000, embedding)) == {"head": "full", "tied": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HeadSettings(name="ful"), r"head\.name is 'ful': choose one of full, grouped, chunked, adaptive, fused"),
        (
            HeadSettings(name="grouped", scorer="x"),
            r"head\.scorer is 'x': choose one of scale_shift, scale_shift_sorted,",
        ),
        (
            HeadSettings(name="grouped", partition=PartitionSettings(order="x")),
            r"order is 'x': choose one of bpe, freq",
        ),
        (HeadSettings(name="grouped", tied=True), r"use head\.tied=false or head\.scorer=linear_sorted"),
        (HeadSettings(name="grouped", tied=False, partition=PartitionSettings(group_size=0)), r"group_size is 0"),
    ],
)
def test_build_head_names_what_is_wrong(settings: HeadSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE))


def test_a_tied_head_needs_a_row_for_each_token() -> None:
    with pytest.raises(UserError, match=r"31 rows for 30 tokens"):
        build_head(HeadSettings(), 30, nn.Embedding(31, HIDDEN_SIZE))
