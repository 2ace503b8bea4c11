"""transformers' models with transformers' own caches, read as ours are: ``pip install 'vocabfold[hf]'``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, QuantizedCache, StaticCache
from transformers.utils import is_optimum_quanto_available

from vocabfold.errors import UserError
from vocabfold.models.gpt import GPTConfig

CACHES = ("none", "dynamic", "static", "fp8", "int4")
INT4_CHANNELS = 32  # that share a corpus, as in our own int4 cache


def random_gpt2(config: GPTConfig) -> GPT2LMHeadModel:
    """GPT-2 of the sizes of ``config`` with fresh weights from torch's global generator and a tied full softmax."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary_size,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=config.max_positions,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def available_caches() -> tuple[str, ...]:
    """Those of CACHES that can be used here: int4 needs ``vocabfold[quanto]`` and a C++ compiler."""
    return CACHES if is_optimum_quanto_available() else CACHES[:-1]


def new_cache(model: PreTrainedModel, kind: str) -> Cache | None:
    """An empty cache of one of CACHES, None for "none". Raises UserError for another kind or a missing package."""
    if kind not in CACHES:
        raise UserError(f"transformers' cache is {kind!r}: choose one of {', '.join(CACHES)}")
    if kind == "int4" and not is_optimum_quanto_available():
        raise UserError("transformers' int4 cache needs optimum-quanto: pip install 'vocabfold[quanto]'")
    caches: dict[str, Any] = {
        "none": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=model.config.n_positions),
        "fp8": lambda: QuantizedCache("fp8", model.config),
        "int4": lambda: QuantizedCache("quanto", model.config, nbits=4, q_group_size=INT4_CHANNELS),
    }
    cache: Cache | None = caches[kind]()
    return cache


class HuggingFaceReader:
    """The logits at the end of one growing text that fits the model's positions.

    ``beginning``: tokens that texts begin with and a dynamic cache that has read them; it is copied, as transformers
    documents the reuse of a prompt.
    """

    def __init__(
        self, model: PreTrainedModel, kind: str = "dynamic", beginning: tuple[Sequence[int], Cache] | None = None
    ) -> None:
        self.model = model
        self.cache = new_cache(model, kind)
        self.beginning = beginning
        self.length = 0

    @torch.inference_mode()
    def read(self, text: Sequence[int]) -> Tensor:
        """The logits [1, V] after ``text``, which continues the text of the call before."""
        if self.length == 0 and self.beginning is not None and self._begins(text):
            self.cache = copy.deepcopy(self.beginning[1])
            self.length = len(self.beginning[0])
        fresh = text if self.cache is None else text[self.length :]
        self.length = len(text)
        tokens = torch.tensor([fresh], device=self.model.device)
        cached = self.cache is not None
        return self.model(tokens, past_key_values=self.cache, use_cache=cached, logits_to_keep=1).logits[:, -1]

    def _begins(self, text: Sequence[int]) -> bool:
        assert self.beginning is not None
        tokens = self.beginning[0]
        return len(tokens) < len(text) and list(text[: len(tokens)]) == list(tokens)
