"""Finished models: reading them from a folder or a GGUF file, and what of them can be screened."""

from __future__ import annotations

import importlib.util
import inspect
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.hugging_face.screened_head import ScreenedHead

GGUF_MAGIC = b"GGUF"
PROBE_LENGTH = 4
PROBE_TOLERANCE = 2.0**-6  # of the largest logit: more than any rounding, less than a scaled or capped logit differs


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or GGUF file that transformers reads; nothing is downloaded.

    A folder without ``config.json`` must hold one GGUF file. Raises UserError for what is not a causal language model,
    and where a package is missing.
    """
    path = Path(path)
    need("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder, gguf = find_model(path)
    where: dict[str, Any] = {"local_files_only": True}
    if gguf is not None:
        need("gguf")
        need("accelerate")
        where["gguf_file"] = gguf.name
    try:
        config = AutoConfig.from_pretrained(folder, **where)
        architectures = config.architectures or []
        if config.is_encoder_decoder or (
            architectures and not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        ):
            kind = ", ".join(architectures) or config.model_type
            raise UserError(f"{path} holds {kind}: only causal language models can be decoded")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of conversions that say nothing about the result
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    except (OSError, ValueError, KeyError, IndexError, ImportError, RuntimeError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot read {path}: {reason or type(error).__name__}") from None
    return model.eval(), tokenizer


def need(package: str) -> None:
    """Raise UserError if ``package`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is missing: pip install 'vocabfold[hf]'")


def find_model(path: Path) -> tuple[Path, Path | None]:
    """(folder, its GGUF file or None). Raises UserError where there is no model, or more than one GGUF file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise UserError(f"{path} is not a GGUF file: give a folder of a model or a GGUF file")
        return path.parent, path
    if not path.is_dir():
        raise UserError(f"there is no {path}: python -m vocabfold.hugging_face.fetch brings a small model")
    if (path / "config.json").is_file():
        return path, None
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise UserError(f"{path} holds no config.json and {len(found)} GGUF files: name the file")
    return find_model(found[0])


def backbone(model: Any, with_adapters: bool = False) -> nn.Module:
    """The part of a causal language model below its output layer; ``with_adapters``: also where PEFT put some into it.

    Raises UserError for other models.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UserError(f"{name} is not a model of transformers")
    if hasattr(model, "peft_config") and not with_adapters:
        raise UserError(f"{name} wraps a model with adapters: fold before adapting, or merge_and_unload() them first")
    model = without_wrapper(model)
    if config.is_encoder_decoder:
        raise UserError(f"{name} has an encoder: only decoders without one work here")
    if not model.can_generate():
        raise UserError(f"{name} is no causal language model: load it with AutoModelForCausalLM")
    if getattr(config, "model_type", "") in ENCODERS and not getattr(config, "is_decoder", False):
        raise UserError(f"{name} is an encoder: it reads both ways and cannot be decoded")
    base = model.base_model
    accepted = inspect.signature(base.forward).parameters
    if base is model or not {"past_key_values", "input_ids"} <= set(accepted):
        raise UserError(f"{name} has no decoder with a key/value cache of transformers' usual form")
    return base


def without_wrapper(model: Any) -> Any:
    """The model of transformers that PEFT wraps, its adapters in it; any other as it is.

    Raises UserError for adapters that do more than change the layers below: what they do is in the wrapper.
    """
    for adapter in getattr(model, "peft_config", {}).values():
        kind = str(getattr(adapter, "peft_type", "")).rpartition(".")[2]
        if adapter.is_prompt_learning or kind in WRAPPED or getattr(adapter, "alora_invocation_tokens", None):
            raise UserError(f"{type(model).__name__} has adapters ({kind}) that work by PEFT's own forward alone")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


WRAPPED = ("POLY", "XLORA", "SHADOW")
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "megatron-bert", "rembert")


def output_layer(model: Any, use: str) -> nn.Linear:
    """The model's own output layer, a plain one. ``use``: what it is for, a verb. Raises UserError for any other."""
    name = type(model).__name__
    layer = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"{name} has no output layer (lm_head): there is nothing to {use}")
    if model.config.model_type == "vocabfold_folded":
        raise UserError(f"{name} is folded: its model.head is what decodes it, and unfold gives the output layer back")
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        raise UserError(f"{name} has an adapter on its output layer: merge_and_unload() it first")
    # Not model.is_quantized: it is true of GGUF files too, whose rows transformers has turned into floats.
    if type(layer) is not nn.Linear or not isinstance(layer.weight, nn.Parameter):
        raise UserError(f"{name} has a quantised output layer, or one of its own kind: load it in float32 or bfloat16")
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or type(layer.weight) is not nn.Parameter or layer.weight.is_meta:  # a DTensor is a subclass
        raise UserError(f"{name} is spread over devices: load it whole, without a device map or tensor parallelism")
    return layer


def softcap_of(model: Any) -> float | None:
    """What the model bounds its logits with: cap * tanh(logit / cap); None where it does not."""
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def output_rows(model: Any) -> Tensor:
    """The rows [V, D] of the model's output layer. Raises UserError where they cannot be screened."""
    name = type(model).__name__
    layer = output_layer(model, "screen")
    if layer.bias is not None:
        raise UserError(f"{name} has an output layer with a bias, which the screen does not bound")
    if softcap_of(model) is not None:
        raise UserError(f"{name} caps its logits (final_logit_softcapping), which the screen does not bound")
    return layer.weight


@torch.no_grad()
def check_logits(model: Any, base: Any, logits_of: Callable[[Tensor], Tensor]) -> None:
    """Raise UserError unless, on a few tokens, the model's logits are ``logits_of`` its last hidden states."""
    was_training = model.training
    model.eval()
    device, last = next(model.parameters()).device, model.config.get_text_config().vocab_size - 1
    try:
        ids = torch.arange(PROBE_LENGTH, device=device).clamp(max=last).unsqueeze(0)
        logits = model(input_ids=ids, use_cache=False).logits
        expected = logits_of(base(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        model.train(was_training)
    if logits.shape != expected.shape or bool((logits - expected).abs().max() > PROBE_TOLERANCE * expected.abs().max()):
        raise UserError(
            f"{type(model).__name__} does more between its hidden states and logits than a product with rows"
        )


@torch.no_grad()
def screen(model: Any) -> ScreenedHead:
    """The model's own output layer behind bounds from int8 rows: exact, and a fraction of the bytes.

    The model stays as it is; the int8 copy takes V * D bytes beside it. Checks on a few tokens that the model's logits
    are its last hidden states times these rows. Raises UserError, one line, for a model that is not a causal language
    model on a CPU in float32 or bfloat16 with a plain output layer.
    """
    base = backbone(model, with_adapters=True)
    rows = output_rows(model)
    head = ScreenedHead(rows)
    check_logits(model, base, lambda hidden: F.linear(hidden, rows))
    return head
