"""Coded tokens that were changed or made up are refused by name, within the memory that decoders may take."""

from __future__ import annotations

import threading
import tracemalloc
import zlib

import numpy as np
import pytest

from test_coding import ADAPTIVE, zipf_tokens
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
from vocabfold.errors import UserError

_HEADER_BYTES = 32


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
    most, inside, together = 0, threading.Semaphore(100), threading.Barrier(1)
    decode_one = kind.decode_one

    def counted(self: Adaptive, data: np.ndarray, num_tokens: int) -> np.ndarray:
        nonlocal most
        with inside:
            most = max(most, 100 - inside._value)
            together.wait(30)  # for as many as may be here at once, however busy the machine is
            return decode_one(self, data, num_tokens)

    monkeypatch.setattr(kind, "decode_one", counted)
    for limit, expected in ((one - 1, 1), (3 * one - 1, 2), (100 * one, 6)):
        most, together = 0, threading.Barrier(expected)
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
