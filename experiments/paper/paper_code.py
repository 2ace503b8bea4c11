"""The models of arXiv 2411.06371's Tables 2 and 3 as the paper's own code has them, for measuring what they cost.

GPT-2 and GPT-Neo are Hugging Face's modules with their own loss; "ours" is not GPT-2 there but a stack of post-norm
encoder layers with sinusoidal positions. Needs ``pip install 'vocabfold[hf]'``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads import HeadSettings, build_head

DROPOUT = 0.1


@dataclass(frozen=True)
class PaperSizes:
    """Sizes of a model. Published, besides four hidden sizes: 50,257 tokens and one for padding, 8 layers, 8 heads, 512
    positions."""

    hidden_size: int
    vocabulary_size: int = 50_258
    num_layers: int = 8
    num_heads: int = 8
    max_positions: int = 512


class HuggingFaceModel(nn.Module):
    """Tokens [B, T] -> the mean loss of predicting each next one, by the library's own code.

    ``kind`` is "gpt2" or "gpt_neo". ``fused`` (GPT-2 only, which has it): attention through torch's fused kernel and
    without dropout, since a GPU's fused kernels keep no T x T tensor for it; else scores, weights and dropout masks are
    kept. Raises UserError where transformers is missing.
    """

    mask: Tensor

    def __init__(self, kind: str, sizes: PaperSizes, fused: bool) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise UserError("Hugging Face's models need transformers: pip install 'vocabfold[hf]'") from error
        common: dict[str, Any] = {
            "vocab_size": sizes.vocabulary_size,
            "use_cache": False,
            "attn_implementation": "sdpa" if fused else "eager",
        }
        if kind == "gpt2":
            config: Any = transformers.GPT2Config(
                n_positions=sizes.max_positions,
                n_embd=sizes.hidden_size,
                n_layer=sizes.num_layers,
                n_head=sizes.num_heads,
                attn_pdrop=0.0 if fused else DROPOUT,
                **common,
            )
            self.model: nn.Module = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.GPTNeoConfig(
                max_position_embeddings=sizes.max_positions,
                hidden_size=sizes.hidden_size,
                num_layers=sizes.num_layers,
                num_heads=sizes.num_heads,
                attention_types=[[["global", "local"], sizes.num_layers // 2]],
                **common,
            )
            self.model = transformers.GPTNeoForCausalLM(config)
        # Given whole, since the library's mask helpers read values, which fake tensors do not have.
        future = torch.ones(sizes.max_positions, sizes.max_positions, dtype=torch.bool).triu(1)
        least = torch.finfo(torch.float32).min
        self.register_buffer("mask", torch.zeros(future.shape).masked_fill(future, least)[None, None])

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> scalar."""
        length = tokens.shape[1]
        # Held, as by the usual loop `output = model(...); output.loss.backward()`: its logits outlive the forward pass.
        self.output = self.model(tokens, attention_mask=self.mask[:, :, :length, :length], labels=tokens)
        loss: Tensor = self.output.loss
        return loss


class PostNormGrouped(nn.Module):
    """Tokens [B, T] -> the mean loss of predicting each next one, by post-norm encoder layers and the grouped head.

    ``fused`` as in HuggingFaceModel.
    """

    positions: Tensor
    future: Tensor

    def __init__(self, sizes: PaperSizes, fused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary_size, sizes.hidden_size)
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                sizes.hidden_size, sizes.num_heads, 4 * sizes.hidden_size, DROPOUT, batch_first=True, norm_first=False
            )
            for _ in range(sizes.num_layers)
        )
        if fused:
            for module in self.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = 0.0
        settings = HeadSettings("paper", "folded", tied=False)
        self.head = build_head(settings, sizes.vocabulary_size, self.embedding)
        self.register_buffer("positions", sinusoidal_positions(sizes.max_positions, sizes.hidden_size))
        future = torch.ones(sizes.max_positions, sizes.max_positions, dtype=torch.bool).triu(1)
        self.register_buffer("future", future)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> scalar."""
        length = tokens.shape[1]
        hidden = self.dropout(self.embedding(tokens) + self.positions[:length])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.future[:length, :length], is_causal=True)
        loss: Tensor = self.head(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).loss
        return loss


def sinusoidal_positions(max_positions: int, hidden_size: int) -> Tensor:
    """Sines and cosines of geometrically falling frequencies (arXiv 1706.03762): [max_positions, D]."""
    position = torch.arange(max_positions)[:, None]
    frequency = torch.exp(torch.arange(0, hidden_size, 2) * (-math.log(10_000.0) / hidden_size))
    table = torch.zeros(max_positions, hidden_size)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table
