"""GPT-2 and GPT-Neo as hidden-state backbones: tokens in, hidden states out, no head.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". GPT-Neo: Black et al. 2021,
doi.org/10.5281/zenodo.5297715. Both are pre-norm decoders with learned positions; GPT-Neo alternates global and local
attention, does not scale the scores and has no bias on queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.embeddings import DenseEmbedding, TokenEmbedding
from vocabfold.errors import UserError

INITIAL_STD = 0.02
LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a backbone. Raises UserError where they do not fit together.

    ``attention`` is "gpt2" (every layer attends to the whole past) or "gpt_neo" (every second layer attends to the last
    ``window`` positions, its own included). ``dropout`` acts on embeddings, attention and both residual branches.
    """

    vocabulary_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    attention: str = "gpt2"
    window: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "hidden_size", "num_layers", "num_heads", "max_positions", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose at least 1")
        if self.attention not in ("gpt2", "gpt_neo"):
            raise UserError(f'attention "{self.attention}" is unknown: choose "gpt2" or "gpt_neo"')
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: choose at least 0 and less than 1")
        if remainder := self.hidden_size % self.num_heads:
            divisors = [heads for heads in range(1, self.hidden_size + 1) if self.hidden_size % heads == 0]
            fewer = max((heads for heads in divisors if heads < self.num_heads), default=1)
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                f"choose hidden_size {self.hidden_size - remainder + self.num_heads} or num_heads {fewer}"
            )

    def layer_window(self, layer: int) -> int | None:
        """How many positions the layer attends to, its own included; None for the whole past."""
        return self.window if self.attention == "gpt_neo" and layer % 2 == 1 else None


def causal_mask(query_length: int, key_length: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """True where the last ``query_length`` of ``key_length`` positions may look: [query_length, key_length].

    Position i sees positions max(0, i - window + 1) .. i.
    """
    key_positions = torch.arange(key_length, device=device)
    distance = key_positions[key_length - query_length :, None] - key_positions
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


class LayerCache:
    """Keys and values of one layer, in one tensor [2, B, heads, capacity, head size] that grows by doubling."""

    def __init__(self, window: int | None, max_positions: int) -> None:
        self.window = window
        self.max_positions = max_positions
        self.stored: Tensor | None = None
        self.end = 0

    def kept_positions(self, length: int) -> int:
        """How many of ``length`` past positions the next one still needs."""
        return length if self.window is None else min(length, self.window - 1)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in [B, heads, T, head size]; return the kept past and the new positions, together, for attention."""
        return self.append(keys, values)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As ``extend``, in the form that is stored, whatever a subclass makes of it."""
        batch_size, num_heads, new, head_size = keys.shape
        kept = self.kept_positions(self.end)
        if self.stored is None or self.end + new > self.stored.shape[3]:
            capacity = min(2 * (kept + new), self.max_positions)
            grown = keys.new_empty(2, batch_size, num_heads, capacity, head_size)
            if self.stored is not None:
                grown[:, :, :, :kept] = self.stored[:, :, :, self.end - kept : self.end]
            self.stored, self.end = grown, kept
        first, begin = self.end - kept, self.end
        self.end += new
        self.stored[0, :, :, begin : self.end] = keys
        self.stored[1, :, :, begin : self.end] = values
        return self.stored[0, :, :, first : self.end], self.stored[1, :, :, first : self.end]

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` in this order."""
        if self.stored is not None:
            self.stored = self.stored.index_select(1, rows)


class KeyValueCache:
    """What a model remembers of the ``length`` positions it has seen, for decoding without computing them again.

    Local layers keep what their window needs. The tensors are written in place, so use it under ``torch.no_grad()``.
    ``layer_cache`` makes the cache of one layer; inference/quantised.py has smaller ones.
    """

    def __init__(
        self,
        batch_size: int,
        windows: Sequence[int | None],
        max_positions: int,
        layer_cache: Callable[[int | None, int], LayerCache] = LayerCache,
    ) -> None:
        self.batch_size = batch_size
        self.length = 0
        self.layers = [layer_cache(window, max_positions) for window in windows]

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` [B'] in this order; one may come several times, as when a beam splits."""
        if len(rows) == self.batch_size and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            return
        self.batch_size = len(rows)
        for layer in self.layers:
            layer.select(rows)


class Attention(nn.Module):
    """softmax(scale * Q K^T + mask) V, causal, with one fused projection for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        scaled = config.attention == "gpt2"
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.scale = (config.hidden_size // config.num_heads) ** -0.5 if scaled else 1.0
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=scaled)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, is_causal: bool, cache: LayerCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch_size, length, hidden_size = hidden.shape
        query, key, value = (
            part.view(batch_size, length, self.num_heads, -1).transpose(1, 2)
            for part in self.query_key_value(hidden).split(hidden_size, dim=-1)
        )
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        return self.output(mixed.transpose(1, 2).reshape(batch_size, length, hidden_size))


class Block(nn.Module):
    """One pre-norm layer: attention, then a perceptron four times as wide, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.attention = Attention(config)
        self.perceptron_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.widen = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.narrow = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None, is_causal: bool, cache: LayerCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask, is_causal, cache))
        widened = F.gelu(self.widen(self.perceptron_norm(hidden)), approximate="tanh")
        return hidden + self.dropout(self.narrow(widened))


class GPT(nn.Module):
    """Tokens [B, T] -> hidden [B, T, D]. Heads may tie their rows to those of a dense ``token_embedding`` (V x D).

    Published weights: ``vocabfold.models.published.load_published``. On initialisation see ``reset_parameters``.
    """

    local_mask: Tensor | None

    def __init__(self, config: GPTConfig, token_embedding: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.config = config
        if token_embedding is None:
            token_embedding = DenseEmbedding(config.vocabulary_size, config.hidden_size)
        self.token_embedding = token_embedding
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.windows = [config.layer_window(layer) for layer in range(config.num_layers)]
        self.register_buffer("local_mask", None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise in place from torch's global generator; call it again after ``to_empty``.

        Weights are normal with std 0.02, biases 0, layer norms 1. The "gpt2" backbone divides the std of the two
        projections into the residual stream by sqrt(2 * num_layers); "gpt_neo" does not: both as in transformers.
        """
        for module in self.modules():
            if isinstance(module, TokenEmbedding):
                module.draw(INITIAL_STD)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.config.attention == "gpt2":
            for module in self.modules():
                if isinstance(module, Block):
                    for projection in (module.attention.output, module.narrow):
                        projection.weight.normal_(std=INITIAL_STD / math.sqrt(2 * self.config.num_layers))
        if any(window is not None and window < self.config.max_positions for window in self.windows):
            positions = self.config.max_positions
            # Held rather than rebuilt each step: every shorter sequence uses its upper left corner.
            self.local_mask = causal_mask(positions, positions, self.config.window, self.final_norm.weight.device)

    def new_cache(
        self, batch_size: int, layer_cache: Callable[[int | None, int], LayerCache] = LayerCache
    ) -> KeyValueCache:
        """An empty cache for ``batch_size`` sequences that grow together, up to max_positions."""
        return KeyValueCache(batch_size, self.windows, self.config.max_positions, layer_cache)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states after the final layer norm: [B, T] -> [B, T, D].

        With a cache the tokens continue those it holds, and it takes them in. Raises UserError when the positions run
        out or the cache has another batch size; a token outside the vocabulary raises embedding's own error.
        """
        batch_size, length = tokens.shape
        past = 0 if cache is None else cache.length
        if past + length > self.config.max_positions:
            raise UserError(
                f"{past + length} positions do not fit a model with max_positions {self.config.max_positions}: "
                "shorten the sequence or train with a larger max_positions"
            )
        if cache is not None and cache.batch_size != batch_size:
            raise UserError(
                f"a batch of {batch_size} does not continue a cache of {cache.batch_size}: call new_cache({batch_size})"
            )
        hidden = self.token_embedding(tokens) + self.position_embedding.weight[past : past + length]
        hidden = self.dropout(hidden)
        masks = {window: self._mask(length, past, window, tokens.device) for window in set(self.windows)}
        for layer, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            mask = masks[window]
            # Without a past the kernel's own causal rule applies; a single new token sees every key it is given.
            is_causal = mask is None and past == 0
            hidden = block(hidden, mask, is_causal, None if cache is None else cache.layers[layer])
        if cache is not None:
            cache.length += length
        return self.final_norm(hidden)

    def _mask(self, length: int, past: int, window: int | None, device: torch.device) -> Tensor | None:
        """The mask [T, keys] of the layers with this window, or None where attention needs none to be built."""
        if past == 0:
            if window is None or length <= window:
                return None
            assert self.local_mask is not None
            return self.local_mask[:length, :length]
        if length == 1:
            return None
        kept = past if window is None else min(past, window - 1)
        return causal_mask(length, kept + length, window, device)
