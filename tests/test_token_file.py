"""Token files: the same as tokenising in a plain loop, whole or built again, safe under two builders."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vocabfold.data import token_file as module
from vocabfold.data import tokenise
from vocabfold.data.token_file import (
    DamagedTokenFile,
    TokenFile,
    cached_token_file,
    open_token_file,
    write_token_file,
)
from vocabfold.data.tokenise import build_token_file
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.errors import UserError


def documents(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["the", "cat's", "straße", "  ", "\n", "日本", "went", "😀", "home.", "<|endoftext|>"]
    return [" ".join(rng.choices(words, k=rng.randrange(40))) for _ in range(count)]


def check(built: TokenFile, texts: list[str], name: str) -> None:
    """Against one loop over the documents."""
    tokenizer = load_tokenizer(name)
    expected, starts = [], [0]
    for text in texts:
        expected += [*tokenizer.encode(text), tokenizer.end_token]
        starts.append(len(expected))
    assert built.tokens.tolist() == expected
    assert built.document_starts.tolist() == starts
    assert built.document_starts.dtype == np.uint64
    assert len(built) == len(expected)
    assert built.num_documents == len(texts)
    assert built.vocabulary_size == tokenizer.vocabulary_size


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", np.uint16), ("cl100k", np.uint32)])
def test_equals_a_plain_loop(tmp_path: Path, name: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "CHARACTERS_PER_CHUNK", 1000)
    texts = documents(300)
    built = build_token_file(tmp_path / "c", iter(texts), load_tokenizer(name), 1, "test", {"a": 1})
    assert isinstance(built.tokens, np.memmap) and built.tokens.dtype == dtype
    check(built, texts, name)
    check(open_token_file(tmp_path / "c", {"a": 1}), texts, name)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_worker_processes_give_the_same_and_hold_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "CHARACTERS_PER_CHUNK", 1000)
    monkeypatch.setattr(tokenise, "CHARACTERS_WITHOUT_WORKERS", 5000)
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for text in texts:
            taken += len(text)
            yield text

    texts = documents(400)
    chunks = tokenise._encoded_chunks(source(), load_tokenizer("gpt2"), 2, "test")
    first = next(chunks)
    assert taken < 5000 + 1000 * 8 < sum(map(len, texts)) / 2
    rest = list(chunks)
    built = write_token_file(tmp_path / "c", [first, *rest], 50257, {})
    check(built, texts, "gpt2")


def test_little_text_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "worker_processes", None)
    texts = documents(20)
    check(build_token_file(tmp_path / "c", texts, load_tokenizer("gpt2"), 8, "test", {}), texts, "gpt2")


def test_dtype_boundary() -> None:
    assert module.token_dtype(65536) == np.uint16
    assert module.token_dtype(65537) == np.uint32


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"):
        build_token_file(tmp_path / "c", [], load_tokenizer("gpt2"), 1, "test", {})
    assert list(tmp_path.iterdir()) == []


def test_a_document_may_span_chunks(tmp_path: Path) -> None:
    chunks = [(np.arange(7), np.array([3])), (np.arange(2), np.array([], int)), (np.arange(4), np.array([8, 2]))]
    assert write_token_file(tmp_path / "c", chunks, 5000, {}).document_starts.tolist() == [0, 3, 11, 13]
    with pytest.raises(ValueError, match="sum to 12"):
        write_token_file(tmp_path / "d", [(np.arange(13), np.array([12]))], 5000, {})


def test_id_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="70000"):
        write_token_file(tmp_path / "c", [(np.array([70000]), np.array([1]))], 50257, {})


class Builder:
    """Counts how often the cache had to be built."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path, key: dict[str, Any]) -> TokenFile:
        self.calls += 1
        return write_token_file(folder, [(np.arange(1000), np.array([400, 600]))], 5000, key)


def cached(cache_dir: Path, builder: Builder, key: dict[str, Any] | None = None) -> TokenFile:
    return cached_token_file(cache_dir, "corpus-train", key or {"source": "x"}, builder)


def test_cache_is_built_once_for_a_key(tmp_path: Path) -> None:
    builder = Builder()
    first = cached(tmp_path / "deep" / "cache", builder)
    again = cached(tmp_path / "deep" / "cache", builder)
    assert builder.calls == 1 and first.folder == again.folder
    assert first.folder.name.startswith("corpus-train-") and len(first.folder.name) == len("corpus-train-") + 12
    assert cached(tmp_path / "deep" / "cache", builder, {"source": "y"}).folder != first.folder
    assert builder.calls == 2


def test_a_finished_cache_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a cache in a folder that cannot be written still serves."""
    builder = Builder()
    first = cached(tmp_path, builder)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the lock was taken")

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    assert cached(tmp_path, builder).tokens.tolist() == first.tokens.tolist()


def test_code_version_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder()
    first = cached(tmp_path, builder)
    monkeypatch.setattr(module, "TOKEN_FILE_VERSION", module.TOKEN_FILE_VERSION + 1)
    assert cached(tmp_path, builder).folder != first.folder


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[777] ^= 4
    (folder / "tokens.bin").write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])


def flip_a_start(folder: Path) -> None:
    content = bytearray((folder / "document_starts.bin").read_bytes())
    content[8] ^= 1
    (folder / "document_starts.bin").write_bytes(content)


def lose_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


def cut_meta(folder: Path) -> None:
    (folder / "meta.json").write_text((folder / "meta.json").read_text()[:50])


def other_key(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "key": {}}))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, flip_a_start, lose_meta, cut_meta, other_key])
def test_damage_is_noticed_told_and_mended(tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    builder = Builder()
    folder = cached(tmp_path, builder).folder
    key = json.loads((folder / "meta.json").read_text())["key"]
    damage(folder)
    with pytest.raises(DamagedTokenFile, match="damaged"):
        open_token_file(folder, key)
    mended = cached(tmp_path, builder)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "damaged" in told and "building it again" in told
    assert builder.calls == 2 and mended.tokens.tolist() == list(range(1000))
    cached(tmp_path, builder)
    assert builder.calls == 2
    assert not list(tmp_path.glob(".*.part"))


def test_a_build_that_dies_leaves_no_cache(tmp_path: Path) -> None:
    def dying() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield np.arange(10), np.array([10])
        raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        write_token_file(tmp_path / "c", dying(), 5000, {})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    builder = Builder()
    folder = cached(tmp_path, builder).folder
    leftover = tmp_path / f".{folder.name}.12345.part"
    folder.rename(leftover)
    assert cached(tmp_path, builder).tokens.tolist() == list(range(1000))
    assert not leftover.exists()


def test_unwritable_cache_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        cached(tmp_path / "file" / "cache", Builder())


def _write_many(folder: Path, value: int) -> None:
    for _ in range(30):
        write_token_file(folder, [(np.full(2000, value), np.array([2000]))], 5000, {})


def _build_and_count(cache_dir: Path, log: Path) -> None:
    def build(folder: Path, key: dict[str, Any]) -> TokenFile:
        with log.open("a") as out:
            out.write("built\n")
        return write_token_file(folder, [(np.arange(500), np.array([500]))], 5000, key)

    assert cached_token_file(cache_dir, "corpus", {"source": "x"}, build).tokens.tolist() == list(range(500))


def _run_two(target: Any, arguments: list[tuple[Any, ...]]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_two_processes_build_a_cache_once(tmp_path: Path) -> None:
    _run_two(_build_and_count, [(tmp_path / "cache", tmp_path / "log")] * 2)
    assert (tmp_path / "log").read_text() == "built\n"


def test_two_writers_without_the_lock_leave_one_whole_file(tmp_path: Path) -> None:
    _run_two(_write_many, [(tmp_path / "c", 1), (tmp_path / "c", 2)])
    assert set(open_token_file(tmp_path / "c").tokens.tolist()) in ({1}, {2})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_another_writer_moves_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our move, which fails on it, and what we do about that."""
    _write_many(tmp_path / "c", 1)
    rename = Path.rename

    def rename_and_lose_the_target(source: Path, target: Path) -> Path:
        try:
            return rename(source, target)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise

    monkeypatch.setattr(Path, "rename", rename_and_lose_the_target)
    _write_many(tmp_path / "c", 2)
    assert set(open_token_file(tmp_path / "c").tokens.tolist()) == {2}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_file_in_the_place_of_a_token_file_stays(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not ours")
    with pytest.raises(NotADirectoryError):
        _write_many(tmp_path / "c", 1)
    assert (tmp_path / "c").read_text() == "not ours"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
