"""Files coded with a model: every byte comes back, nothing grows, and what is damaged is refused in one line."""

from __future__ import annotations

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

from run_cases import TINY, call, start, write_corpus
from vocabfold import compress as compressing
from vocabfold import train
from vocabfold.coding.damage import DamagedStream
from vocabfold.inference import text_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    arguments = (*TINY, "head=paper", "head.scorer=linear_sorted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        for name, seed in (("run", 0), ("other", 1)):
            assert call(train.main, monkeypatch, *arguments, f"run_dir={name}", f"seed={seed}") == 0
    return folder


@pytest.fixture(scope="module")
def coder(run: Path) -> text_file.TextModel:
    """The model of the run, as the program loads it."""
    return compressing.load_text_model(run / "run")


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
    coder: text_file.TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, deflate: bool
) -> None:
    data, kinds = FILES[name]
    monkeypatch.setattr(text_file, "SEGMENT_BYTES", 501)
    monkeypatch.setattr(text_file, "_PIECE_BYTES", 50)
    if not deflate:
        monkeypatch.setattr(text_file, "_deflated", lambda text: text + b"longer")
    path, coded, back = tmp_path / "f", tmp_path / "f.vftm", tmp_path / "back"
    path.write_bytes(data)
    text_file.compress(path, coded, coder, lambda *_: None)
    text_file.decompress(coded, back, coder, lambda *_: None)
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
