"""Text coded with a model: every byte comes back, near the model's own cross entropy, or the refusal has a name."""

from __future__ import annotations

import math
import os
import shutil
import signal
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from run_cases import TINY, call, start, write_corpus
from test_generate import HEADS, VOCABULARY_SIZE, small_model
from vocabfold import compress as compressing
from vocabfold import train
from vocabfold.coding.damage import DamagedStream
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.inference import model_coder, text_file
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
    "linear_sorted": HeadSettings(name="grouped", tied=False, scorer="linear_sorted", partition=SHORTLIST),
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


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130, 2000])
def test_tokens_come_back_near_the_cross_entropy(model: ModelWithHead, count: int) -> None:
    tokens = text_of(count)
    code = encode_tokens(model, tokens, 0)
    assert np.array_equal(decode_tokens(model, code, count, 0), tokens)
    if count == 2000:
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


@settings(max_examples=20, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)))
def test_any_bytes_are_tokens_and_back(data: bytes) -> None:
    for name in ("gpt2", "cl100k"):
        tokenizer = load_tokenizer(name)
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    arguments = (*TINY, "head=grouped", "head.scorer=linear_sorted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        for name, seed in (("run", 0), ("other", 1)):
            assert call(train.main, monkeypatch, *arguments, f"run_dir={name}", f"seed={seed}") == 0
    return folder


def program(run: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(run)
    return call(compressing.main, monkeypatch, *arguments, "--model", "run")


@pytest.fixture
def without_deflate(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a hardly trained model is the shortest."""
    monkeypatch.setattr(text_file, "_deflated", lambda text: text + b"longer")


def segments(data: bytes) -> list[str]:
    """How each segment of a coded file is coded."""
    kinds, place = [], text_file._HEADER.size + 4
    while place < len(data):
        num_bytes, num_tokens, code_bytes, *_ = text_file._SEGMENT.unpack_from(data, place)
        kinds.append("model" if num_tokens else "plain" if num_bytes == code_bytes else "deflated")
        place += text_file._SEGMENT.size + 4 + code_bytes
    return kinds


TEXT = "a dog found the bird under home "
FILES = {
    "nothing": (b"", []),
    "a byte": (b"x", ["plain"]),
    "bytes": (b"\xff\xfe\x00\x80 caf\xc3\xa9 \xe2\x82", ["plain"]),
    "all bytes": (bytes(range(256)) * 3, ["deflated", "plain"]),
    "characters cut in two": ("the cat saw 😀\r\n".encode() * 60, ["deflated"] * 3),
    "zeros": (bytes(700), ["deflated"] * 2),
    "random": (np.random.default_rng(0).bytes(600), ["plain"] * 2),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("deflate", [True, False])
def test_files_come_back_and_do_not_grow(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, deflate: bool
) -> None:
    data, kinds = FILES[name]
    monkeypatch.setattr(text_file, "SEGMENT_BYTES", 501)
    monkeypatch.setattr(text_file, "_PIECE_BYTES", 50)
    if not deflate:
        monkeypatch.setattr(text_file, "_deflated", lambda text: text + b"longer")
    path, coded, back = tmp_path / "f", tmp_path / "f.vftm", tmp_path / "back"
    path.write_bytes(data)
    assert program(run, monkeypatch, str(path)) == 0
    assert program(run, monkeypatch, str(coded), "--decompress", "--output", str(back)) == 0
    assert back.read_bytes() == data
    assert not deflate or segments(coded.read_bytes()) == kinds
    assert len(coded.read_bytes()) <= len(data) + 44 + 24 * len(kinds)


def test_text_is_coded_with_the_model_and_the_bar_moves(run: Path, tmp_path: Path, without_deflate: None) -> None:
    coder, told = compressing.load_text_model(run / "run"), list[tuple[int, int]]()
    path, coded, back = tmp_path / "f", tmp_path / "f.vftm", tmp_path / "back"
    path.write_text(TEXT * 200)
    whole = path.stat().st_size
    for action, source, target in ((text_file.compress, path, coded), (text_file.decompress, coded, back)):
        told.clear()
        action(source, target, coder, lambda *numbers: told.append(numbers))
        assert told == sorted(set(told)) or told[:-1] == sorted(set(told))
        assert len(told) > 15 and told[-1] == (whole, whole)
    assert segments(coded.read_bytes()) == ["model"] and coded.stat().st_size < whole
    assert back.read_text() == TEXT * 200


def test_another_process_decodes_with_other_threads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_deflate: None
) -> None:
    (tmp_path / "f").write_text(TEXT * 30)
    torch.set_num_threads(2)
    assert program(run, monkeypatch, str(tmp_path / "f")) == 0
    torch.set_num_threads(1)
    assert segments((tmp_path / "f.vftm").read_bytes()) == ["model"]
    done = start(
        run, "-m", "vocabfold.compress", str(tmp_path / "f.vftm"), "--model", "run", "--output", "back", "--decompress"
    )
    assert done.returncode == 0 and "bytes ->" in done.stdout, done.stderr
    assert (run / "back").read_text() == (tmp_path / "f").read_text()


DAMAGE = {
    "another model": (lambda d: d, "coded with another model"),
    "another kind": (lambda d: b"PK" + d[2:], "no text coded with a model"),
    "empty": (lambda d: b"", "no text coded with a model"),
    "short header": (lambda d: d[:30], "cut short in its header"),
    "changed header": (lambda d: d[:10] + b"\0" + d[11:], "its header fails its checksum"),
    "short head": (lambda d: d[:50], "cut short in the head of a segment"),
    "short code": (lambda d: d[:-1], "cut short in a segment"),
    "longer": (lambda d: d + b"\0", "do not add up"),
    "changed code": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "a segment fails its checksum"),
    "version 1": (lambda d: resealed(d[:4] + b"\1" + d[5:]), "of version 1, this program reads version 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_and_leaves_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    change, message = DAMAGE[name]
    (tmp_path / "f").write_text("the cat saw the bird " * 10)
    assert program(run, monkeypatch, str(tmp_path / "f")) == 0
    coded = tmp_path / "f.vftm"
    coded.write_bytes(change(coded.read_bytes()))
    capfd.readouterr()
    model = ("--model", "other") if name == "another model" else ()  # the last one counts
    monkeypatch.chdir(run)
    arguments = (str(coded), "--decompress", "--output", str(tmp_path / "back"), "--model", "run", *model)
    assert call(compressing.main, monkeypatch, *arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.count(message) == 1 and error.count("decoded") == 1 and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.vftm"]


def resealed(data: bytes) -> bytes:
    """With all checksums that lie beside their bytes right, as far as there are segments."""
    result, place = bytearray(data), 44
    result[40:44] = zlib.crc32(result[:40]).to_bytes(4, "little")
    while place + 24 <= len(result):
        code = result[place + 24 : place + 24 + int.from_bytes(result[place + 8 : place + 12], "little")]
        result[place + 16 : place + 20] = zlib.crc32(code).to_bytes(4, "little")
        result[place + 20 : place + 24] = zlib.crc32(result[place : place + 20]).to_bytes(4, "little")
        place += 24 + len(code)
    return bytes(result)


@pytest.mark.parametrize("deflate", [True, False])
def test_changed_files_are_refused_or_come_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deflate: bool
) -> None:
    """With checksums that fit, so that the decoder's own checks and the text's are all that is left."""
    if not deflate:
        monkeypatch.setattr(text_file, "_deflated", lambda text: text + b"longer")
    monkeypatch.setattr(text_file, "SEGMENT_BYTES", 1000)
    coder, generator = compressing.load_text_model(run / "run"), np.random.default_rng(5)
    path, back, text = tmp_path / "f", tmp_path / "back", (TEXT * 40).encode() + generator.bytes(50)
    path.write_bytes(text)
    text_file.compress(path, tmp_path / "coded", coder, lambda *_: None)
    original = (tmp_path / "coded").read_bytes()
    assert segments(original) == ["deflated" if deflate else "model"] * 2
    for number in range(80):
        changed = bytearray(original)
        place = int(generator.integers(44, 68) if number % 2 else generator.integers(len(original)))
        match number % 3:
            case 0:
                changed[place] ^= 1 << int(generator.integers(8))
            case 1:
                changed[place] = int(generator.integers(256))
            case _:
                del changed[place : place + int(generator.integers(1, 9))]
        path.write_bytes(resealed(bytes(changed)))
        try:
            text_file.decompress(path, back, coder, lambda *_: None)
        except DamagedStream as damage:
            assert str(damage).count("cannot be decoded") == 1 and not back.exists()
        else:
            assert back.read_bytes() == text, (number, place)
            back.unlink()


def test_a_made_up_segment_takes_no_more_than_it_may(run: Path, tmp_path: Path) -> None:
    """4 GB deflated, or a token of many bytes again and again, under the name of a short text."""
    coder = compressing.load_text_model(run / "run")
    head = struct.pack("<4sB3x16s8sQ", b"VFTM", 2, coder.fingerprint, coder.arithmetic, 1000)
    bomb = zlib.compressobj(9, wbits=-15)
    code = bomb.compress(bytes(1 << 24)) + bomb.flush()
    segment = struct.pack("<5I", 20_000, 0, len(code), 0, 0)
    (tmp_path / "f").write_bytes(resealed(head + bytes(4) + segment + bytes(4) + code))
    tracemalloc.start()
    with pytest.raises(DamagedStream, match="does not end where it must"):
        text_file.decompress(tmp_path / "f", tmp_path / "back", coder, lambda *_: None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    longest = max(coder.tokenizer.encode_bytes(b" " * 64), key=lambda token: len(coder.tokenizer.decode_bytes([token])))
    with pytest.raises(DamagedStream, match="longer than it was"):
        text_file._text_of(np.full(1 << 20, longest), 1000, coder.tokenizer)


def test_what_cannot_be_coded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert program(run, monkeypatch, str(tmp_path / "f")) == 2
    assert "there is no file" in capfd.readouterr().err
    (tmp_path / "f").write_text("a")
    (tmp_path / "f.vftm").write_text("kept")
    assert program(run, monkeypatch, str(tmp_path / "f")) == 2
    assert "exists: remove it" in capfd.readouterr().err
    assert (tmp_path / "f.vftm").read_text() == "kept"
    assert program(run, monkeypatch, str(tmp_path / "f"), "--decompress") == 2
    assert "does not end in .vftm" in capfd.readouterr().err
    assert call(compressing.main, monkeypatch, str(tmp_path / "f"), "--model", "nowhere", "--output", "g") == 2
    assert "nowhere holds no config.yaml" in capfd.readouterr().err


def test_a_tokenizer_of_another_vocabulary_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: gpt2", "tokenizer: cl100k"))
    (tmp_path / "f").write_text("the cat")
    assert program(tmp_path, monkeypatch, str(tmp_path / "f")) == 2
    error = capfd.readouterr().err
    assert "a vocabulary of 50257 and the tokenizer cl100k one of 100277" in error and error.count("\n") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_beside_the_file(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(text_file, "_encode_segment", lambda *_: os.kill(os.getpid(), number))
    (tmp_path / "f").write_text("the cat")
    try:
        assert program(run, monkeypatch, str(tmp_path / "f")) == status
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    error = capfd.readouterr().err
    assert "continues" not in error and ("f.vftm was not written" in error) == (number == signal.SIGINT)


def test_other_arithmetic_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_text("the cat")
    assert program(run, monkeypatch, str(tmp_path / "f")) == 0
    monkeypatch.setattr(text_file, "_arithmetic", lambda *_: b"elsewhere")
    (tmp_path / "f").unlink()
    assert program(run, monkeypatch, str(tmp_path / "f.vftm"), "--decompress") == 2
    assert "computes other numbers" in capfd.readouterr().err
