"""Published GPT-2 and GPT-Neo weights, in Hugging Face's safetensors layout, into a ``GPT``.

The layout: config.json beside model.safetensors, or beside shards listed in model.safetensors.index.json.
Only safetensors are read, never pickles: a pickle can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.models.gpt import GPT, LAYER_NORM_EPSILON, Block, GPTConfig

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Causal masks that old files carry along as if they were weights.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(attention\.)?(bias|masked_bias)")


def load_published(folder_or_file: Path) -> GPT:
    """Read a folder, one .safetensors file or an index of shards; config.json must lie beside it.

    The head of these models is tied to the embedding: logits are ``hidden @ model.token_embedding.weight.T``. Weights
    come in torch's default dtype whatever the file's; dropout is 0. Raises UserError for a file or config that is
    missing, damaged or of another architecture, for missing, unexpected or mis-shaped weights, and for an untied head.
    """
    files = _weight_files(folder_or_file)
    config = _read_config(files[0].parent / "config.json")
    model = GPT(config)
    destinations = _destinations(model)
    sources = _sources(files)
    head = sources.pop("lm_head.weight", None)
    ignored = {name for name in sources if _MASK_BUFFER.fullmatch(name)}
    _refuse("lacks", destinations.keys() - sources.keys(), folder_or_file)
    _refuse("has unexpected", sources.keys() - destinations.keys() - ignored, folder_or_file)
    misshapen = {
        f"{name} {sources[name].shape} instead of {list(view.shape)}"
        for name, view in destinations.items()
        if sources[name].shape != list(view.shape)
    }
    _refuse("has mis-shaped", misshapen, folder_or_file)
    for file in files:
        with _opened(file) as weights, torch.no_grad():
            for stored_name in weights.keys():  # noqa: SIM118 (not a dictionary)
                if (destination := destinations.get(_without_prefix(stored_name))) is not None:
                    destination.copy_(weights.get_tensor(stored_name))
    if head is not None:
        _refuse_untied_head(head, destinations["wte.weight"])
    return model


def _weight_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = [path / name for name in (WEIGHTS_NAME, INDEX_NAME) if (path / name).is_file()]
        if not found and (any(path.glob("*.bin")) or any(path.glob("*.pt"))):
            raise UserError(
                f"{path} holds pickled weights only, which are not read because a pickle can run code: "
                f"convert them to {WEIGHTS_NAME} (transformers: from_pretrained, then save_pretrained)"
            )
        if not found:
            raise UserError(
                f"{path} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: give the folder of a published model"
            )
        path = found[0]
    if path.name.endswith(".safetensors.index.json"):
        names = _read_json(path).get("weight_map")
        if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
            raise UserError(f"{path} has no weight_map of file names beside it: download the index again")
        files = [path.parent / name for name in sorted(set(names.values()))]
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        raise UserError(
            f"{path} is not a folder or a .safetensors file: only safetensors are read, convert the weights"
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist: download it beside config.json")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: put the model's {path.name} there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return content


def _read_config(path: Path) -> GPTConfig:
    content = _read_json(path)

    def size(*names: str) -> int:
        for name in names:
            if isinstance(content.get(name), int):
                return content[name]
        raise UserError(f"{path} has no whole number {names[0]}: use the config.json published with the weights")

    def require(name: str, wanted: Iterable[object]) -> None:
        if name in content and content[name] not in wanted:
            raise UserError(
                f"{path} has {name} {content[name]}, which this backbone does not compute: use another model"
            )

    architecture = content.get("model_type")
    if architecture == "gpt2":
        config = GPTConfig(
            vocabulary_size=size("vocab_size"),
            hidden_size=size("n_embd", "hidden_size"),
            num_layers=size("n_layer", "num_hidden_layers"),
            num_heads=size("n_head", "num_attention_heads"),
            max_positions=size("n_positions", "max_position_embeddings", "n_ctx"),
        )
        require("scale_attn_weights", [True])
        require("scale_attn_by_inverse_layer_idx", [False])
        require("add_cross_attention", [False])
    elif architecture == "gpt_neo":
        config = GPTConfig(
            vocabulary_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            num_layers=size("num_layers"),
            num_heads=size("num_heads"),
            max_positions=size("max_position_embeddings"),
            attention="gpt_neo",
            window=size("window_size"),
        )
        _check_alternation(content, config, path)
    else:
        raise UserError(f'{path} has model_type "{architecture}": only "gpt2" and "gpt_neo" are read')
    require("activation_function", ["gelu_new", "gelu_pytorch_tanh"])
    require("layer_norm_epsilon", [LAYER_NORM_EPSILON])
    for name in ("n_inner", "intermediate_size"):
        require(name, [None, 4 * config.hidden_size])
    return config


def _check_alternation(content: dict[str, Any], config: GPTConfig, path: Path) -> None:
    try:
        layers = [kind for kinds, repeats in content["attention_types"] for _ in range(repeats) for kind in kinds]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no readable attention_types: use the config.json of the weights") from error
    wanted = ["global" if config.layer_window(layer) is None else "local" for layer in range(config.num_layers)]
    if layers != wanted:
        raise UserError(
            f"{path} has attention_types {content['attention_types']} for {config.num_layers} layers, "
            "but only alternating global and local layers are computed: use another model"
        )


def _destinations(model: GPT) -> dict[str, Tensor]:
    """Where each published weight (named without prefix) goes: a view of a parameter in the published shape."""
    views: dict[str, Tensor] = {
        "wte.weight": cast(Tensor, model.token_embedding.weight),
        "wpe.weight": model.position_embedding.weight,
        "ln_f.weight": model.final_norm.weight,
        "ln_f.bias": model.final_norm.bias,
    }
    is_gpt2 = model.config.attention == "gpt2"
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        fused, output = block.attention.query_key_value, block.attention.output
        linears = {"mlp.c_fc": block.widen, "mlp.c_proj": block.narrow}
        if is_gpt2:
            linears |= {"attn.c_attn": fused, "attn.c_proj": output}
        else:
            linears["attn.attention.out_proj"] = output
            for name, rows in zip("qkv", fused.weight.chunk(3), strict=True):
                views[f"h.{layer}.attn.attention.{name}_proj.weight"] = rows
        for name, linear in linears.items():
            # GPT-2 was published with its linear layers as [inputs, outputs].
            views[f"h.{layer}.{name}.weight"] = linear.weight.T if is_gpt2 else linear.weight
            views[f"h.{layer}.{name}.bias"] = linear.bias
        for name, norm in {"ln_1": block.attention_norm, "ln_2": block.perceptron_norm}.items():
            views[f"h.{layer}.{name}.weight"] = norm.weight
            views[f"h.{layer}.{name}.bias"] = norm.bias
    return views


def _without_prefix(stored_name: str) -> str:
    return stored_name.removeprefix("transformer.")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): download it again") from error


class _Source(NamedTuple):
    file: Path
    stored_name: str
    shape: list[int]


def _sources(files: list[Path]) -> dict[str, _Source]:
    """Weights by their names without prefix."""
    sources = {}
    for file in files:
        with _opened(file) as weights:
            for stored_name in weights.keys():  # noqa: SIM118 (not a dictionary)
                shape = weights.get_slice(stored_name).get_shape()
                sources[_without_prefix(stored_name)] = _Source(file, stored_name, list(shape))
    return sources


def _refuse(problem: str, names: set[str], path: Path) -> None:
    if names:
        some = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise UserError(
            f"{path} {problem} weights {some}: weights and config.json must be of one GPT-2 or GPT-Neo model"
        )


def _refuse_untied_head(source: _Source, embedding: Tensor) -> None:
    with _opened(source.file) as weights:
        head = weights.get_tensor(source.stored_name).to(embedding.dtype)
    if not torch.equal(head, embedding):
        raise UserError(
            f"{source.file} has a {source.stored_name} of its own, but only a head tied to wte is read: use another"
        )
