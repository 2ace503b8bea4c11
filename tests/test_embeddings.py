"""Every input embedding against float64 arithmetic written out: values, gradients, bytes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vocabfold.embeddings import (
    DenseEmbedding,
    EmbeddingSettings,
    LowRankEmbedding,
    MixedEmbedding,
    QuantizedEmbedding,
    TensorTrainEmbedding,
    TokenEmbedding,
    TTMatrixEmbedding,
    build_embedding,
    compress_table,
    relative_error,
    tt_matrix,
)
from vocabfold.embeddings.build import describe_embedding, resolve_settings
from vocabfold.errors import UserError
from vocabfold.heads import HeadSettings
from vocabfold.models.build import ModelSettings, build_model

VOCABULARY, HIDDEN = 101, 24
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tensor_train": {"mode_sizes": [2, 3, 4], "ranks": [2, 3]},
    "tt_matrix": {"rank": 5},
    "low_rank": {"rank": 7},
    "int8": {},
    "int4": {"group_size": 8},
    "mixed": {"group_size": 8, "frequent_rows": 58},
}
IDS = torch.tensor([[0, 100, 3], [3, 57, 3]])
MANY_IDS = torch.cat([IDS, torch.randint(VOCABULARY, (20, 3), generator=torch.Generator().manual_seed(0))])


def settings_of(name: str, **changes: Any) -> EmbeddingSettings:
    return EmbeddingSettings(name=name, **(KINDS[name] | changes))


def table(count: int = VOCABULARY, size: int = HIDDEN) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1))


def reference(embedding: TokenEmbedding, token: int) -> Tensor:
    """The row of one token, entry by entry from the definition, in float64."""
    row = torch.zeros(embedding.embedding_dim, dtype=torch.float64)
    if isinstance(embedding, DenseEmbedding):
        return embedding.weight[token].double()
    if isinstance(embedding, LowRankEmbedding):
        return embedding.narrow[token].double() @ embedding.widen.double()
    for column in range(embedding.embedding_dim):
        if isinstance(embedding, TensorTrainEmbedding):
            digits = digits_of(column, embedding.mode_sizes)
            product, begin = torch.ones(1, 1, dtype=torch.float64), 0
            ends = [1, *embedding.ranks, 1]
            for k, size in enumerate(embedding.mode_sizes):
                shape = (ends[k], size, ends[k + 1])
                core = embedding.cores[token, begin : begin + math.prod(shape)].double().view(shape)
                product, begin = product @ core[:, digits[k]], begin + math.prod(shape)
            row[column] = product
        elif isinstance(embedding, TTMatrixEmbedding):
            rows = digits_of(token, [core.shape[0] for core in embedding.cores])
            columns = digits_of(column, [core.shape[2] for core in embedding.cores])
            product = torch.ones(1, 1, dtype=torch.float64)
            for core, v, d in zip(embedding.cores, rows, columns, strict=True):
                product = product @ core[v, :, d].double()
            row[column] = product
        elif isinstance(embedding, MixedEmbedding):
            first = token < embedding.frequent_rows
            part = embedding.frequent if first else embedding.others
            return reference(part, token if first else token - embedding.frequent_rows)
        elif isinstance(embedding, QuantizedEmbedding):
            assert embedding.weight is not None
            first = column - column % embedding.group_size
            group = embedding.weight[token, first : first + embedding.group_size].double()
            largest = {8: 127, 4: 7}[embedding.bits]
            scale = (group.abs().max().float() / largest).bfloat16().double()
            code = (group[column - first] / scale).round().clamp(-largest, largest)
            row[column] = code * scale
    return row


def digits_of(number: int, sizes: list[int]) -> list[int]:
    digits = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        digits.insert(0, digit)
    return digits


@pytest.mark.parametrize("name", KINDS)
def test_lookups_are_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt_matrix, "SLICE_FLOPS", 0)  # sharing products pays for larger tables
    torch.manual_seed(0)
    for embedding in (
        build_embedding(settings_of(name), VOCABULARY, HIDDEN),
        compress_table(settings_of(name), table()),
    ):
        for ids in (IDS, MANY_IDS):  # a TT matrix multiplies in another order for many
            expected = torch.stack([reference(embedding, int(token)) for token in ids.flatten()]).view(*ids.shape, -1)
            torch.testing.assert_close(embedding(ids).double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embedding.rows(95, 101)[5], embedding(torch.tensor(100)))
        assert embedding.rows(4, 4).shape == (0, HIDDEN)
        assert embedding(IDS[:0]).shape == (0, 3, HIDDEN)


@pytest.mark.parametrize("name", ["tensor_train", "tt_matrix", "low_rank"])
@pytest.mark.parametrize("ids", [IDS, MANY_IDS], ids=["few", "many"])
def test_gradients_are_those_of_the_definition(name: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt_matrix, "SLICE_FLOPS", 0)
    torch.manual_seed(0)
    embedding = build_embedding(settings_of(name), VOCABULARY, HIDDEN).double()
    direction = torch.randn(*ids.shape, HIDDEN, dtype=torch.float64)
    names, parameters = zip(*embedding.named_parameters(), strict=True)
    fast = torch.autograd.grad((embedding(ids) * direction).sum(), parameters)
    rows = [reference(embedding, int(token)) for token in ids.flatten()]
    slow = torch.autograd.grad((torch.stack(rows) * direction.flatten(0, 1)).sum(), parameters)
    for which, ours, theirs in zip(names, fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, which=which: f"{which}: {text}")
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_quantised_gradient_passes_straight_through(name: str) -> None:
    embedding = compress_table(settings_of(name), table())
    assert isinstance(embedding, QuantizedEmbedding) and embedding.weight is not None
    direction = torch.randn(*IDS.shape, HIDDEN)
    (embedding(IDS) * direction).sum().backward()
    expected = torch.zeros(VOCABULARY, HIDDEN).index_add(0, IDS.flatten(), direction.flatten(0, 1))
    torch.testing.assert_close(embedding.weight.grad, expected)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_settling_keeps_codes_only_and_changes_no_lookup(name: str) -> None:
    weight = table()
    weight[3] = 0.0
    weight[4] *= 1e-30
    embedding = compress_table(settings_of(name), weight)
    before, promised = embedding.rows(0, VOCABULARY).detach(), (embedding.bytes_at_rest, embedding.num_parameters)
    embedding.prepare_for_inference()
    embedding.prepare_for_inference()
    assert torch.equal(embedding.rows(0, VOCABULARY), before) and torch.isfinite(before).all()
    assert not list(embedding.parameters())
    assert (embedding.bytes_at_rest, embedding.num_parameters) == promised
    groups = VOCABULARY * (3 if name == "int4" else 1)
    assert promised[0] == VOCABULARY * HIDDEN * (8 if name == "int8" else 4) // 8 + 2 * groups
    with pytest.raises(UserError, match="prepared for inference"):
        embedding.draw(1.0)


def test_a_mixed_table_is_its_two_parts_and_a_seventh_of_float32() -> None:
    embedding = compress_table(settings_of("mixed"), table())
    direction = torch.randn(*IDS.shape, HIDDEN)
    (embedding(IDS) * direction).sum().backward()
    expected = torch.zeros(VOCABULARY, HIDDEN).index_add(0, IDS.flatten(), direction.flatten(0, 1))
    gradients = [parameter.grad for parameter in embedding.parameters()]
    torch.testing.assert_close(torch.cat(gradients), expected)
    before, promised = embedding.rows(0, VOCABULARY).detach(), (embedding.bytes_at_rest, embedding.num_parameters)
    embedding.prepare_for_inference()
    assert torch.equal(embedding.rows(0, VOCABULARY), before) and not list(embedding.parameters())
    assert (embedding.bytes_at_rest, embedding.num_parameters) == promised
    assert promised[0] == 58 * (HIDDEN + 2) + 43 * (HIDDEN // 2 + 2 * 3)
    shape = torch.empty(49_152, 576, device="meta")
    resolved = resolve_settings(EmbeddingSettings(name="mixed", group_size=64), shape)
    assert resolved.frequent_rows == 4096
    bits = (4096 * (8 + 16 / 576) + (49_152 - 4096) * (4 + 16 / 64)) / 49_152
    assert 7 < 32 / bits < 7.02


@pytest.mark.parametrize(("name", "settings"), [
    ("dense", {}),
    ("tensor_train", {"mode_sizes": [2, 3, 4], "ranks": [2, 4]}),
    ("tt_matrix", {"rank": 1000}),
    ("low_rank", {"rank": HIDDEN}),
])  # fmt: skip
def test_full_ranks_lose_nothing(name: str, settings: dict[str, Any]) -> None:
    assert relative_error(compress_table(EmbeddingSettings(name=name, **settings), table()), table()) < 1e-6


def test_rounding_errors_are_those_of_their_bits() -> None:
    weight = table(2000, 768)
    assert relative_error(compress_table(EmbeddingSettings(name="int8"), weight), weight) == pytest.approx(
        0.0077, abs=3e-4
    )
    grouped = compress_table(EmbeddingSettings(name="int4", group_size=32), weight)
    assert 0.07 < relative_error(grouped, weight) < 0.12


@pytest.mark.parametrize(("mode_sizes", "ranks", "compression", "error"), [
    ([2] * 8 + [3], [1] * 8, 40.4, 0.987),
    ([24, 32], [4], 3.43, 0.757),
    ([24, 32], [7], 1.96, 0.604),
])  # fmt: skip
def test_rows_without_structure_lose_what_arithmetic_says(
    mode_sizes: list[int], ranks: list[int], compression: float, error: float
) -> None:
    weight = table(400, 768)
    embedding = TensorTrainEmbedding.from_dense(weight, mode_sizes, ranks)
    assert embedding.compression == pytest.approx(compression, rel=0.005)
    assert relative_error(embedding, weight) == pytest.approx(error, abs=0.004)


def test_low_rank_is_the_best_of_its_rank() -> None:
    weight = table()
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    best = left[:, :7] * values[:7] @ right[:7]
    ours = compress_table(settings_of("low_rank"), weight).rows(0, VOCABULARY)
    torch.testing.assert_close(ours.double(), best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tensor_train", "tt_matrix", "low_rank", "dense", "int8", "int4", "mixed"])
def test_fresh_rows_are_as_large_as_dense_ones(name: str) -> None:
    torch.manual_seed(0)
    embedding = build_embedding(settings_of(name), 4001, HIDDEN)
    embedding.draw(0.02)
    assert float(embedding.rows(0, 4001).detach().std()) == pytest.approx(0.02, rel=0.35)


@pytest.mark.parametrize("name", ["tensor_train", "tt_matrix", "low_rank"])
@pytest.mark.parametrize("compression", [1.5, 2.0])
def test_a_budget_is_kept_and_used(name: str, compression: float) -> None:
    settings = EmbeddingSettings(name=name, compression=compression)
    resolved = resolve_settings(settings, table(1009))
    embedding = compress_table(settings, table(1009))
    assert compression <= embedding.compression < 1.6 * compression
    same = build_embedding(resolved, 1009, HIDDEN)
    assert [tensor.shape for tensor in same.stored()] == [tensor.shape for tensor in embedding.stored()]
    assert describe_embedding(resolved, embedding)["embedding_bytes"] == embedding.bytes_at_rest


def test_the_search_finds_the_structure_of_a_table() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(300, size, generator=generator) for size in (3, 4, 2)]
    weight = torch.einsum("va,vb,vc->vabc", *factors).reshape(300, 24)
    embedding = compress_table(EmbeddingSettings(name="tensor_train", compression=24 / 10), weight)
    assert relative_error(embedding, weight) > 1e-3  # only the rising 2 x 3 x 4 is tried
    given = EmbeddingSettings(name="tensor_train", mode_sizes=[3, 4, 2], compression=24 / 10)
    assert relative_error(compress_table(given, weight), weight) < 1e-6


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "sparse"}, "embedding.name is 'sparse': choose one of dense, tensor_train"),
    ({"name": "tensor_train"}, "needs a size"),
    ({"name": "tensor_train", "mode_sizes": [5, 5], "ranks": [1]}, "5 x 5 do not multiply to 24"),
    ({"name": "tensor_train", "mode_sizes": [24], "ranks": []}, "do not multiply"),
    ({"name": "tensor_train", "mode_sizes": [4, 6], "ranks": [5]}, "rank 5 after mode 1 of 4 x 6 is impossible"),
    ({"name": "tensor_train", "mode_sizes": [2, 3, 4], "ranks": [1, 4]}, "rank 4 after mode 2 .* between 1 and 3"),
    ({"name": "tensor_train", "mode_sizes": [4, 6], "ranks": [0]}, "rank 0"),
    ({"name": "tensor_train", "mode_sizes": [4, 6], "ranks": [1, 1]}, "have 1 ranks between them, not 2"),
    ({"name": "tensor_train", "ranks": [1]}, "set both"),
    ({"name": "tensor_train", "compression": 38.4}, "38.4 is out of reach.* at least 9, choose at most 2.67"),
    ({"name": "tensor_train", "compression": 0.0}, "choose more than 0"),
    ({"name": "tt_matrix", "compression": 1e6}, "out of reach of a TT matrix"),
    ({"name": "tt_matrix", "rank": 0}, "choose at least 1"),
    ({"name": "low_rank", "compression": 100.0}, "out of reach of a low-rank table"),
    ({"name": "low_rank", "rank": 25}, "choose between 1 and the hidden size 24"),
    ({"name": "int4", "group_size": 7}, "choose a divisor of the hidden size 24"),
    ({"name": "mixed", "group_size": 7}, "choose a divisor of the hidden size 24"),
    ({"name": "mixed", "frequent_rows": 0}, "frequent_rows is 0: choose between 1 and 100"),
    ({"name": "mixed", "frequent_rows": 101}, "frequent_rows is 101: choose between 1 and 100"),
])  # fmt: skip
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    for make in (
        lambda: build_embedding(EmbeddingSettings(**settings), VOCABULARY, HIDDEN),
        lambda: compress_table(EmbeddingSettings(**settings), table()),
    ):
        with pytest.raises(UserError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_ids_rows_and_tables_out_of_range_are_refused(name: str) -> None:
    embedding = build_embedding(settings_of(name), VOCABULARY, HIDDEN)
    for bad in (VOCABULARY, -1):
        with pytest.raises(UserError, match=f"ids from {bad} to {bad} .* choose ids from 0 to 100"):
            embedding(torch.tensor([bad]))
    with pytest.raises(UserError, match="do not lie within the 101"):
        embedding.rows(90, 102)
    with pytest.raises(UserError, match="shape"):
        compress_table(settings_of(name), torch.zeros(3))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "dense"])
@pytest.mark.parametrize("head", ["full", "folded"])
def test_every_embedding_trains_under_every_untied_head_and_lends_no_rows(name: str, head: str) -> None:
    model_settings = ModelSettings(hidden_size=HIDDEN, num_layers=1, num_heads=2, max_positions=8)
    untied = HeadSettings(type=head, tied=False, scorer="linear_sorted")
    torch.manual_seed(0)
    model = build_model(model_settings, untied, VOCABULARY, embedding=settings_of(name))
    model(IDS, IDS).loss.backward()
    gradients = [parameter.grad for parameter in model.backbone.token_embedding.parameters()]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(UserError, match="no rows to lend to the head"):
        build_model(
            model_settings, HeadSettings(type=head, scorer="linear_sorted"), VOCABULARY, embedding=settings_of(name)
        )


def test_a_models_numbers_and_bytes_count_a_shared_row_once() -> None:
    model_settings = ModelSettings(hidden_size=HIDDEN, num_layers=1, num_heads=2, max_positions=8)
    tied = build_model(model_settings, HeadSettings(), VOCABULARY)
    assert tied.num_parameters == sum(parameter.numel() for parameter in tied.parameters())
    assert tied.bytes_at_rest == 4 * tied.num_parameters
    untied = build_model(model_settings, HeadSettings(tied=False), VOCABULARY, embedding=settings_of("int8"))
    assert tied.bytes_at_rest - untied.bytes_at_rest == -VOCABULARY * (HIDDEN + 2)


def test_a_dense_embedding_draws_as_before() -> None:
    torch.manual_seed(0)
    ours = build_embedding(EmbeddingSettings(), VOCABULARY, HIDDEN)
    torch.manual_seed(0)
    assert torch.equal(ours.rows(0, VOCABULARY), torch.nn.Embedding(VOCABULARY, HIDDEN).weight)
