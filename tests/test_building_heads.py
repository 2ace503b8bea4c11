"""From settings to a head: the one that they name, tied or not, its description, and what no head can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F

from head_cases import HIDDEN_SIZE
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead, HeadSettings, LoopedLinearScorer, ScaleShiftScorer, build_head, folded_head
from vocabfold.heads.describe import describe_head
from vocabfold.heads.nested import NestedFoldedHead
from vocabfold.heads.settings import PartitionSettings
from vocabfold.heads.vocabulary_order import vocabulary_order
from vocabfold.runs.settings import CONFIG_FOLDER, settings_from
from vocabfold.tokens import token_counts


@pytest.mark.parametrize("name", ["full", "folded"])
def test_a_tied_head_uses_the_embedding_itself(name: str) -> None:
    embedding = nn.Embedding(30, HIDDEN_SIZE)
    before = embedding.weight.detach().clone()
    head = build_head(HeadSettings(type=name, tied=True, scorer="linear_sorted"), 30, embedding)
    assert any(parameter is embedding.weight for parameter in head.parameters())
    assert torch.equal(embedding.weight, before)
    head.loss(torch.randn(4, HIDDEN_SIZE), torch.tensor([1, 2, 3, 29])).loss.backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[29].abs().sum() > 0


@pytest.mark.parametrize("scorer", ["scale_shift", "linear_looped"])
def test_build_folded_head(scorer: str) -> None:
    settings = HeadSettings(
        name="paper", type="folded", tied=False, scorer=scorer, init_std=0.1, partition=PartitionSettings(group_size=7)
    )
    embedding = nn.Embedding(5000, HIDDEN_SIZE)
    head = build_head(settings, 5000, embedding)
    assert isinstance(head, FoldedHead)
    assert isinstance(head.scorer, ScaleShiftScorer if scorer == "scale_shift" else LoopedLinearScorer)
    assert all(parameter is not embedding.weight for parameter in head.parameters())
    assert float(head.group_weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert describe_head(settings, head) == {
        "head": "paper",
        "tied": False,
        "scorer": scorer,
        "partition_order": "bpe",
        "group_size": 7,
        "num_groups": 715,
        "shortlist": 0,
    }
    settings.scorer, settings.partition = "low_rank", PartitionSettings("random", 7, seed=3)
    row = describe_head(settings, build_head(settings, 5000, embedding))
    assert (row["scorer"], row["head_rank"]) == ("low_rank", 4)
    assert (row["partition_order"], row["partition_seed"]) == ("random", 3)
    full = HeadSettings(tied=False)
    assert describe_head(full, build_head(full, 5000, embedding)) == {"head": "full", "tied": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HeadSettings(type="ful"), r"head\.type is 'ful': choose one of full, folded, chunked, adaptive, fused"),
        (
            HeadSettings(type="folded", scorer="x"),
            r"head\.scorer is 'x': choose one of scale_shift, scale_shift_sorted,",
        ),
        (
            HeadSettings(type="folded", partition=PartitionSettings(order="x")),
            r"order is 'x': choose one of bpe, freq",
        ),
        (HeadSettings(type="folded", tied=True), r"use head\.tied=false or head\.scorer=linear_sorted"),
        (HeadSettings(type="folded", tied=False, partition=PartitionSettings(group_size=0)), r"group_size is 0"),
        (
            HeadSettings(type="folded", partition=PartitionSettings(group_sizes="x")),
            r"head\.partition\.group_sizes is 'x': choose one of equal, rising",
        ),
        (HeadSettings(type="folded", partition=PartitionSettings(symbols=4)), r"symbols is 4: choose 2 or 3"),
        (
            HeadSettings(type="folded", tied=False, group_scorer="wide", partition=PartitionSettings(symbols=3)),
            r"symbols=3 groups are scored as tokens are: use head\.group_scorer=linear",
        ),
        (
            HeadSettings(type="folded", tied=False, group_scorer="x"),
            r"group_scorer is 'x': choose one of linear",
        ),
        (
            HeadSettings(type="folded", tied=False, group_scorer="shared"),
            r"linear_conditioned: use residual",
        ),
        (
            HeadSettings(type="folded", tied=False, group_scorer="wide", group_width=0),
            r"head\.group_width is 0: choose at least 1, or head\.group_scorer=linear",
        ),
    ],
)
def test_build_head_names_what_is_wrong(settings: HeadSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE))


def test_three_symbols_share_the_cube_root() -> None:
    settings = HeadSettings(type="folded", tied=False, scorer="linear_sorted", partition=PartitionSettings(symbols=3))
    head = build_head(settings, 1000, nn.Embedding(1000, HIDDEN_SIZE))
    assert isinstance(head, NestedFoldedHead)
    assert head.partition.num_slots == head.groups.partition.num_slots == head.groups.partition.num_groups == 10
    assert describe_head(settings, head)["symbols"] == 3


@pytest.mark.parametrize("order", ["frequency", "clustered", "exchanged"])
@pytest.mark.parametrize("scorer", ["linear_sorted", "linear_conditioned", "scale_shift_sorted"])
def test_rising_groups_hold_frequent_tokens_in_small_ones_and_stay_exact(order: str, scorer: str) -> None:
    size = 400
    tokens = np.random.default_rng(0).zipf(1.3, 5000) % size
    partition = PartitionSettings(order, group_sizes="rising", shortlist=3)
    settings = HeadSettings(type="folded", tied=False, scorer=scorer, partition=partition, count_biases=True)
    found = vocabulary_order(settings, size, tokens)
    counts = token_counts(tokens, size)
    head = build_head(settings, size, nn.Embedding(size, HIDDEN_SIZE), found, counts)
    assert isinstance(head, FoldedHead)
    assert describe_head(settings, head)["group_sizes"] == "rising"
    equal = build_head(replace(settings, partition=PartitionSettings(order)), size, nn.Embedding(size, HIDDEN_SIZE))
    assert isinstance(equal, FoldedHead)
    rows = (head.partition.sizes[head.partition.group_of] * counts).sum() / counts.sum()
    assert rows < 0.6 * equal.partition.num_slots
    # Loaded into a head that knows no order, as of a finished run, and compared with the sum over all tokens.
    loaded = build_head(settings, size, nn.Embedding(size, HIDDEN_SIZE))
    loaded.load_state_dict(head.state_dict())
    hidden = torch.randn(7, HIDDEN_SIZE, dtype=torch.float64, requires_grad=True)
    head, loaded = head.double(), loaded.double()
    targets = torch.randint(size, (7,))
    log_probs = head.log_prob(hidden)
    torch.testing.assert_close(log_probs.logsumexp(1), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    expected = -log_probs.gather(1, targets[:, None]).mean()
    torch.testing.assert_close(loaded.loss(hidden, targets).loss, expected)
    (wanted,) = torch.autograd.grad(expected, hidden)
    (found,) = torch.autograd.grad(head.loss(hidden, targets).loss, hidden)
    torch.testing.assert_close(found, wanted)


def test_a_tied_head_needs_a_row_for_each_token() -> None:
    with pytest.raises(UserError, match=r"31 rows for 30 tokens"):
        build_head(HeadSettings(), 30, nn.Embedding(31, HIDDEN_SIZE))


def test_a_folded_head_takes_the_place_of_a_linear_layer_in_a_model_of_ones_own() -> None:
    """The lines of README.md, before and after, in one small model that learns with both."""
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, 12, 500) * 4  # a quarter of the vocabulary
    inputs, targets = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
    losses = {}
    for kind in ("before", "after"):
        embedding = nn.Embedding(50, 16)
        if kind == "before":
            lm_head = nn.Linear(16, 50, bias=False)
            parameters = [*embedding.parameters(), *lm_head.parameters()]
        else:
            head = folded_head(16, 50, tokens)
            parameters = [*embedding.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        for _ in range(30):
            hidden = embedding(inputs)
            loss = F.cross_entropy(lm_head(hidden), targets) if kind == "before" else head.loss(hidden, targets).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["after"] < 2.6 and abs(losses["after"] - losses["before"]) < 0.3  # log 12 = 2.48
    assert head.log_prob(hidden[:5]).exp().sum(dim=-1).allclose(torch.ones(5))
    assert set(head.sample(hidden[:50], top_p=0.5).tolist()) <= set(tokens.tolist())


def test_folded_head_groups_by_neighbours_by_ids_and_shares_rows() -> None:
    tokens = np.arange(3000) % 60
    by_neighbours, by_ids = folded_head(8, 60, tokens, group_size=6, shortlist=3), folded_head(8, 60, group_size=6)
    assert by_neighbours.partition.order[:3].tolist() == [0, 1, 2]
    assert (by_neighbours.partition.sizes[:3] == 1).all() and by_neighbours.partition.num_slots <= 7
    assert by_ids.partition.order.tolist() == list(range(60))
    assert not torch.equal(by_neighbours.partition.order.sort().values, by_neighbours.partition.order)
    with pytest.raises(UserError, match="61 rows for 60 tokens"):
        folded_head(8, 60, tokens, tied_weight=nn.Embedding(61, 8).weight)
    embedding = nn.Embedding(60, 8)
    tied = folded_head(8, 60, tokens, tied_weight=embedding.weight)
    assert any(parameter is embedding.weight for parameter in tied.parameters())
    with pytest.raises(UserError, match="give the tokens of the training text"):
        folded_head(8, 60, shortlist=3)


def test_folded_head_is_what_head_folded_trains() -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 3000)
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        settings = settings_from(compose("train", ["head=folded"])).head
    heads, embedding = [], nn.Embedding(60, 8)
    for make in (0, 1):
        torch.manual_seed(0)
        if make:
            heads.append(folded_head(8, 60, tokens, tied_weight=embedding.weight))
        else:
            order = vocabulary_order(settings, 60, tokens)
            heads.append(build_head(settings, 60, embedding, order, token_counts(tokens, 60)))
    first, second = (head.state_dict() for head in heads)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["mixture_clustered", "folded"])
def test_a_head_that_was_built_for_a_text_can_be_saved(name: str, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 3000)
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        settings = settings_from(compose("train", [f"head={name}"])).head
    order = vocabulary_order(settings, 60, tokens)
    head = build_head(settings, 60, nn.Embedding(60, 8), order, token_counts(tokens, 60))
    safetensors.torch.save_model(head, tmp_path / "head.safetensors")
    hidden = torch.randn(5, 8)
    expected = head.log_prob(hidden)
    for parameter in head.parameters():
        parameter.data.zero_()
    safetensors.torch.load_model(head, tmp_path / "head.safetensors")
    torch.testing.assert_close(head.log_prob(hidden), expected)
