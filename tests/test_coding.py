"""Token coders: what goes in comes out, as short as the entropy says."""

from __future__ import annotations

import heapq
import itertools

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabfold.coding.coders import CODERS
from vocabfold.coding.container import (
    Container,
    decode,
    encode,
)
from vocabfold.coding.frequencies import quantised
from vocabfold.coding.huffman import code_lengths
from vocabfold.coding.lanes import LaneDecoder, LaneEncoder
from vocabfold.errors import UserError

ADAPTIVE = ("adaptive", "order1", "order2")  # a step of few lanes takes them as long as one of many


def zipf_tokens(count: int, vocabulary_size: int, seed: int = 0) -> np.ndarray:
    weights = 1 / np.arange(1, vocabulary_size + 1)
    generator = np.random.default_rng(seed)
    ids = generator.permutation(vocabulary_size)
    return ids[generator.choice(vocabulary_size, count, p=weights / weights.sum())]


def entropy_bits(tokens: np.ndarray) -> float:
    """H0: of the shares of the tokens, a token."""
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("count", [0, 1, 2, 4095, 4096, 4097, 9000])
def test_every_length_comes_back(coder: str, count: int) -> None:
    count = min(count, 50) if coder in ADAPTIVE else count
    tokens = zipf_tokens(count, 997)
    coded = encode(tokens, 997, coder)
    assert np.array_equal(decode(coded, 997), tokens)
    assert coded == encode(tokens, 997, coder)
    assert len(Container(coded)) == count


@pytest.mark.parametrize("coder", CODERS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_tokens_come_back(coder: str, data: st.DataObject) -> None:
    vocabulary_size = data.draw(st.sampled_from([1, 2, 3, 37, 50_257, 65_536, 65_537, 1_000_003]))
    ids = st.integers(0, vocabulary_size - 1)
    runs = data.draw(st.lists(st.tuples(ids, st.integers(1, 3 if coder in ADAPTIVE else 30)), max_size=8))
    tokens = np.array([token for token, length in runs for _ in range(length)], np.int64)
    decoded = decode(encode(tokens, vocabulary_size, coder), vocabulary_size)
    assert np.array_equal(decoded, tokens)


@pytest.mark.parametrize("coder", ["huffman", "arithmetic", "rans", "folded"])
def test_static_coders_are_within_half_a_percent_of_the_entropy(coder: str) -> None:
    tokens = zipf_tokens(200_000, 5003)
    coded = encode(tokens, 5003, coder)
    payload_bits = 8 * (len(coded) - Container(coded).model_bytes)
    bound = entropy_bits(tokens) * len(tokens)
    assert bound < payload_bits < 1.005 * bound


@pytest.mark.parametrize("coder", ADAPTIVE)
def test_adaptive_coders_learn(coder: str) -> None:
    """A chain in which the last two tokens decide the next: contexts tell what the counts alone cannot."""
    following = np.random.default_rng(1).integers(0, 8, (8, 8))
    chain = [0, 1]
    noise = np.random.default_rng(2)
    for _ in range(6000):
        chain.append(int(following[chain[-2], chain[-1]]) if noise.random() < 0.9 else int(noise.integers(8)))
    tokens = np.array(chain)
    bits = 8 * len(encode(tokens, 8, coder)) / len(tokens)
    shorter = {"adaptive": entropy_bits(tokens) + 0.3, "order1": entropy_bits(tokens) - 0.2, "order2": 1.8}
    assert bits < shorter[coder]


def test_segments_are_decoded_alone() -> None:
    tokens = zipf_tokens(4096 * 70 + 5, 300)
    for coder in ("bitpack", "huffman", "arithmetic", "rans", "folded"):
        container = Container(encode(tokens, 300, coder))
        wanted = np.array([0, 3, 4, 64, 69, 70])
        rows = container.segments(wanted)
        for number, row in zip(wanted, rows, strict=True):
            expected = tokens[number * 4096 : (number + 1) * 4096]
            assert np.array_equal(row[: len(expected)], expected)


def test_a_lane_is_what_the_plain_definition_says() -> None:
    """One lane against the textbook's integers, for intervals of different widths and precisions."""
    generator = np.random.default_rng(3)
    bits = generator.integers(1, 25, 500)
    frequency = np.array([generator.integers(1, (1 << b) + 1) for b in bits])
    start = np.array([generator.integers(0, (1 << b) - f + 1) for b, f in zip(bits, frequency, strict=True)])
    encoder = LaneEncoder(1, 500)
    state, words = 1 << 28, []
    for c, f, b in reversed(list(zip(start.tolist(), frequency.tolist(), bits.tolist(), strict=True))):
        encoder.push(np.array([c], np.uint64), np.array([f], np.uint64), b)
        if state >= f << (60 - b):
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // f << b) + state % f + c
    data, sizes = encoder.finish()
    assert data == state.to_bytes(8, "little") + b"".join(word.to_bytes(4, "little") for word in reversed(words))
    decoder = LaneDecoder(np.frombuffer(data, np.uint8), np.array([0, sizes[0]]))
    for c, f, b in zip(start, frequency, bits.tolist(), strict=True):
        assert c <= decoder.peek(b)[0] < c + f
        decoder.pop(np.array([c], np.uint64), np.array([f], np.uint64), b)
    decoder.finish()


def test_lanes_may_pause() -> None:
    encoder = LaneEncoder(3, 4)
    one, two = np.ones(2, np.uint64), np.full(3, 2, np.uint64)
    encoder.push(one, one, 3, np.array([0, 2]))
    encoder.push(two, two, 4)
    data, sizes = encoder.finish()
    decoder = LaneDecoder(np.frombuffer(data, np.uint8), np.concatenate([[0], sizes.cumsum()]))
    assert ((decoder.peek(4) >= 2) & (decoder.peek(4) < 4)).all()
    decoder.pop(two, two, 4)
    assert (decoder.peek(3, np.array([0, 2])) == 1).all()
    decoder.pop(one, one, 3, np.array([0, 2]))
    decoder.finish()


def test_lanes_are_as_short_as_constriction() -> None:
    tokens = zipf_tokens(50_000, 500)
    tokens = np.unique(tokens, return_inverse=True)[1].astype(np.int32)
    counts = np.bincount(tokens)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(tokens, constriction.stream.model.Categorical(counts / counts.sum(), perfect=False))
    container = Container(encode(tokens, 500, "rans"))
    num_segments = -(-len(tokens) // 4096)
    ours = len(encode(tokens, 500, "rans")) - container.model_bytes
    theirs = 4 * len(coder.get_compressed())
    assert theirs <= ours < 1.0005 * theirs + 20 * num_segments + 40


@pytest.mark.parametrize("bits", [3, 10, 16])
def test_quantised_frequencies(bits: int) -> None:
    for counts in ([5], [1, 1000], [1] * 8, [1, 1, 1, 10**9], list(range(1, 8))):
        result = quantised(np.array(counts), bits)
        assert result.sum() == 1 << bits and (result >= 1).all()
        assert (np.diff(result[np.argsort(counts, kind="stable")]) >= -1).all()
    with pytest.raises(ValueError, match="at least 1"):
        quantised(np.ones(9), 3)


def huffman_cost(counts: list[int]) -> int:
    """Bits of the counted tokens under Huffman's code, by the textbook's queue."""
    queue = list(counts)
    heapq.heapify(queue)
    cost = 0
    while len(queue) > 1:
        joined = heapq.heappop(queue) + heapq.heappop(queue)
        cost += joined
        heapq.heappush(queue, joined)
    return cost


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=60))
def test_code_lengths_are_huffmans_where_the_limit_allows(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts), 60)
    assert int((lengths * counts).sum()) == huffman_cost(counts)
    assert sum(2.0**-length for length in lengths.tolist()) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6))
def test_limited_code_lengths_are_the_best_of_all(counts: list[int]) -> None:
    limit = 3
    best = min(
        sum(length * count for length, count in zip(lengths, counts, strict=True))
        for lengths in itertools.product(range(1, limit + 1), repeat=len(counts))
        if sum(2.0**-length for length in lengths) <= 1
    )
    lengths = code_lengths(np.array(counts), limit)
    assert lengths.max() <= limit and int((lengths * counts).sum()) == best


@pytest.mark.parametrize(
    ("tokens", "vocabulary_size", "coder", "message"),
    [
        ([1], 5, "zip", "unknown token coder 'zip': choose one of raw, bitpack"),
        ([5], 5, "rans", "token ids must be 0 to 4"),
        ([-1], 5, "raw", "token ids must be 0 to 4"),
        ([], 0, "raw", "a vocabulary of 0 cannot be coded"),
    ],
)
def test_impossible_input(tokens: list[int], vocabulary_size: int, coder: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode(np.array(tokens, np.int64), vocabulary_size, coder)
