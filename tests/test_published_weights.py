"""Files in the published layout, written here by hand: both prefixes, shards, buffers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.models.published import load_published

GPT2_CONFIG = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 10,
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 10,
    "vocab_size": 13,
}
GPT_NEO_CONFIG = {
    "activation_function": "gelu_new",
    "attention_types": [[["global", "local"], 1]],
    "hidden_size": 8,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 10,
    "model_type": "gpt_neo",
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 13,
    "window_size": 4,
}
TOKENS = torch.tensor([[1, 5, 12, 0, 3, 3, 7, 2, 9, 11]])


def published_weights(architecture: str, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Random weights under the names and in the shapes that the models were published with (V 13, D 8)."""
    shapes: dict[str, list[int]] = {"wte.weight": [13, 8], "wpe.weight": [10, 8], "ln_f.weight": [8], "ln_f.bias": [8]}
    for layer in range(2):
        block = {"ln_1.weight": [8], "ln_1.bias": [8], "ln_2.weight": [8], "ln_2.bias": [8]}
        block |= {"mlp.c_fc.bias": [32], "mlp.c_proj.bias": [8]}
        if architecture == "gpt2":
            block |= {"attn.c_attn.weight": [8, 24], "attn.c_attn.bias": [24]}
            block |= {"attn.c_proj.weight": [8, 8], "attn.c_proj.bias": [8]}
            block |= {"mlp.c_fc.weight": [8, 32], "mlp.c_proj.weight": [32, 8]}
        else:
            block |= {f"attn.attention.{name}_proj.weight": [8, 8] for name in "qkv"}
            block |= {"attn.attention.out_proj.weight": [8, 8], "attn.attention.out_proj.bias": [8]}
            block |= {"mlp.c_fc.weight": [32, 8], "mlp.c_proj.weight": [8, 32]}
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(3)
    weights = {prefix + name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inner = "attn." if architecture == "gpt2" else "attn.attention."
    for layer in range(2):
        weights[f"{prefix}h.{layer}.{inner}bias"] = torch.ones(1, 1, 10, 10).tril()
        weights[f"{prefix}h.{layer}.{inner}masked_bias"] = torch.tensor(-1e9)
    return weights


def write(folder: Path, weights: dict[str, Tensor], config: dict, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_architecture(folder: Path, architecture: str, prefix: str = "transformer.") -> Path:
    config = GPT2_CONFIG if architecture == "gpt2" else GPT_NEO_CONFIG
    return write(folder, published_weights(architecture, prefix), config)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo"])
def test_a_file_in_the_published_layout_computes_what_transformers_computes(
    tmp_path: Path, architecture: str, prefix: str
) -> None:
    folder = write_architecture(tmp_path, architecture, prefix)
    ours = load_published(folder).eval()
    # Filled in by name rather than read from the file, so that a reader's rename rules cannot hide ours.
    theirs = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    theirs.load_state_dict(published_weights(architecture, prefix=""), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert ours.config.attention == architecture
    assert ours.config.window == (4 if architecture == "gpt_neo" else 256)


def test_file_folder_and_shards_give_the_same_model(tmp_path: Path) -> None:
    weights = published_weights("gpt2")
    whole = write(tmp_path / "whole", weights, GPT2_CONFIG)
    names = sorted(weights)
    parts = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, members in parts.items():
        sharded = write(tmp_path / "sharded", {name: weights[name] for name in members}, GPT2_CONFIG, file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    expected = load_published(whole).state_dict()
    for source in (whole / "model.safetensors", sharded, index):
        found = load_published(source).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    with pytest.raises(UserError, match="lacks weights"):
        load_published(sharded / next(iter(parts)))
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors does not exist"):
        load_published(sharded)
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="no weight_map of file names beside it"):
        load_published(sharded)


def test_half_precision_files_load_in_the_default_dtype(tmp_path: Path) -> None:
    weights = {name: weight.half() for name, weight in published_weights("gpt2").items()}
    model = load_published(write(tmp_path, weights, GPT2_CONFIG))
    assert model.token_embedding.weight.dtype == torch.float32
    assert torch.equal(model.token_embedding.weight, weights["transformer.wte.weight"].float())


def test_a_head_is_read_when_it_is_the_embedding_and_refused_otherwise(tmp_path: Path) -> None:
    weights = published_weights("gpt2")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    load_published(write(tmp_path, weights, GPT2_CONFIG))
    weights["lm_head.weight"][4, 2] += 1e-3
    with pytest.raises(UserError, match=r"lm_head\.weight of its own, but only a head tied to wte"):
        load_published(write(tmp_path, weights, GPT2_CONFIG))


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    weights = published_weights("gpt2")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(UserError, match=r"lacks weights h\.1\.mlp\.c_fc\.bias: "):
        load_published(write(tmp_path, weights, GPT2_CONFIG))

    weights = published_weights("gpt2") | {"transformer.h.2.ln_1.bias": torch.zeros(8)}
    with pytest.raises(UserError, match=r"has unexpected weights h\.2\.ln_1\.bias: "):
        load_published(write(tmp_path, weights, GPT2_CONFIG))

    # A transposed weight is the mistake that the layout invites.
    weights = published_weights("gpt2")
    weights["transformer.h.0.attn.c_attn.weight"] = torch.zeros(24, 8)
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn\.weight \[24, 8\] instead of \[8, 24\]"):
        load_published(write(tmp_path, weights, GPT2_CONFIG))

    with pytest.raises(UserError, match="lacks weights") as refusal:
        load_published(write(tmp_path, published_weights("gpt2"), GPT_NEO_CONFIG))
    assert "\n" not in str(refusal.value)


def test_pickles_and_absent_or_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match=r"a pickle can run code: convert them to model\.safetensors"):
        load_published(tmp_path)
    with pytest.raises(UserError, match="only safetensors are read"):
        load_published(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"absent\.safetensors does not exist"):
        load_published(tmp_path / "absent.safetensors")

    folder = write_architecture(tmp_path / "cut", "gpt2")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_published(folder)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gpt2", {"model_type": "llama"}, 'model_type "llama": only "gpt2" and "gpt_neo" are read'),
        ("gpt2", {"n_head": "two"}, "no whole number n_head"),
        ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
        ("gpt2", {"n_inner": 24}, "n_inner 24"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, "only alternating global and local layers"),
        ("gpt_neo", {"attention_types": [[["local", "global"], 1]]}, "only alternating global and local layers"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}, "for 2 layers"),
        ("gpt_neo", {"attention_types": "global"}, "no readable attention_types"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path: Path, architecture: str, changes: dict, message: str) -> None:
    folder = write_architecture(tmp_path, architecture)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        load_published(folder)


def test_a_config_that_is_absent_or_no_json_is_refused(tmp_path: Path) -> None:
    folder = write_architecture(tmp_path, "gpt2")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not readable JSON"):
        load_published(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_published(folder)
