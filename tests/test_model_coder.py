"""Text coded with a model: every byte comes back, near the model's own cross entropy, or the refusal has a name."""

from __future__ import annotations

import math
import subprocess
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
from vocabfold import decompress as decompressing
from vocabfold import train
from vocabfold.coding.damage import DamagedStream
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.inference.model_coder import BITS, ROWS, cumulative_integers, decode_tokens, encode_tokens
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


@settings(max_examples=60, deadline=None)
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


def programs(run: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, unpack: bool = False) -> int:
    monkeypatch.chdir(run)
    return call(decompressing.main if unpack else compressing.main, monkeypatch, *arguments)


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"\xff\xfe\x00\x80 caf\xc3\xa9 \xe2\x82", bytes(range(256)) * 3, "the cat saw 😀\r\n".encode() * 20],
)
def test_files_come_back(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("vocabfold.inference.text_file.SEGMENT_BYTES", 100)  # several segments, characters cut in two
    path, coded, back = tmp_path / "f", tmp_path / "f.vftm", tmp_path / "back"
    path.write_bytes(data)
    assert programs(run, monkeypatch, str(path), "--model", "run") == 0
    assert programs(run, monkeypatch, str(coded), "--model", "run", "--output", str(back), unpack=True) == 0
    assert back.read_bytes() == data


def test_another_process_decodes_with_other_threads(run: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a dog found the bird under home " * 30)
    for threads, arguments in (
        ("2", ("-m", "vocabfold.compress", str(tmp_path / "f"), "--model", "run")),
        ("1", ("-m", "vocabfold.decompress", str(tmp_path / "f.vftm"), "--model", "run", "--output", "back")),
    ):
        done: subprocess.CompletedProcess[str] = start(run, *arguments)
        assert done.returncode == 0 and threads and "bytes ->" in done.stdout, done.stderr
    assert (run / "back").read_text() == (tmp_path / "f").read_text()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: d, ("--model", "other"), "coded with another model"),
        (lambda d: b"PK" + d[2:], ("--model", "run"), "no text coded with a model"),
        (lambda d: b"", ("--model", "run"), "no text coded with a model"),
        (lambda d: d[:30], ("--model", "run"), "cut short in its header"),
        (lambda d: d[:10] + b"\0" + d[11:], ("--model", "run"), "its header fails its checksum"),
        (lambda d: d[:50], ("--model", "run"), "cut short in the head of a segment"),
        (lambda d: d[:-1], ("--model", "run"), "cut short in a segment"),
        (lambda d: d + b"\0", ("--model", "run"), "do not add up"),
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), ("--model", "run"), "a segment fails its checksum"),
        (lambda d: d, ("--model", "nowhere"), "nowhere holds no config.yaml"),
    ],
)
def test_damage_is_one_line_and_leaves_no_file(  # type: ignore[no-untyped-def]
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    change,
    arguments,
    message: str,
) -> None:
    (tmp_path / "f").write_text("the cat saw the bird " * 10)
    assert programs(run, monkeypatch, str(tmp_path / "f"), "--model", "run") == 0
    coded = tmp_path / "f.vftm"
    coded.write_bytes(change(coded.read_bytes()))
    capfd.readouterr()
    output = ("--output", str(tmp_path / "back"))
    assert programs(run, monkeypatch, str(coded), *arguments, *output, unpack=True) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert message in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.vftm"]


def test_what_cannot_be_coded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert programs(run, monkeypatch, str(tmp_path / "f"), "--model", "run") == 2
    assert "there is no file" in capfd.readouterr().err
    (tmp_path / "f").write_text("a")
    (tmp_path / "f.vftm").write_text("kept")
    assert programs(run, monkeypatch, str(tmp_path / "f"), "--model", "run") == 2
    assert "exists: remove it" in capfd.readouterr().err
    assert (tmp_path / "f.vftm").read_text() == "kept"
    assert programs(run, monkeypatch, str(tmp_path / "f"), "--model", "run", unpack=True) == 2
    assert "does not end in .vftm" in capfd.readouterr().err


def test_other_arithmetic_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_text("the cat")
    assert programs(run, monkeypatch, str(tmp_path / "f"), "--model", "run") == 0
    monkeypatch.setattr("vocabfold.inference.text_file._arithmetic", lambda *_: b"elsewhere")
    (tmp_path / "f").unlink()
    assert programs(run, monkeypatch, str(tmp_path / "f.vftm"), "--model", "run", unpack=True) == 2
    assert "computes other numbers" in capfd.readouterr().err
