"""Layers of our key/value caches, as transformers asks for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from vocabfold.models.gpt import KeyValueCache, LayerCache


class KeptLayer(CacheLayerMixin):
    """One layer of our cache, as transformers asks for it."""

    is_sliding = False

    def __init__(self, layer: LayerCache) -> None:
        super().__init__()
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: our layers take memory when something comes in."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in [B, heads, T, head size]; return all positions."""
        return self.layer.extend(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys there will be, the position of the first)."""
        return self.layer.end + query_length, 0

    def get_seq_length(self) -> int:
        """Positions that are kept."""
        return self.layer.end

    def get_max_length(self) -> int:
        """See CacheLayerMixin: no limit of its own."""
        return -1


def cache_of(cache: KeyValueCache) -> Cache:
    """transformers' view of ``cache``; what it takes in lies there."""
    return Cache(layers=[KeptLayer(layer) for layer in cache.layers])
