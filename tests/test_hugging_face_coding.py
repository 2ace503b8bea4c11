"""Models of transformers behind our own caches, and texts coded with them: the same states, the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from run_cases import call
from test_hugging_face_models import SMALL, VOCABULARY, awake, gemma, gpt2, llama
from vocabfold import compress as compressing
from vocabfold.errors import UserError
from vocabfold.generate import generate
from vocabfold.hugging_face import pretrained
from vocabfold.hugging_face.byte_tokens import ByteTokens
from vocabfold.hugging_face.text import text_model_of
from vocabfold.inference import PrefixCache, fingerprint, text_file

TEXT = "the cat sat on the mat, 12 caf\u00e9s \U0001f600\n"


def byte_tokenizer(with_merges: bool = True) -> Any:
    alphabet = list(bytes_to_unicode().values())
    vocabulary = {"<|endoftext|>": 0} | {character: 1 + index for index, character in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("a", "t")] if with_merges else []
    vocabulary |= {left + right: len(vocabulary) + index for index, (left, right) in enumerate(merges)}
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize("build", [llama, gemma, gpt2])
def test_states_through_our_caches_are_those_of_the_model(build: Any) -> None:
    model = build()  # gemma's sliding layers see the last 8 positions
    ours = pretrained(model)
    ids = torch.randint(VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(ours.head.logits(ours.gpt(ids)), expected, rtol=1e-4, atol=1e-4)
        cache = ours.gpt.new_cache(2)
        pieces = [ours.gpt(piece, cache) for piece in ids.split([9, 1, 1, 10], dim=1)]
    torch.testing.assert_close(ours.head.logits(torch.cat(pieces, dim=1)), expected, rtol=1e-4, atol=1e-4)
    assert cache.length == 21


@pytest.mark.parametrize("build", [llama, gemma, gpt2])
def test_texts_are_those_of_transformers_with_and_without_beginnings_that_were_read(build: Any) -> None:
    model = build()
    ours, prefixes = pretrained(model), PrefixCache(1 << 20)
    prompt = list(range(1, 15))
    expected = model.generate(
        input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=10, pad_token_id=0, use_cache=True
    )[0, len(prompt) :].tolist()
    for options in ({}, {"key_values": "none"}, {"prefixes": prefixes}, {"prefixes": prefixes}):
        assert list(generate(ours, prompt, 10, temperature=0.0, **options)) == expected
    assert prefixes.stored_bytes > 0


def test_rounded_keys_and_values_cost_little_and_take_fewer_bytes() -> None:
    ours = pretrained(llama())
    prompt = list(range(1, 40))
    assert len(list(generate(ours, prompt, 3, temperature=0.0, key_values="int8"))) == 3
    with pytest.raises(UserError, match="max_positions 8"):
        pretrained(llama(), max_positions=8).gpt(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(UserError, match="call new_cache\\(1\\)"):
        ours.gpt(torch.zeros(1, 2, dtype=torch.long), ours.gpt.new_cache(2))


def test_what_a_model_computes_names_it(tmp_path: Path) -> None:
    first = fingerprint(pretrained(llama()))
    llama().save_pretrained(tmp_path)
    assert fingerprint(pretrained(LlamaForCausalLM.from_pretrained(tmp_path).eval())) == first
    assert fingerprint(pretrained(llama(rope_theta=500.0))) != first
    assert fingerprint(pretrained(llama(), max_positions=16)) != first
    with torch.no_grad():
        (changed := llama()).model.norm.weight[0] += 1
    assert fingerprint(pretrained(changed)) != first


@pytest.mark.parametrize("with_merges", [True, False])
def test_any_bytes_come_back_from_their_tokens(with_merges: bool) -> None:
    tokens = ByteTokens(byte_tokenizer(with_merges), 300)
    random = np.random.default_rng(0).bytes(200)
    for data in (b"", TEXT.encode(), TEXT.encode()[:-3], random, b"one<|endoftext|>\ntwo", bytes(range(256))):
        ids = tokens.encode_bytes(data)
        assert ids.dtype == np.uint32 and tokens.decode_bytes(ids) == data
    assert tokens.encode("<|endoftext|>") == [tokens.end_token] == [0]
    assert (len(tokens.encode("the")) == 1) is with_merges
    with pytest.raises(ValueError, match="299"):
        tokens.decode_bytes([299])


def test_a_byte_without_a_token_is_noticed_and_its_text_stored(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["vocab"][bytes_to_unicode()[4]]
    poorer = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(state)))
    tokens = ByteTokens(poorer, 300)
    assert tokens.decode_bytes(tokens.encode_bytes(TEXT.encode() + b"\xff")) == TEXT.encode() + b"\xff"
    assert tokens.decode_bytes(tokens.encode_bytes(b"a\x04b")) != b"a\x04b"
    coder = text_model_of(awake(LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 300}))), poorer)
    (tmp_path / "plain").write_bytes(b"a\x04b" * 9)
    text_file.compress(tmp_path / "plain", tmp_path / "coded", coder, lambda *_: None)
    text_file.decompress(tmp_path / "coded", tmp_path / "back", coder, lambda *_: None)
    assert (tmp_path / "back").read_bytes() == b"a\x04b" * 9


def test_tokenizers_that_lose_bytes_are_refused() -> None:
    words = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for tokenizer, message in (
        (PreTrainedTokenizerFast(tokenizer_object=words), "has no token of the byte 10"),
        (object(), "is no fast tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            ByteTokens(tokenizer, 300)
    with pytest.raises(UserError, match="more tokens than the model has rows"):
        ByteTokens(byte_tokenizer(), 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    model = awake(LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 300})))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)  # nearly no opinion: what chance believes firmly codes a text badly
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_another_process_decodes_with_other_threads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "_deflated", lambda text: text + b"longer")  # so that a random model is the shortest
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode() * 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert call(compressing.main, monkeypatch, str(path), "--model", str(folder)) == 0
    finally:
        torch.set_num_threads(threads)
    coded = path.with_suffix(".vftm").read_bytes()
    assert text_file._SEGMENT.unpack_from(coded, text_file._HEADER.size + 4)[1] > 0  # coded with the model
    back = tmp_path / "back"
    words = ["-m", "vocabfold.compress", "--decompress", str(path.with_suffix(".vftm")), "--output", str(back)]
    done = subprocess.run(
        [sys.executable, *words, "--model", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert back.read_bytes() == path.read_bytes()


def test_rows_are_long_enough_and_named_in_the_file(folder: Path) -> None:
    coder = compressing.load_text_model(folder)
    assert [coder.num_rows(count) for count in (1, 511, 1024, 10**6)] == [1, 1, 2, 16]
    other = text_file.text_model(coder.model, coder.tokenizer, rows=2)
    assert other.fingerprint != coder.fingerprint and other.num_rows(10**6) == 2
    with pytest.raises(UserError, match="is not a model"):
        text_model_of(torch.nn.Linear(2, 2), byte_tokenizer())
