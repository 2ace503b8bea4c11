"""Input embeddings of transformers' models in fewer bytes: what is looked up, what stays, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from test_hugging_face_models import SMALL, VOCABULARY, gemma, gpt2, llama
from vocabfold.embeddings import EmbeddingSettings, compress_table, relative_error
from vocabfold.errors import UserError
from vocabfold.hugging_face import compress_embedding, fold, screen

IDS = torch.tensor([[3, 499, 0, 7, 7, 250]])
METHODS: dict[str, dict[str, Any]] = {
    "mixed": {"frequent_rows": 300},
    "int4": {},
    "int8": {},
    "low_rank": {"compression": 4},
    "tt_matrix": {"compression": 4},
    "tensor_train": {"compression": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [llama, gemma, gpt2])
def test_the_model_reads_the_rows_that_the_embedding_stands_for(build: Any, method: str, dtype: torch.dtype) -> None:
    model, expected = build().to(dtype), build().to(dtype)
    table = expected.get_input_embeddings().weight
    options = METHODS[method] | ({"group_size": 32} if method == "int4" else {})
    reference = compress_table(EmbeddingSettings(name=method, **options), table.detach().float())
    reference.prepare_for_inference()
    compressed = compress_embedding(model, method, **METHODS[method])
    assert compressed.bytes_at_rest == reference.bytes_at_rest
    with torch.no_grad():
        if expected.get_output_embeddings().weight is table:  # the output rows stay
            expected.get_output_embeddings().weight = torch.nn.Parameter(table.clone())
        table.copy_(reference.rows(0, VOCABULARY))
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("is_tied", [True, False])
def test_output_rows_stay_unless_they_are_asked_to_follow(is_tied: bool) -> None:
    model = llama(tie_word_embeddings=is_tied)
    before = model.get_output_embeddings().weight.detach().clone()
    compress_embedding(model, "int4")
    assert torch.equal(model.get_output_embeddings().weight, before)
    model.tie_weights()  # as resizing and loading do: nothing is tied again
    assert torch.equal(model.get_output_embeddings().weight, before)
    assert screen(model).topk(torch.randn(1, 32), 3)[1].shape == (1, 3)
    if not is_tied:
        with pytest.raises(UserError, match="output rows of its own"):
            compress_embedding(llama(), "int4", outputs=True)
        return
    model = llama(tie_word_embeddings=True)
    embedding = compress_embedding(model, "int4", outputs=True)
    assert torch.equal(model.get_output_embeddings().weight, embedding.rows(0, VOCABULARY))


def test_the_default_is_4_bits_in_the_largest_groups_of_64_32_and_16_that_fit() -> None:
    model = llama()
    table = model.get_input_embeddings().weight.detach().clone()
    embedding = compress_embedding(model)
    assert embedding.compression == pytest.approx(32 / 4.5)
    assert 0.01 < relative_error(embedding, table) < 0.12
    for size, group in ((128, 64), (96, 32), (48, 16)):
        wide = LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": size}))
        assert compress_embedding(wide).compression == pytest.approx(32 / (4 + 16 / group))
    odd = LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": 24}))
    assert compress_embedding(odd, "int4").compression == pytest.approx(32 / (4 + 16 / 24))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_folded_model_reads_the_compressed_rows_and_keeps_its_head(is_tied: bool) -> None:
    model, expected = (fold(llama(tie_word_embeddings=is_tied), group_size=20) for _ in range(2))
    embedding = compress_embedding(model)
    with torch.no_grad():
        wanted = expected(inputs_embeds=embedding.rows(0, VOCABULARY)[IDS], labels=IDS).loss
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, wanted)
    with pytest.raises(UserError, match="output rows of its own"):
        compress_embedding(expected, outputs=True)


def test_greedy_texts_come_from_the_compressed_rows() -> None:
    model = llama(tie_word_embeddings=True)
    compress_embedding(model, "low_rank", rank=1)
    text = model.generate(input_ids=IDS, do_sample=False, max_new_tokens=4, pad_token_id=0)
    expected = IDS
    with torch.no_grad():
        for _ in range(4):  # without a cache, by hand
            hidden = model.model(expected).last_hidden_state[:, -1]
            best = F.linear(hidden, model.lm_head.weight).argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], dim=1)
    assert torch.equal(text, expected)


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    compressed = llama()
    compress_embedding(compressed)
    half = llama()
    half.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 32, max_norm=1.0))
    other = llama()
    other.set_input_embeddings(torch.nn.Linear(2, 2))
    for action, message in (
        (lambda: compress_embedding(torch.nn.Linear(2, 2)), "Linear is not a model of transformers"),
        (lambda: compress_embedding(compressed), "compressed already"),
        (lambda: fold(compressed), "fold it before"),
        (lambda: compressed.save_pretrained(tmp_path / "model"), "is not saved"),
        (lambda: compress_embedding(half), "does more than look up"),
        (lambda: compress_embedding(other), "one of its own kind"),
        (lambda: compress_embedding(llama().to("meta")), "quantised or sharded"),
        (lambda: compress_embedding(llama(), "int5"), "choose one of dense, tensor_train"),
        (lambda: compress_embedding(llama(), "int4", bits=3), "has no option 'bits'"),
        (lambda: compress_embedding(llama(), "low_rank"), "needs a size"),
        (lambda: compress_embedding(llama(), "tensor_train", compression=64), "out of reach"),
    ):
        with pytest.raises(UserError, match=message) as error:
            action()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
