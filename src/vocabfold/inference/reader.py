"""Reading a growing text with the caches that are switched on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.inference.prefixes import PrefixCache
from vocabfold.inference.quantised import LAYER_CACHES
from vocabfold.models.gpt import GPT, KeyValueCache

NO_CACHE = "none"
KEY_VALUE_CACHES = (NO_CACHE, *LAYER_CACHES)


class Reader:
    """The hidden state at the end of one growing text.

    ``key_values``: "none" computes the whole text again for each token; "exact" caches keys and values; "bf16",
    "int8" and "int4" cache them rounded. ``prefixes`` gives the beginning of the text if it was read before; every
    reader that shares it has the same model and ``key_values``. Raises UserError for another ``key_values``, or for
    prefixes without a cache to put them into.
    """

    def __init__(self, backbone: GPT, key_values: str = "exact", prefixes: PrefixCache | None = None) -> None:
        if key_values not in KEY_VALUE_CACHES:
            raise UserError(f"key_values is {key_values!r}: choose one of {', '.join(KEY_VALUE_CACHES)}")
        if prefixes is not None and key_values == NO_CACHE:
            raise UserError(
                "a prefix cache needs a key/value cache to read into: choose key_values exact, or no prefixes"
            )
        self.backbone = backbone
        self.key_values = key_values
        self.prefixes = prefixes
        self.begin: int | None = None  # where in the text the model's positions start
        self.cache: KeyValueCache | None = None
        self.device = next(backbone.parameters()).device

    def read(self, text: Sequence[int]) -> Tensor:
        """The hidden state [1, D] after ``text``, which continues the text of the call before.

        Of a first text that is longer than the model's positions only the end is read. Where no position is left later,
        the later half of the text is read in again and the earlier half is forgotten. Raises UserError for an empty
        text.
        """
        if not text:
            raise UserError("the prompt is empty: give at least one token")
        positions = self.backbone.config.max_positions
        if self.begin is None:
            self.begin = max(0, len(text) - positions)
        elif len(text) - self.begin > positions:
            self.begin, self.cache = len(text) - max(1, positions // 2), None
        shown = list(text[self.begin :])
        if self.key_values == NO_CACHE:
            return self.backbone(torch.tensor([shown], device=self.device))[:, -1]
        if self.cache is not None:
            return self._forward(shown[self.cache.length :], self.cache)
        self.cache = self.backbone.new_cache(1, LAYER_CACHES[self.key_values])
        if self.prefixes is None:
            return self._forward(shown, self.cache)
        hidden = self._forward(shown[self.prefixes.restore([shown], self.cache) :], self.cache)
        self.prefixes.store([shown], self.cache)
        return hidden

    def _forward(self, tokens: Sequence[int], cache: KeyValueCache) -> Tensor:
        return self.backbone(torch.tensor([tokens], device=self.device), cache)[:, -1]
