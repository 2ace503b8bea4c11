"""Keys and values in fewer bytes: bfloat16, int8 and int4 instead of the model's own floating point.

As in KIVI (Liu et al. 2024, arXiv 2402.02750) codes and scales belong to groups, here always of neighbouring channels
of one position, so that a position can be stored the moment it is known. Attention sees every position, the new ones
too, as it was stored: what a model computes from a quantised cache does not depend on where a text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.models.gpt import KeyValueCache, LayerCache

INT8_CHANNELS = 128  # that share a scale, at most: 2 bytes beside 128, 1.6%
INT4_CHANNELS = 32  # that share a scale and an offset, at most: 4 bytes beside 16
INT8_LARGEST, INT4_LARGEST = 127, 15
SCALE = torch.float16
LEAST_SCALE = torch.finfo(SCALE).smallest_normal  # so that a row of zeros divides by something
MOST_SCALE = torch.finfo(SCALE).max


def group_size(channels: int, most: int) -> int:
    """The largest divisor of ``channels`` that is at most ``most``."""
    return max(size for size in range(1, min(channels, most) + 1) if channels % size == 0)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What codes are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def quantise_int8(rows: Tensor) -> Tensor:
    """[..., C] -> bytes [..., C + 2 C / size]: codes round(x / scale) from -127 to 127, scale = max |x| / 127.

    An element comes back within half a scale of itself, plus 2^-11 of its group's largest magnitude.
    """
    grouped = rows.to(arithmetic(rows.dtype)).unflatten(-1, (-1, group_size(rows.shape[-1], INT8_CHANNELS)))
    scale = (grouped.abs().amax(dim=-1) / INT8_LARGEST).clamp(LEAST_SCALE, MOST_SCALE).to(SCALE)
    codes = (grouped / scale.unsqueeze(-1)).round_().clamp_(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)
    return torch.cat([codes.flatten(-2).view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def dequantise_int8(stored: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantise_int8`` up to rounding: [..., bytes] -> [..., C]."""
    codes, scale = stored[..., :channels].view(torch.int8), stored[..., channels:].view(SCALE)
    grouped = codes.to(arithmetic(dtype)).unflatten(-1, (scale.shape[-1], -1))
    return grouped.mul_(scale.unsqueeze(-1)).flatten(-2).to(dtype)


def quantise_int4(rows: Tensor) -> Tensor:
    """[..., C] -> bytes [..., C / 2 + 4 C / size]: codes round((x - low) / step) from 0 to 15, two a byte.

    low is the group's least element and step a fifteenth of its range; an element comes back within half a step of
    itself, plus 2^-10 of its group's largest magnitude.
    """
    grouped = rows.to(arithmetic(rows.dtype)).unflatten(-1, (-1, group_size(rows.shape[-1], INT4_CHANNELS)))
    low, high = grouped.amin(dim=-1).clamp(-MOST_SCALE, MOST_SCALE).to(SCALE), grouped.amax(dim=-1)
    step = ((high - low) / INT4_LARGEST).clamp(LEAST_SCALE, MOST_SCALE).to(SCALE)
    codes = ((grouped - low.unsqueeze(-1)) / step.unsqueeze(-1)).round_().clamp_(0, INT4_LARGEST)
    codes = codes.to(torch.uint8).flatten(-2)
    pairs = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return torch.cat([pairs, step.view(torch.uint8), low.view(torch.uint8)], dim=-1)


def dequantise_int4(stored: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantise_int4`` up to rounding: [..., bytes] -> [..., C]."""
    pairs, scales = stored[..., : channels // 2], stored[..., channels // 2 :].view(SCALE)
    step, low = scales.unsqueeze(-1).chunk(2, dim=-2)
    codes = torch.stack([pairs & INT4_LARGEST, pairs >> 4], dim=-1).flatten(-2)
    grouped = codes.to(arithmetic(dtype)).unflatten(-1, (step.shape[-2], -1))
    return grouped.mul_(step).add_(low).flatten(-2).to(dtype)


class HalfLayerCache(LayerCache):
    """Keys and values rounded to bfloat16: 2 bytes a channel, the usual size of a cache."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See LayerCache.extend."""
        all_keys, all_values = self.append(keys.bfloat16(), values.bfloat16())
        return all_keys.to(keys.dtype), all_values.to(keys.dtype)


class QuantisedLayerCache(LayerCache):
    """Keys and values as rows of bytes, a position's codes and then its scales: [2, B, 1, capacity, bytes]."""

    quantise: Callable[[Tensor], Tensor]
    dequantise: Callable[[Tensor, int, torch.dtype], Tensor]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See LayerCache.extend. Raises UserError unless heads x head size is a multiple of 4, so that scales are
        aligned."""
        _, num_heads, _, head_size = keys.shape
        if num_heads * head_size % 4:
            raise UserError(
                f"an int8 or int4 cache needs a hidden size that is a multiple of 4, not {num_heads * head_size}: "
                "use an exact cache"
            )
        packed = (type(self).quantise(part.transpose(1, 2).flatten(2)).unsqueeze(1) for part in (keys, values))
        unpacked = [
            type(self)
            .dequantise(part.squeeze(1), num_heads * head_size, keys.dtype)
            .unflatten(-1, (num_heads, head_size))
            .transpose(1, 2)
            for part in self.append(*packed)
        ]
        return unpacked[0], unpacked[1]


class Int8LayerCache(QuantisedLayerCache):
    """A byte a channel, a scale for up to 128 channels."""

    quantise = staticmethod(quantise_int8)
    dequantise = staticmethod(dequantise_int8)


class Int4LayerCache(QuantisedLayerCache):
    """Half a byte a channel, a scale and an offset for up to 32 channels."""

    quantise = staticmethod(quantise_int4)
    dequantise = staticmethod(dequantise_int4)


LAYER_CACHES: dict[str, type[LayerCache]] = {
    "exact": LayerCache,
    "bf16": HalfLayerCache,
    "int8": Int8LayerCache,
    "int4": Int4LayerCache,
}


def bytes_a_position(cache: KeyValueCache) -> float:
    """Bytes that the cache spends on one position of one sequence, all layers, scales included.

    Raises UserError for a cache that has read nothing.
    """
    if any(layer.stored is None for layer in cache.layers):
        raise UserError("an empty cache has no size: let a model read something into it first")
    stored = [layer.stored for layer in cache.layers if layer.stored is not None]
    return sum(tensor.nbytes / (tensor.shape[1] * tensor.shape[3]) for tensor in stored)
