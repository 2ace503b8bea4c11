"""A finished model of transformers as one of ours: what reads a ``ModelWithHead`` reads it too.

    model, tokenizer = load("folder or file.gguf")
    ours = pretrained(model)
    tokens = vocabfold.generate.generate(ours, prompt, 50, key_values="int8", prefixes=PrefixCache(2**28))

Keys and values lie in ``vocabfold.inference``'s own caches, so rounded ones, beginnings that are kept, whole answers
and the coder of texts work as for models that were trained here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.full import FullHead
from vocabfold.hugging_face.models import PROBE_LENGTH, PROBE_TOLERANCE, backbone, output_rows
from vocabfold.models.build import ModelWithHead
from vocabfold.models.gpt import GPT, KeyValueCache, LayerCache

MAX_POSITIONS = 1024


@dataclass(frozen=True)
class PretrainedConfig:
    """Sizes of a model; ``hidden_size`` is that of a layer's keys and ``digest`` of all its other settings."""

    vocabulary_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    digest: str


class PretrainedBackbone(nn.Module):
    """``base``, the decoder of a model below its output layer, with what inference reads of a ``GPT``.

    Every layer keeps its whole past, sliding ones too; their masks leave out what is too far away.
    """

    def __init__(self, base: Any, config: PretrainedConfig) -> None:
        super().__init__()
        self.base = base
        self.config = config

    def new_cache(
        self, batch_size: int, layer_cache: Callable[[int | None, int], LayerCache] = LayerCache
    ) -> KeyValueCache:
        """See GPT.new_cache."""
        return KeyValueCache(batch_size, [None] * self.config.num_layers, self.config.max_positions, layer_cache)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states before the output layer: [B, T] -> [B, T, D]. See GPT.forward, also for what it raises."""
        batch_size, length = tokens.shape
        past = 0 if cache is None else cache.length
        if past + length > self.config.max_positions:
            raise UserError(
                f"{past + length} positions do not fit a model with max_positions {self.config.max_positions}: "
                "shorten the sequence, or give pretrained() more max_positions"
            )
        if cache is None:
            hidden: Tensor = self.base(input_ids=tokens, use_cache=False).last_hidden_state
            return hidden
        if cache.batch_size != batch_size:
            raise UserError(
                f"a batch of {batch_size} does not continue a cache of {cache.batch_size}: call new_cache({batch_size})"
            )
        from vocabfold.hugging_face.kept_layers import cache_of  # not above: importing that needs transformers

        layers = cache_of(cache)
        hidden = self.base(input_ids=tokens, past_key_values=layers, use_cache=True).last_hidden_state
        cache.length += length
        return hidden


class PretrainedModel(ModelWithHead):
    """What ``pretrained`` makes."""

    def __init__(self, base: PretrainedBackbone, head: FullHead) -> None:
        super().__init__(cast(GPT, base), head)

    @property
    def gpt(self) -> GPT:
        """The backbone: of a GPT it has all that inference reads."""
        return self.backbone  # type: ignore[return-value]


@torch.no_grad()
def pretrained(model: Any, max_positions: int = MAX_POSITIONS) -> ModelWithHead:
    """``model`` of transformers as a ``ModelWithHead`` with a full softmax over its own rows; nothing is copied.

    ``max_positions``: of a context, at most the model's own. Raises UserError, one line, for a model that is not a
    causal language model whose logits are its hidden states times rows.
    """
    base, rows = backbone(model), output_rows(model)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = FullHead(rows.shape[1], len(rows), cast(nn.Parameter, rows))
    sizes = PretrainedConfig(
        vocabulary_size=len(rows),
        hidden_size=heads * head_size,
        num_layers=config.num_hidden_layers,
        max_positions=min(max_positions, getattr(config, "max_position_embeddings", max_positions)),
        digest=digest_of(model.config),
    )
    ours = PretrainedModel(PretrainedBackbone(base, sizes), head).eval()
    ids = torch.arange(PROBE_LENGTH).clamp(max=len(rows) - 1).unsqueeze(0)
    expected = model(input_ids=ids, use_cache=False).logits[0]
    logits = head.logits(ours.gpt(ids)[0])
    if bool((logits - expected).abs().max() > PROBE_TOLERANCE * logits.abs().max()):
        raise UserError(
            f"{type(model).__name__} does more between its hidden states and logits than a product with rows"
        )
    return ours


def digest_of(config: Any) -> str:
    """16 hex digits of all settings of a model, but for those that saving and reading it change."""
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and name not in ("architectures", "dtype", "transformers_version")
    }
    words = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:16]
