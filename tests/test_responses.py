"""Answers on disk: the same request gets the same answer, no other request does, and damage is noticed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import generate as program
from vocabfold import train
from vocabfold.errors import UserError
from vocabfold.heads import HeadSettings
from vocabfold.inference import ResponseCache, fingerprint
from vocabfold.inference.responses import MARK, SUFFIX, pack, unpack
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

REQUEST = {"weights": "abc", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0.8, "top_k": None, "seed": 0}


def answer(cache: ResponseCache, request: dict, tokens: list[int]) -> tuple[list[int], bool]:
    """What comes for ``request``, where ``tokens`` would be computed, and whether they were."""
    computed = []

    def compute() -> Iterator[int]:
        computed.append(True)
        yield from tokens

    return list(cache.answer(request, compute)), bool(computed)


@pytest.mark.parametrize("tokens", [[], [0], [65_535] * 300, [65_536, 7], list(range(1000)), [100_276]])
def test_an_answer_comes_back_as_it_was(tmp_path: Path, tokens: list[int]) -> None:
    cache = ResponseCache(tmp_path / "new" / "folder", 1 << 20)
    assert answer(cache, REQUEST, tokens) == (tokens, True)
    assert answer(cache, REQUEST, [9]) == (tokens, False)
    assert answer(ResponseCache(cache.folder, 1 << 20), REQUEST, [9]) == (tokens, False)
    assert unpack("key", pack("key", tokens)) == tokens
    assert unpack("other key", pack("key", tokens)) is None


def test_no_other_request_gets_it(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path, 1 << 20)
    answer(cache, REQUEST, [5])
    others = [
        ("weights", "abd"),
        ("prompt", [1, 2]),
        ("max_tokens", 5),
        ("temperature", 0.81),
        ("top_k", 1),
        ("seed", 1),
    ]
    for key, value in others:
        assert answer(cache, REQUEST | {key: value}, [6]) == ([6], True), key
    assert answer(cache, REQUEST, [7]) == ([5], False)


def test_an_answer_that_was_not_taken_to_its_end_is_not_stored(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path, 1 << 20)
    tokens = cache.answer(REQUEST, lambda: iter([1, 2, 3]))
    assert next(tokens) == 1
    tokens.close()  # type: ignore[attr-defined]
    assert cache.get(REQUEST) is None and cache.stored_bytes == 0


def test_every_damaged_byte_and_every_cut_is_noticed_and_dropped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = ResponseCache(tmp_path, 1 << 20)
    cache.put(REQUEST, [1, 2, 3] * 9)
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    content = path.read_bytes()
    damaged = [content[:index] for index in range(len(content))]
    damaged += [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content))]
    assert all(unpack(path.stem, other) is None for other in damaged)
    for other in (b"", content[:-1], damaged[-1]):
        path.write_bytes(other)
        capfd.readouterr()
        assert cache.get(REQUEST) is None and not path.exists()
        assert capfd.readouterr().err == f"response cache: {path.name} is damaged and was dropped\n"
    cache.put(REQUEST | {"seed": 1}, [4])
    (moved,) = tmp_path.glob(f"*{SUFFIX}")
    moved.rename(path)  # whole, but the answer to something else
    assert cache.get(REQUEST) is None
    assert answer(cache, REQUEST, [8]) == ([8], True)


def test_a_made_up_answer_is_dropped_and_unpacks_to_no_more_than_it_may() -> None:
    """With a digest that fits: whoever can write the file can compute it."""
    bomb = zlib.compressobj(9, wbits=-15)
    large = bomb.compress(bytes(1 << 25)) + bomb.flush()
    tracemalloc.start()
    for body in (b"2d" + large, b"2dno deflate", b"2d", b"3p1234", b"2x1234", b"2p123", b"4p12", b"", b"2"):
        assert unpack("key", MARK + hashlib.sha256(b"key" + body).digest() + body) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_the_least_recently_used_answers_go_first(tmp_path: Path) -> None:
    size = len(pack("0" * 64, [1, 2, 3]))
    cache = ResponseCache(tmp_path, 3 * size)
    requests = [REQUEST | {"seed": seed} for seed in range(5)]
    for age, request in enumerate(requests[:3]):
        cache.put(request, [1, 2, 3])
        os.utime(cache._path(request), (age, age))
    assert cache.get(requests[0]) == [1, 2, 3]  # used now
    for request in requests[3:]:
        cache.put(request, [1, 2, 3])
        assert cache.stored_bytes <= cache.limit_bytes
    assert [cache.get(request) is not None for request in requests] == [True, False, False, True, True]
    cache.put(REQUEST | {"seed": 9}, list(range(1000)))  # can never fit
    assert cache.stored_bytes == 3 * size and cache.get(requests[0]) is not None
    assert {path.suffix for path in tmp_path.iterdir()} == {SUFFIX}


def test_bad_folders_and_limits_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder"):
        ResponseCache(tmp_path / "file", 1)
    with pytest.raises(UserError, match="limited to -1 bytes"):
        ResponseCache(tmp_path, -1)
    cache = ResponseCache(tmp_path / "gone", 1 << 20)
    shutil.rmtree(cache.folder)
    assert cache.get(REQUEST) is None
    cache.put(REQUEST, [1])  # made again
    assert cache.get(REQUEST) == [1]


def tiny_model(**changes: int) -> ModelWithHead:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_positions": 8} | changes
    return build_model(ModelSettings(**sizes), HeadSettings(tied=True), 11)  # type: ignore[arg-type]


def test_the_fingerprint_changes_with_every_weight_and_with_the_shape() -> None:
    expected = fingerprint(tiny_model())
    assert fingerprint(tiny_model()) == expected
    assert fingerprint(tiny_model(num_heads=4)) != expected  # the same weights, used in another way
    for name, _ in tiny_model().named_parameters():
        model = tiny_model()
        with torch.no_grad():
            weight = dict(model.named_parameters())[name].view(-1)
            weight[-1] += 1e-3
        assert fingerprint(model) != expected, name


def test_the_program_serves_texts_again_and_drops_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    assert call(train.main, monkeypatch, *TINY, "run_dir=run") == 0
    computed = []
    compute = program.generate
    monkeypatch.setattr(program, "generate", lambda *a, **k: computed.append(1) or compute(*a, **k))  # type: ignore[func-returns-value]

    def texts(*options: str) -> tuple[str, str, int]:
        computed.clear()
        capfd.readouterr()
        prompts = ("run", "the cat saw the bird", "the cat saw a dog", "")
        assert call(program.main, monkeypatch, *prompts, "--max-tokens", "8", *options) == 0
        captured = capfd.readouterr()
        told = [line for line in captured.err.splitlines() if "gibberish" not in line]  # as such a run writes
        return captured.out, "\n".join(told), len(computed)

    plain, _, count = texts()
    assert (
        count == 3 and plain.startswith("--- text 1 of 3 ---\nthe cat saw the bird") and "\nthe cat saw a dog" in plain
    )
    assert texts("--key-values", "none")[0] == texts("--prefix-cache-mib", "1")[0] == plain
    on = ("--response-cache", "answers")
    assert [texts(*on) for _ in range(2)] == [(plain, "", 3), (plain, "", 0)]
    assert texts(*on, "--seed", "1")[2] == 3
    assert texts(*on, "--key-values", "int8", "--prefix-cache-mib", "1")[2] == 3
    for path in Path("answers").glob(f"*{SUFFIX}"):
        path.write_bytes(path.read_bytes()[:-1])
    mended = texts(*on)
    assert (mended[0], mended[2]) == (plain, 3) and mended[1].count("is damaged and was dropped") == 3
    assert texts(*on) == (plain, "", 0)

    for options, message in (
        (("--prefix-cache-mib", "nan"), "--prefix-cache-mib is nan"),
        (("--response-cache", "run/config.yaml"), "name another folder"),
        ((*on, "--response-cache-mib", "-1"), "--response-cache-mib is -1.0"),
        ((*on, "--temperature", "-1"), "temperature is -1.0"),
        (("--key-values", "none", "--prefix-cache-mib", "1"), "needs a key/value cache"),
    ):
        capfd.readouterr()
        assert call(program.main, monkeypatch, "run", "the cat", *options) == 2
        error = capfd.readouterr().err
        assert message in error and error.count("\n") == 1
