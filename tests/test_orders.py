"""Orders of the vocabulary: counts against a plain count, planted structure found again, runs that need no corpus."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vocabfold import train as training
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead, HeadSettings, build_head, orders
from vocabfold.heads.orders import (
    banded_order,
    clustered_order,
    cooccurrence_embedding,
    frequency_order,
    random_order,
)
from vocabfold.heads.partition import bands_of, equal_boundaries, rising_boundaries
from vocabfold.heads.settings import PartitionSettings
from vocabfold.heads.vocabulary_order import vocabulary_order
from vocabfold.models.build import build_model
from vocabfold.runs.checkpoint import load_weights
from vocabfold.runs.compose import composed_settings
from vocabfold.runs.settings import Settings
from vocabfold.runs.token_order import saved_embedding, token_order
from vocabfold.tokens import token_counts

STREAM = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], dtype=np.uint16)


def test_counts_are_those_of_the_whole_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Counter(STREAM.tolist())
    for block in (2, 3, 100):
        monkeypatch.setattr(orders, "BLOCK_TOKENS", block)
        assert token_counts(STREAM, 12).tolist() == [expected[token] for token in range(12)]


def test_frequency_order_breaks_ties_by_id() -> None:
    assert frequency_order(token_counts(STREAM, 8 + 2)).tolist() == [5, 1, 3, 2, 4, 6, 9, 0, 7, 8]


def test_random_order_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_order(500, 7)
    torch.manual_seed(2)
    assert torch.equal(first, random_order(500, 7))
    assert torch.equal(first.sort().values, torch.arange(500))
    assert not torch.equal(first, random_order(500, 8))


def planted(num_groups: int, num_slots: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that are a sum of their topic's and their role's vector, shuffled: (embedding, topic, role)."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(num_groups, 40, generator=generator) * 3
    roles = torch.randn(num_slots, 40, generator=generator)
    shuffled = torch.randperm(num_groups * num_slots, generator=generator)
    topic, role = shuffled // num_slots, shuffled % num_slots
    rows = topics[topic] + roles[role] + noise * torch.randn(len(shuffled), 40, generator=generator)
    return rows, topic, role


def test_clusters_find_planted_groups_and_slots() -> None:
    num_groups, num_slots = 16, 9
    rows, topic, role = planted(num_groups, num_slots, noise=0.1)
    order = clustered_order(rows, equal_boundaries(len(rows), num_slots))
    assert torch.equal(order.sort().values, torch.arange(len(rows)))
    topics, roles = topic[order].view(num_groups, num_slots), role[order].view(num_groups, num_slots)
    assert sum(len(set(group.tolist())) == 1 for group in topics) >= num_groups - 4
    # each slot holds one role in nearly all groups
    share = [int(roles[:, slot].mode().values.eq(roles[:, slot]).sum()) / num_groups for slot in range(num_slots)]
    assert sum(share) / num_slots > 0.85
    assert torch.equal(order, clustered_order(rows, equal_boundaries(len(rows), num_slots)))


@pytest.mark.parametrize(
    ("vocabulary_size", "group_size", "shortlist"), [(97, 10, 0), (97, 1, 0), (97, 97, 0), (50, 7, 13), (2, 1, 1)]
)
def test_clusters_fit_any_sizes(vocabulary_size: int, group_size: int, shortlist: int) -> None:
    rows = torch.randn(vocabulary_size, 5, generator=torch.Generator().manual_seed(0))
    shortlisted = torch.arange(vocabulary_size).flip(0)[:shortlist]
    order = clustered_order(rows, equal_boundaries(vocabulary_size, group_size, shortlist), shortlisted)
    assert torch.equal(order.sort().values, torch.arange(vocabulary_size))
    assert torch.equal(order[:shortlist], shortlisted)


@pytest.mark.parametrize(("known_tokens", "shortlist"), [(40, 0), (40, 5), (9, 0), (1, 0), (0, 0), (97, 3)])
def test_tokens_that_say_nothing_are_dealt_out_evenly_into_the_last_slots(known_tokens: int, shortlist: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(97, 5, generator=generator)
    known = torch.zeros(97, dtype=torch.bool)
    known[torch.randperm(97, generator=generator)[:known_tokens]] = True
    shortlisted = known.nonzero().squeeze(-1)[:shortlist]
    boundaries = equal_boundaries(97, 10, shortlist)
    order = clustered_order(rows, boundaries, shortlisted, known)
    assert torch.equal(order.sort().values, torch.arange(97))
    assert torch.equal(order[:shortlist], shortlisted)
    share = (known_tokens - shortlist) / (97 - shortlist)
    for start, stop in zip(boundaries[shortlist:-1].tolist(), boundaries[shortlist + 1 :].tolist(), strict=True):
        group = known[order[start:stop]]
        assert abs(int(group.sum()) - share * len(group)) < 1
        assert torch.equal(group, group.sort(descending=True).values)


def test_an_embedding_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        clustered_order(torch.full((4, 2), torch.nan), equal_boundaries(4, 2))


def test_neighbours_tell_tokens_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of tokens that follow different markers."""
    generator = random.Random(0)
    stream: list[int] = []
    for _ in range(6000):
        kind = generator.randrange(2)
        stream += [kind, 2 + kind + 2 * generator.randrange(20)]
    tokens = np.array(stream, dtype=np.uint16)
    whole = cooccurrence_embedding(tokens, 42, token_counts(tokens, 42))
    monkeypatch.setattr(orders, "BLOCK_TOKENS", 1001)
    torch.testing.assert_close(cooccurrence_embedding(tokens, 42, token_counts(tokens, 42)), whole)
    embedding = whole / whole.norm(dim=1, keepdim=True)
    even, odd = embedding[2::2].mean(0), embedding[3::2].mean(0)
    assert ((embedding[2::2] @ even) > (embedding[2::2] @ odd)).all()
    assert ((embedding[3::2] @ odd) > (embedding[3::2] @ even)).all()


def test_a_text_of_few_tokens_can_be_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK gives up in float32 on the products of a real vocabulary of which a text has a dozen tokens."""
    tokens, exact = np.tile(STREAM, 20), torch.linalg.eigh
    expected = cooccurrence_embedding(tokens, 12, token_counts(tokens, 12))

    def gives_up(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return exact(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    found = cooccurrence_embedding(tokens, 12, token_counts(tokens, 12))
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["bpe", "frequency", "random", "clustered", "exchanged"])
@pytest.mark.parametrize("shortlist", [0, 3])
def test_token_order_dispatches(order: str, shortlist: int) -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 5000).clip(1, 60).astype(np.uint16) - 1
    settings = HeadSettings(
        type="folded", tied=False, partition=PartitionSettings(order=order, shortlist=shortlist, seed=4)
    )
    found = token_order(settings, 60, tokens)
    assert found is not None
    counts = token_counts(tokens, 60)
    expected = {
        "bpe": torch.arange(60),
        "frequency": frequency_order(counts),
        "random": random_order(60, 4),
        "clustered": found,
        "exchanged": found,
    }
    assert torch.equal(found, expected[order])
    head = build_head(settings, 60, nn.Embedding(60, 8), found)
    assert isinstance(head, FoldedHead)
    assert torch.equal(head.partition.order, found)
    assert head.partition.sizes[:shortlist].eq(1).all()
    if order in ("clustered", "exchanged"):
        assert torch.equal(found[:shortlist], frequency_order(counts)[:shortlist])


def test_a_learned_order_is_kept_and_a_damaged_one_learned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 5000).clip(1, 60).astype(np.uint16) - 1
    settings = HeadSettings(type="folded", tied=False, partition=PartitionSettings(order="exchanged"))
    expected = token_order(settings, 60, tokens)
    assert expected is not None
    cache = tmp_path / "cache"
    first = token_order(settings, 60, tokens, cache)
    (kept,) = cache.glob("order-*.npy")
    learned = []

    def learn(*arguments: Any) -> Tensor | None:
        learned.append(len(arguments[2]))
        return vocabulary_order(*arguments)

    monkeypatch.setattr("vocabfold.runs.token_order.vocabulary_order", learn)
    second = token_order(settings, 60, tokens, cache)
    assert first is not None and second is not None
    assert torch.equal(first, expected) and torch.equal(second, expected) and not learned
    for damage in (b"", kept.read_bytes()[:-8], kept.read_bytes()[:-4] + bytes(4)):
        kept.write_bytes(damage)
        again = token_order(settings, 60, tokens, cache)
        assert again is not None and torch.equal(again, expected) and len(learned) == 1
        learned.clear()
    # another stream, another partition: orders of their own; what is not learned is not kept
    token_order(settings, 60, tokens[:-1], cache)
    token_order(replace(settings, partition=PartitionSettings(order="exchanged", group_size=5)), 60, tokens, cache)
    token_order(replace(settings, partition=PartitionSettings(order="frequency")), 60, tokens, cache)
    assert learned == [4999, 5000, 5000] and len(list(cache.glob("order-*.npy"))) == 3


def test_a_head_without_a_partition_has_no_order() -> None:
    assert token_order(HeadSettings(), 60, STREAM) is None


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (PartitionSettings(order="x"), "choose one of bpe, frequency, random, clustered, clustered_before"),
        (PartitionSettings(order="clustered", clustered_from="nowhere"), "clustered_from=nowhere: model.safetensors"),
        (PartitionSettings(order="clustered", shortlist=60), "shortlist is 60: choose 0 or more, below"),
    ],
)
def test_token_order_names_what_is_wrong(partition: PartitionSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_order(HeadSettings(type="folded", partition=partition), 60, STREAM)


def settings_of(*overrides: str) -> Settings:
    tiny = ["data=zipf", "data.vocabulary_size=101", "data.num_train_tokens=3000", "data.num_valid_tokens=200"]
    tiny += ["sequence_length=16", "batch_size=4", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"]
    tiny += ["budget.tokens=null", "budget.steps=3", "wandb.mode=disabled", "device=cpu", "optimizer.name=adamw"]
    return composed_settings([*tiny, *overrides])


def test_a_run_by_frequency_is_loaded_without_its_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    settings = settings_of(
        "head=paper",
        "head.partition.order=frequency",
        "head.partition.shortlist=9",
        "head.scorer=linear_sorted",
        "head.tied=true",
        "run_dir=run",
    )
    row = training.train(settings, "")
    assert row["shortlist"] == 9 and row["partition_order"] == "frequency"
    corpus = training.load_data(settings.data)
    model = build_model(settings.model, settings.head, 101).eval()
    load_weights(Path("run"), model)
    assert isinstance(model.head, FoldedHead)
    assert torch.equal(model.head.partition.order, frequency_order(token_counts(corpus.train.tokens, 101)))
    tokens = torch.from_numpy(corpus.valid.tokens.astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[start : start + 17]
            log_prob = model.head.log_prob(model.backbone(window[None, :-1])[0])
            total -= float(log_prob.gather(-1, window[1:, None]).sum())
    assert row["validation_loss_nats"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)

    torch.testing.assert_close(saved_embedding(Path("run"), 101), model.backbone.token_embedding.weight.detach())
    with pytest.raises(UserError, match="trained on 101 tokens, this corpus has 102"):
        saved_embedding(Path("run"), 102)
    clustered = settings_of(
        "head=paper", "head.partition.order=clustered", "head.partition.clustered_from=run", "run_dir=clustered"
    )
    assert training.train(clustered, "")["clustered_from"] == "run"


@pytest.mark.parametrize("head", ["full", "paper"])
def test_the_saved_embedding_is_found_under_any_head(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    settings = settings_of(f"head={head}", "run_dir=run")
    training.train(settings, "")
    model = build_model(settings.model, settings.head, 101)
    load_weights(Path("run"), model)
    torch.testing.assert_close(saved_embedding(Path("run"), 101), model.backbone.token_embedding.weight.detach())


@pytest.mark.parametrize("shortlist", [0, 5])
def test_bands_keep_their_tokens_and_cluster_them(shortlist: int) -> None:
    rows, topic, _ = planted(32, 8, noise=0.1)
    ranked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    boundaries = rising_boundaries(len(rows), 8, shortlist)
    bands = bands_of(boundaries, shortlist)
    order = banded_order(rows, boundaries, bands, ranked)
    assert torch.equal(order[:shortlist], ranked[:shortlist])
    for band in bands.unique().tolist():
        members = (bands == band).nonzero().squeeze(-1) + shortlist
        start, stop = int(boundaries[members[0]]), int(boundaries[members[-1] + 1])
        assert set(order[start:stop].tolist()) == set(ranked[start:stop].tolist())

    def alike(tokens: torch.Tensor) -> float:
        groups = [topic[tokens[start:stop]] for start, stop in itertools.pairwise(boundaries.tolist())]
        return sum(int((group == group.mode().values).sum()) for group in groups) / len(rows)

    assert alike(order) > 1.3 * alike(ranked)
    # One band is what clustered_order does.
    single = banded_order(rows, boundaries, torch.zeros_like(bands), ranked)
    rest = ranked[shortlist:]
    plain = clustered_order(rows[rest], boundaries[shortlist:] - shortlist)
    assert torch.equal(single, torch.cat([ranked[:shortlist], rest[plain]]))
