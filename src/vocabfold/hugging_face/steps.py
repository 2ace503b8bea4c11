"""A decoder's step for one new token of each text: transformers' own arithmetic, without its work around it.

A step of a small model is hundreds of tiny operations started from Python, and products with weights that torch reads
at less than half of the memory's speed. Here the same numbers come from fewer operations (rotations are tables, keys
and values are written in place, a norm is one call) and from ``products``. Every product and sum stays what it was, in
the same order and rounded at the same places, so the hidden states are **the same bits**. That is not taken on trust:
``NextStates`` computes the first step of each kind both ways and leaves it to transformers where one bit differs.

Known are the decoders of Llama (SmolLM2 too), Mistral, Qwen 2 and 3, and Gemma 3, as transformers builds them, with its
default attention. Others, those with hooks or adapters, and rotations that change with the text's length are left to
transformers.

Legend: B texts, D columns, H heads of C columns each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.hugging_face.products import same_product

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Gemma3TextModel")
ROUNDED_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
FIXED_ROTATIONS = ("default", "linear", "llama3")
LARGEST_SHARED_HEAD = 256  # up to here transformers lets attention itself share keys between heads
Function = Callable[[Tensor], Tensor]


def is_known(base: Any) -> bool:
    """Whether ``Decoder`` knows this model; whether it is right is left to the bits of a first step."""
    if type(base).__name__ not in MODELS or not type(base).__module__.startswith("transformers.models."):
        return False
    config = base.config
    rotation = config.rope_parameters or {}
    kinds = [each for each in rotation.values() if isinstance(each, dict)] or [rotation]
    if any(each.get("rope_type", "default") not in FIXED_ROTATIONS for each in kinds):
        return False
    if config._attn_implementation != "sdpa" or getattr(config, "use_bidirectional_attention", None):
        return False
    if base.training or base.embed_tokens.weight.device.type != "cpu":
        return False
    for module in base.modules():
        # Libraries that offload, quantise or adapt put hooks, a forward or a class of their own in the way.
        if type(module).__module__.startswith("peft."):
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if any(name.endswith("_proj") and type(child) is not nn.Linear for name, child in module.named_children()):
            return False
    return True


def _norm(module: Any) -> Function:
    """The module's function of [..., C]: torch's own norm does the same in the same order."""
    weight, shape = module.weight, module.weight.shape
    if type(module).__name__ not in ROUNDED_NORMS:  # Gemma's
        added, epsilon = 1.0 + weight.float(), module.eps
        return lambda inputs: F.rms_norm(inputs.float(), shape, added, epsilon).type_as(inputs)
    epsilon = module.variance_epsilon
    if weight.dtype == torch.float32:
        return lambda inputs: F.rms_norm(inputs, shape, weight, epsilon)
    # Rounded to the model's type before the weights, as transformers does.
    return lambda inputs: weight * F.rms_norm(inputs, shape, None, epsilon)


def _same(inputs: Tensor) -> Tensor:
    return inputs


def _linear(module: nn.Linear) -> Function:
    return same_product(module.weight, module.bias)


class Layer:
    """The functions of one layer ``module`` of the decoder."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        is_gemma = hasattr(module, "pre_feedforward_layernorm")
        has_norms = hasattr(attention, "q_norm")
        after_attention = _norm(module.post_attention_layernorm)
        self.before_attention = _norm(module.input_layernorm)
        self.query, self.key, self.value = map(_linear, (attention.q_proj, attention.k_proj, attention.v_proj))
        self.query_norm = _norm(attention.q_norm) if has_norms else _same
        self.key_norm = _norm(attention.k_norm) if has_norms else _same
        self.attention_output = _linear(attention.o_proj)
        self.after_attention = after_attention if is_gemma else _same
        self.before_mlp = _norm(module.pre_feedforward_layernorm) if is_gemma else after_attention
        self.gate, self.up, self.down = map(_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.activation = mlp.act_fn
        self.after_mlp = _norm(module.post_feedforward_layernorm) if is_gemma else _same
        self.scaling: float = attention.scaling
        self.rotation: str | None = attention.layer_type if is_gemma else None


@dataclass
class Kept:
    """Keys and values of one layer, [B, H, longest text, C]; ``window``: how many of the last are looked at."""

    keys: Tensor
    values: Tensor
    window: int | None


class Decoder:
    """The functions of a decoder that ``is_known``, and which kinds of steps gave transformers' bits.

    In bfloat16 it holds a packed copy of the layers' weights.
    """

    def __init__(self, base: Any) -> None:
        self.embed, self.norm = base.embed_tokens, _norm(base.norm)
        self.rotary, self.example = base.rotary_emb, base.norm.weight
        self.layers = [Layer(module) for module in base.layers[: base.config.num_hidden_layers]]
        self.versions = _versions(base)
        self.has_same_bits: dict[tuple[object, ...], bool] = {}


def _versions(base: Any) -> list[tuple[object, ...]]:
    return [(each.data_ptr(), each.dtype, 0 if each.is_inference() else each._version) for each in base.parameters()]


_decoders: WeakKeyDictionary[Any, Decoder] = WeakKeyDictionary()


def decoder_of(base: Any) -> Decoder | None:
    """The decoder of a model, built once for as long as the model and its weights stay; None if it is not known."""
    if not is_known(base):
        return None
    known = _decoders.get(base)
    if known is None or known.versions != _versions(base):
        known = _decoders[base] = Decoder(base)
    return known


class Steps:
    """Texts of ``length`` tokens, which ``decoder``'s model has read into its ``cache``, continued token by token.

    ``mask`` [B, length], or None: 0 where a text is padded. There is room for ``num_tokens`` more.
    """

    def __init__(self, decoder: Decoder, cache: Any, mask: Tensor | None, length: int, num_tokens: int) -> None:
        self.decoder, self.first, self.position = decoder, length, length
        self.kept = []
        for layer in cache.layers:
            batch, heads, kept, size = layer.keys.shape
            keys, values = (layer.keys.new_empty(batch, heads, length + num_tokens, size) for _ in range(2))
            keys[:, :, length - kept : length] = layer.keys
            values[:, :, length - kept : length] = layer.values
            self.kept.append(Kept(keys, values, getattr(layer, "sliding_window", None)))
        self.is_padded = mask is not None
        mask = torch.ones(1, length) if mask is None else mask
        self.mask = F.pad(mask.bool(), (0, num_tokens), value=True)[:, None, None]
        # The place of each text's next token: its padding does not count.
        first = mask.long().sum(dim=-1)
        positions = first.unsqueeze(-1) + torch.arange(num_tokens)
        self.rotations = {}
        for kind in {layer.rotation for layer in decoder.layers}:
            cosine, sine = decoder.rotary(decoder.example, positions, *([] if kind is None else [kind]))
            # transformers turns (x1, x2) into cat(-x2, x1) * sine; the sign may as well be the sine's.
            low, high = sine.chunk(2, dim=-1)
            self.rotations[kind] = (cosine.unsqueeze(1), torch.cat([-low, high], dim=-1).unsqueeze(1))

    def __call__(self, tokens: Tensor) -> Tensor:
        """``tokens`` [B, 1] -> the hidden states [B, D] after them."""
        hidden: Tensor = self.decoder.embed(tokens.squeeze(-1))
        place = self.position - self.first
        rotations = {kind: (cosine[:, :, place], sine[:, :, place]) for kind, (cosine, sine) in self.rotations.items()}
        for layer, kept in zip(self.decoder.layers, self.kept, strict=True):
            attended = self._attention(layer, kept, layer.before_attention(hidden), *rotations[layer.rotation])
            hidden = hidden + layer.after_attention(attended)
            inputs = layer.before_mlp(hidden)
            inner = layer.activation(layer.gate(inputs)) * layer.up(inputs)
            hidden = hidden + layer.after_mlp(layer.down(inner))
        self.position += 1
        return self.decoder.norm(hidden)

    def _attention(self, layer: Layer, kept: Kept, inputs: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, key_heads, _, size = kept.keys.shape
        query = layer.query_norm(layer.query(inputs).view(batch, -1, size))
        key = layer.key_norm(layer.key(inputs).view(batch, -1, size))
        both = torch.cat([query, key], dim=1)
        both = both * cosine + both.roll(size // 2, -1) * sine
        heads = both.shape[1] - key_heads
        kept.keys[:, :, self.position] = both[:, heads:]
        kept.values[:, :, self.position] = layer.value(inputs).view(batch, -1, size)
        first = 0 if kept.window is None else max(0, self.position + 1 - kept.window)
        keys, values = (each[:, :, first : self.position + 1] for each in (kept.keys, kept.values))
        query = both[:, :heads]
        # With a mask torch attends by other instructions: transformers has one for padding and for full windows.
        has_mask = self.is_padded or keys.shape[2] == kept.window
        if not has_mask and size <= LARGEST_SHARED_HEAD:
            attended = F.scaled_dot_product_attention(
                query.unsqueeze(2), keys, values, scale=layer.scaling, enable_gqa=heads != key_heads
            )
        else:
            query = query.reshape(batch, key_heads, -1, size)
            mask = self.mask[..., first : self.position + 1] if has_mask else None
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=layer.scaling)
        return layer.attention_output(attended.reshape(batch, -1))


def read_prompt(base: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
    """``ids`` [B, L], ``mask`` [B, L] or None -> (the last hidden states [B, D], transformers' key/value cache)."""
    output = base(input_ids=ids, use_cache=True, **_where(mask, ids.shape[1]))
    return output.last_hidden_state[:, -1], output.past_key_values


def _where(mask: Tensor | None, num_tokens: int) -> dict[str, Tensor]:
    """What tells ``base`` the places of the last ``num_tokens`` tokens of padded texts."""
    if mask is None:
        return {}
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, -num_tokens:]}


class NextStates:
    """Hidden states after a prompt that ``base`` has read into ``cache``, token by token: transformers' own bits.

    ``with_own_steps`` False: by transformers' steps only. The rest as in ``Steps``.
    """

    def __init__(
        self, base: Any, cache: Any, mask: Tensor | None, length: int, num_tokens: int, with_own_steps: bool = True
    ) -> None:
        self.base, self.cache, self.mask = base, cache, mask
        self.decoder = decoder_of(base) if with_own_steps else None
        self.steps: Steps | None = None
        if self.decoder is not None:
            batch = cache.layers[0].keys.shape[0]
            self.kind = (batch, mask is None, torch.get_num_threads())
            if self.decoder.has_same_bits.get(self.kind, True):
                self.steps = Steps(self.decoder, cache, mask, length, num_tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """``tokens`` [B, 1] -> the hidden states [B, D] after them."""
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        if self.steps is None or self.decoder is None:
            return self._of_transformers(tokens)
        hidden = self.steps(tokens)
        if self.kind not in self.decoder.has_same_bits:
            expected = self._of_transformers(tokens)
            self.decoder.has_same_bits[self.kind] = torch.equal(hidden, expected)
            if not self.decoder.has_same_bits[self.kind]:
                self.steps = None
                return expected
        return hidden

    def _of_transformers(self, tokens: Tensor) -> Tensor:
        output = self.base(input_ids=tokens, past_key_values=self.cache, use_cache=True, **_where(self.mask, 1))
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden
