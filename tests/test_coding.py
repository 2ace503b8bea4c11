"""Token coders: what goes in comes out, as short as the entropy says, and bytes that were changed are refused."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import tracemalloc
import zlib

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabfold.coding import container
from vocabfold.coding.adaptive import Adaptive, Counts, SecondOrder
from vocabfold.coding.coders import CODERS
from vocabfold.coding.container import (
    MAX_VOCABULARY_SIZE,
    SEGMENTS_PER_BLOCK,
    TOKENS_PER_BYTE,
    WORKING_BYTES,
    Container,
    decode,
    encode,
)
from vocabfold.coding.damage import DamagedStream
from vocabfold.coding.frequencies import quantised
from vocabfold.coding.huffman import code_lengths
from vocabfold.coding.lanes import LaneDecoder, LaneEncoder
from vocabfold.errors import UserError

_HEADER_BYTES = 32
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "end within their header"),
        (lambda data: b"PK" + data[2:], "do not begin with VFTC"),
        (lambda data: data[:4] + b"\x09" + data[5:], "version 9"),
        (lambda data: data[:5] + b"\xee" + data[6:], "unknown coder, 238"),
        (lambda data: data[:-1], "cut short or changed"),
        (lambda data: data + b"\0", "cut short or changed"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "header fails its checksum"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "block 0 fails its checksum"),
    ],
)
def test_damage_is_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    data = encode(zipf_tokens(500, 50), 50, "rans")
    with pytest.raises(DamagedStream, match=message):
        decode(change(data))


def test_another_vocabulary_is_named() -> None:
    with pytest.raises(UserError, match="a vocabulary of 50, not 51"):
        decode(encode(zipf_tokens(500, 50), 50), 51)


def resealed(data: bytearray) -> bytes:
    """The same bytes with header and block checksums that fit, where a table can be found: the decoders' own checks
    are all that is left, and the checksum of the tokens."""
    model_size, num_tokens = int.from_bytes(data[16:20], "little"), int.from_bytes(data[24:32], "little")
    segment_tokens = list(CODERS.values())[data[5] % len(CODERS)].segment_tokens
    num_segments = -(-num_tokens // segment_tokens)
    num_blocks = -(-num_segments // SEGMENTS_PER_BLOCK)
    table = _HEADER_BYTES + model_size + -model_size % 4
    start = table + 4 * num_segments + 4 * num_blocks + 4
    if num_blocks != 1 or start > len(data):
        return bytes(data)
    data[start - 8 : start - 4] = zlib.crc32(data[start:]).to_bytes(4, "little")
    data[start - 4 : start] = zlib.crc32(data[: start - 4]).to_bytes(4, "little")
    return bytes(data)


def mutated(data: bytes, generator: np.random.Generator) -> bytearray:
    """Flipped, overwritten, cut, doubled or inserted bytes."""
    result = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        place = int(generator.integers(len(result)))
        match int(generator.integers(5)):
            case 0:
                result[place] ^= 1 << int(generator.integers(8))
            case 1:
                result[place] = int(generator.integers(256))
            case 2:
                del result[place : place + int(generator.integers(1, 9))]
            case 3:
                result[place:place] = result[place : place + int(generator.integers(1, 9))]
            case _:
                result[place:place] = generator.bytes(int(generator.integers(1, 9)))
        if not result:
            break
    return result


def refuse_mutations(count: int, seed: int) -> None:
    """Every changed input is refused by name, or still gives the right tokens (a byte that means nothing)."""
    generator = np.random.default_rng(seed)
    cases = [(tokens, coder) for tokens in (zipf_tokens(40, 37), np.zeros(30, np.int64)) for coder in CODERS]
    originals = [(tokens, encode(tokens, 37, coder)) for tokens, coder in cases]
    for number in range(count):
        tokens, original = originals[number % len(originals)]
        data: bytes = bytes(changed := mutated(original, generator))
        if number % 3 == 0 and len(changed) > _HEADER_BYTES:
            data = resealed(changed)
        if data == original:
            continue
        try:
            decoded = decode(data, None if number % 2 else 37, threads=1)
        except DamagedStream:
            continue
        assert number % 3 == 0 and np.array_equal(decoded, tokens), (number, original.hex(), data.hex())


@pytest.mark.parametrize("coder", ADAPTIVE)
def test_decoding_on_many_threads_keeps_within_its_memory(coder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of as many segments as fit, however many threads are asked for."""
    kind = CODERS[coder]
    assert issubclass(kind, Adaptive)
    tracemalloc.start()
    counts = Counts(kind.order, 16, 1 << 20)
    assert tracemalloc.get_traced_memory()[0] == pytest.approx(kind(50_000).working_bytes(1 << 20), rel=0.01)
    tracemalloc.stop()
    del counts
    monkeypatch.setattr(kind, "segment_tokens", 40)
    tokens = zipf_tokens(6 * 40, 300)
    coded = encode(tokens, 300, coder)
    one = kind(300).working_bytes(40)
    most, inside = 0, threading.Semaphore(100)
    decode_one = kind.decode_one

    def counted(self: Adaptive, data: np.ndarray, num_tokens: int) -> np.ndarray:
        nonlocal most
        with inside:
            most = max(most, 100 - inside._value)
            time.sleep(0.01)  # so that another thread has time to begin
            return decode_one(self, data, num_tokens)

    monkeypatch.setattr(kind, "decode_one", counted)
    for limit, expected in ((one - 1, 1), (3 * one - 1, 2), (100 * one, 6)):
        most = 0
        monkeypatch.setattr(container, "WORKING_BYTES", limit)
        assert np.array_equal(decode(coded, 300, threads=6), tokens) and most == expected


@pytest.mark.parametrize("coder", ["huffman", "rans", "folded", "arithmetic"])
def test_a_large_made_up_model_takes_no_more_than_it_may(coder: str) -> None:
    """In proportion to a vocabulary, from a few bytes that unpack to it."""
    size = 1 << 16
    data = encode(np.arange(size), size, coder)
    tracemalloc.start()
    Container(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < WORKING_BYTES * size / MAX_VOCABULARY_SIZE + (1 << 23)  # a table of 2^20 entries at least
    with pytest.raises(UserError, match=f"must be 1 to {MAX_VOCABULARY_SIZE}"):
        encode(np.arange(3), MAX_VOCABULARY_SIZE + 1, coder)


@pytest.mark.parametrize("coder", ["run_length", "huffman", "arithmetic", "rans", "zstd"])
def test_the_shortest_code_of_all_is_not_taken_for_a_made_up_one(coder: str) -> None:
    tokens = np.full(1 << 19, 69_999)
    coded = encode(tokens, 70_000, coder)
    assert np.array_equal(decode(coded, threads=1), tokens)
    changed = bytearray(coded)
    changed[24:32] = (len(coded) * TOKENS_PER_BYTE + 1).to_bytes(8, "little")
    with pytest.raises(DamagedStream, match="their table does not fit"):
        Container(bytes(changed))


def test_a_lane_that_ends_too_early_stops_decoding() -> None:
    coder = SecondOrder(8)
    data = np.frombuffer(coder.encode_one(zipf_tokens(520, 8)), np.uint8)
    with pytest.raises(DamagedStream, match="too early"):
        coder.decode_one(data, 1000)


def test_mutations_are_refused() -> None:
    refuse_mutations(1000, 0)


@pytest.mark.slow
def test_a_hundred_thousand_mutations_are_refused_within_the_memory_bound() -> None:
    tracemalloc.start()
    try:
        for seed in range(1, 101):
            refuse_mutations(1000, seed)
            assert tracemalloc.get_traced_memory()[1] < WORKING_BYTES
    finally:
        tracemalloc.stop()
