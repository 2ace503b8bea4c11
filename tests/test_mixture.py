"""A mixture of folded heads beyond the contract: its bounds, its settings and what its parts are built on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from head_cases import HIDDEN_SIZE, Layout, make_head, make_hidden
from vocabfold.errors import UserError
from vocabfold.heads import HeadSettings, MixtureHead, build_head
from vocabfold.heads.describe import describe_head
from vocabfold.heads.settings import PartitionSettings
from vocabfold.heads.vocabulary_order import vocabulary_order


@pytest.mark.parametrize("k", [1, 7])
def test_likeliest_tokens_come_from_the_bounds_and_rows_that_these_do_not_settle_are_computed_as_a_whole(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, _ = make_head("mixture_free", Layout(1009, 31, shuffled=True))
    assert isinstance(head, MixtureHead)
    for part in head.heads:  # biases that do not follow the hidden state would settle flat rows too
        assert part.group_bias is not None
        part.group_bias.data.zero_()
        part.scorer.bias.data.zero_()  # type: ignore[union-attr, operator]
    hidden = torch.tensor([0.001, 6.0] * 5)[:9, None] * make_hidden(9)
    expected = head.log_prob(hidden).topk(k, dim=-1)
    whole: list[Tensor] = []
    original = head._whole
    monkeypatch.setattr(head, "_whole", lambda rows: (whole.append(rows), original(rows))[1])
    values, tokens = head.topk(hidden, k)
    torch.testing.assert_close(values, expected.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(tokens, expected.indices)
    (flat,) = whole
    assert set(flat.tolist()) <= {0, 2, 4, 6, 8}
    assert len(flat) == 0 if k == 1 else len(flat) > 0


def test_one_part_decides_where_it_has_all_the_weight() -> None:
    head, _ = make_head("mixture_free", Layout(50, 7))
    assert isinstance(head, MixtureHead)
    head.mix.weight.data.zero_()
    head.mix.bias.data = torch.tensor([-1e3, 0.0], dtype=torch.float64)
    hidden = make_hidden(5)
    torch.testing.assert_close(head.log_prob(hidden), head.heads[1].log_prob(hidden))


def test_settings_build_a_part_for_each_order() -> None:
    tokens = np.random.default_rng(0).integers(0, 40, 3000)
    orders = ["clustered_before", "clustered_after", "random", "random"]
    settings = HeadSettings("m", "mixture", tied=False, scorer="linear_sorted", count_biases=True, mixture=orders)
    settings.partition = PartitionSettings(group_size=7)
    order = vocabulary_order(settings, 40, tokens)
    assert order is not None and order.shape == (4, 40)
    assert len({tuple(row) for row in order.tolist()}) == 4
    counts = torch.bincount(torch.from_numpy(tokens), minlength=40)
    embedding = nn.Embedding(40, HIDDEN_SIZE)
    head = build_head(settings, 40, embedding, order, counts)
    assert isinstance(head, MixtureHead)
    assert torch.equal(torch.stack([part.partition.order for part in head.heads]), order)
    unigram = (counts + 1).double() / (counts + 1).sum()
    torch.testing.assert_close(head.log_prob(torch.zeros(1, HIDDEN_SIZE)).exp()[0], unigram.float(), rtol=1e-4, atol=0)
    row = describe_head(settings, head)
    assert (row["head"], row["partition_order"], row["group_size"]) == ("m", "+".join(orders), 7)
    assert build_head(settings, 40, embedding).state_dict().keys() == head.state_dict().keys()


@pytest.mark.parametrize("side", ["before", "after"])
def test_one_side_of_a_token_is_enough_to_group_it(side: str) -> None:
    """Tokens 4 to 35 follow one of 0 to 3, by id, and are followed by another, by id // 8."""
    ids = np.random.default_rng(1).integers(4, 36, 4000)
    stream = np.stack([ids % 4, ids, ids // 8], axis=1)
    stream[:, 2] = np.minimum(stream[:, 2], 3)
    settings = HeadSettings("m", "folded", partition=PartitionSettings(f"clustered_{side}", 8, shortlist=4))
    order = vocabulary_order(settings, 36, stream.flatten())
    assert order is not None
    groups = order[4:].view(4, 8)
    alike = groups % 4 if side == "before" else (groups // 8).clamp(max=3)
    assert (alike == alike[:, :1]).float().mean() > 0.85


def test_what_no_mixture_can_be_is_named() -> None:
    settings = HeadSettings("m", "mixture", tied=False, scorer="linear_sorted", mixture=["bpe"])
    embedding = nn.Embedding(30, HIDDEN_SIZE)
    with pytest.raises(UserError, match=r"head\.mixture names 1 orders: choose two or more"):
        build_head(settings, 30, embedding)
    settings.mixture = ["bpe", "x"]
    with pytest.raises(UserError, match=r"head\.partition\.order is 'x'"):
        vocabulary_order(settings, 30, np.arange(30))
    settings.mixture, settings.partition.clustered_from = ["bpe", "random"], "folder"
    with pytest.raises(UserError, match=r"leave head\.partition\.clustered_from out"):
        vocabulary_order(settings, 30, np.arange(30))
    heads = [make_head("sorted_free", Layout(size, 5))[0] for size in (20, 21)]
    with pytest.raises(UserError, match=r"different sizes \[\(6, 20\), \(6, 21\)\]"):
        MixtureHead(heads)  # type: ignore[arg-type]
