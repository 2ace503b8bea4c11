"""Folded models in folders, and the way back to the models that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from test_hugging_face_fold import MODELS, OPTIONS, VOCABULARY, small_llama, stirred, texts
from vocabfold.errors import UserError
from vocabfold.hugging_face import fold, unfold
from vocabfold.hugging_face.folded_model import FoldedForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_a_folder_gives_the_model_back(name: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    finished = MODELS[name]()
    for parameter in finished.parameters():  # Module.to would round the rotary frequencies too, which no folder holds
        parameter.data = parameter.data.to(dtype)
    model = stirred(fold(finished, **options))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "vocabfold_folded" and "auto_map" not in config
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, local_files_only=True)
    assert type(loaded) is FoldedForCausalLM
    assert loaded.config.tie_word_embeddings == (name == "tied llama")
    assert (loaded.head.scorer.weight is loaded.get_input_embeddings().weight) == (name == "tied llama")
    ids = texts()
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert torch.equal(loaded(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss)
    states = torch.randn(2, 32).to(dtype)
    assert torch.equal(loaded.head.topk(states, 3)[1], model.head.topk(states, 3)[1])
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(again(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_model_of_a_config_alone_begins_to_learn() -> None:
    config = fold(small_llama(tie_word_embeddings=True), group_size=10).config
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    assert model.head.scorer.weight is model.get_input_embeddings().weight
    ids = texts()
    assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(np.log(VOCABULARY), rel=0.3)


def test_a_damaged_folder_is_one_line(tmp_path: Path) -> None:
    fold(small_llama(), group_size=10).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for sizes in ([[10, 9]], [[0, 3], [101, 1]], None):
        path.write_text(json.dumps(config | {"group_sizes": sizes}))
        with pytest.raises(UserError, match=r"config\.json") as error:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_unfolding_gives_the_model_back_bit_by_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[name]()
    ids, kind = texts(), type(model)
    expected, rows = model(input_ids=ids).logits, model.get_output_embeddings().weight.detach().clone()
    folded = fold(model, **options)
    if options.get("start_from_counts"):
        with pytest.raises(UserError, match="groups' scores and biases have no place"):
            unfold(folded)
        return
    folded.save_pretrained(tmp_path)
    for each in (folded, AutoModelForCausalLM.from_pretrained(tmp_path)):
        plain = unfold(each)
        assert type(plain) is kind
        assert torch.equal(plain.get_output_embeddings().weight, rows)
        assert torch.equal(plain(input_ids=ids).logits, expected)
        tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
        assert tied == ("tied" in name)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(input_ids=ids).logits, expected)


def test_unfolding_a_trained_head_says_what_is_lost() -> None:
    model = fold(small_llama(), group_size=10)
    with torch.no_grad():  # the groups' scores alone leave the rows as they were
        multi = model.head.partition.multi_groups
        model.head.group_weight[multi] += 1
    unfold(model)
    with torch.no_grad():
        model.head.scorer.weight[5] += 1
    with pytest.raises(UserError, match="drop_trained=True") as error:
        unfold(model)
    assert "\n" not in str(error.value)
    plain = unfold(model, drop_trained=True)
    token = int(model.head.partition.multi_tokens[5])
    assert torch.equal(plain.get_output_embeddings().weight[token], model.head.scorer.weight[5])
