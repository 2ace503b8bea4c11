"""Text coded with a model: every byte comes back, near the model's own cross entropy, or the refusal has a name."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from test_generate import HEADS, VOCABULARY_SIZE, small_model
from vocabfold.coding.damage import DamagedStream
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.inference import model_coder
from vocabfold.inference.model_coder import (
    BITS,
    ROWS,
    TooLongError,
    cumulative_integers,
    decode_tokens,
    encode_tokens,
    most_rows,
)
from vocabfold.inference.symbols import symbols_of
from vocabfold.models.build import ModelWithHead

SHORTLIST = PartitionSettings(shortlist=11, group_size=7)
KINDS = {
    **HEADS,
    "linear_sorted": HeadSettings(type="folded", tied=False, scorer="linear_sorted", partition=SHORTLIST),
}


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelWithHead:
    monkeypatch.setitem(HEADS, "linear_sorted", KINDS["linear_sorted"])
    return small_model(request.param).float()


def text_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).zipf(1.4, count) % VOCABULARY_SIZE


@torch.no_grad()
def cross_entropy_bits(model: ModelWithHead, tokens: np.ndarray) -> float:
    """What the coder's steps should cost, without a cache: each token after the context that the coder keeps."""
    most, total = model.backbone.config.max_positions, 0.0
    length = -(-len(tokens) // ROWS)
    for start_of_row in range(0, len(tokens), length):
        row = [0, *tokens[start_of_row : start_of_row + length].tolist()]
        begin = 0
        for place in range(1, len(row)):
            if place - begin > most:
                begin = place - most // 2
            hidden = model.backbone(torch.tensor([row[begin:place]]))[:, -1]
            total -= float(model.head.log_prob(hidden)[0, row[place]]) / math.log(2)
    return total


def test_the_two_symbols_are_the_heads_distribution(model: ModelWithHead) -> None:
    hidden = torch.randn(5, 16)
    log_prob = model.head.log_prob(hidden)
    symbols = symbols_of(model.head)
    both = symbols.weights(hidden)
    assert torch.allclose(both.groups.sum(dim=-1), torch.ones(5), atol=1e-5)
    for token in range(VOCABULARY_SIZE):
        groups, slots = symbols.of(torch.full((5,), token))
        assert (symbols.tokens(groups, slots) == token).all()
        weights = both.slots(groups)
        within = weights.gather(-1, slots[:, None]).squeeze(-1) / weights.sum(dim=-1)
        share = both.groups.gather(-1, groups[:, None]).squeeze(-1)
        assert torch.allclose((share * within).log(), log_prob[:, token], atol=1e-4)
        for row, slot in enumerate(weights.argmin(dim=-1).tolist()):
            missing = symbols.tokens(groups[row : row + 1], torch.tensor([slot]))
            assert (weights[row, slot] == 0) == (missing == VOCABULARY_SIZE)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130, 1000])
def test_tokens_come_back_near_the_cross_entropy(model: ModelWithHead, count: int) -> None:
    tokens = text_of(count)
    code = encode_tokens(model, tokens, 0)
    assert np.array_equal(decode_tokens(model, code, count, 0), tokens)
    if count == 1000:
        bits = cross_entropy_bits(model, tokens)
        assert bits < 8 * len(code) < 1.005 * bits + 8 * 8 * 12  # eight lanes, 12 bytes each


def test_a_model_with_many_keys_and_values_codes_fewer_rows(
    model: ModelWithHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.gpt.config
    row_bytes = 2 * 4 * config.num_layers * config.max_positions * config.hidden_size
    for limit, expected in ((1, 1), (3 * row_bytes, 3), (4 * row_bytes - 1, 3), (1 << 40, ROWS)):
        monkeypatch.setattr(model_coder, "CACHE_BYTES", limit)
        assert most_rows(model) == expected
        tokens = text_of(40)
        assert np.array_equal(decode_tokens(model, encode_tokens(model, tokens, 0), 40, 0), tokens)


def test_coding_holds_few_bytes_a_token() -> None:
    model, tokens = small_model("full").float(), text_of(20_000)
    tracemalloc.start()
    encode_tokens(model, tokens, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * len(tokens)


def test_a_code_of_no_use_is_given_up_early() -> None:
    model, tokens, steps = small_model("full").float(), text_of(ROWS * 50), list[int]()
    code = encode_tokens(model, tokens, 0, progress=steps.append)
    assert steps == list(range(ROWS, len(tokens) + 1, ROWS))
    assert encode_tokens(model, tokens, 0, len(code)) == code
    with pytest.raises(TooLongError):
        encode_tokens(model, tokens, 0, len(code) - 1)
    steps.clear()
    with pytest.raises(TooLongError):
        encode_tokens(model, tokens, 0, len(code) / 4, steps.append)
    assert len(steps) < 25


def test_a_lane_that_ends_too_early_stops_decoding() -> None:
    model, tokens, steps = small_model("full").float(), text_of(ROWS * 50), list[int]()
    code = encode_tokens(model, tokens, 0)
    with pytest.raises(DamagedStream, match="too early"):
        decode_tokens(model, code, ROWS * 5000, 0, steps.append)
    assert len(steps) < 200


def test_the_number_of_threads_changes_nothing(model: ModelWithHead) -> None:
    codes = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        codes.append(encode_tokens(model, text_of(500), 0))
    torch.set_num_threads(1)
    assert codes[0] == codes[1] == codes[2]


def test_integers_rise_to_the_whole() -> None:
    weights: Tensor = torch.tensor([[1e-30, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 5.0]])
    cumulative = cumulative_integers(weights)
    assert (np.diff(cumulative, prepend=0) >= 1).all() and (cumulative[:, -1] == 1 << BITS).all()
    assert abs(cumulative[0, 2] / (1 << BITS) - 0.25) < 1e-6


def test_changed_code_is_refused_or_decodes_to_something_else(model: ModelWithHead) -> None:
    """Without the file's checksums: never a crash, and the lanes see most changes by themselves."""
    tokens = text_of(100)
    code = encode_tokens(model, tokens, 0)
    generator = np.random.default_rng(4)
    refused = 0
    for _ in range(20):
        changed = bytearray(code)
        changed[generator.integers(len(code))] ^= 1 << generator.integers(8)
        try:
            assert not np.array_equal(decode_tokens(model, bytes(changed), 100, 0), tokens)
        except DamagedStream:
            refused += 1
    assert refused > 15


@settings(max_examples=10, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)))
def test_any_bytes_are_tokens_and_back(data: bytes) -> None:
    for name in ("gpt2", "cl100k"):
        tokenizer = load_tokenizer(name)
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
