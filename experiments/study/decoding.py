"""Decoding with a key/value cache, whatever chooses the tokens: what the experiments time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vocabfold.models.build import ModelWithHead

Chooser = Callable[[Tensor, torch.Generator], Tensor]  # hidden [B, D] -> tokens [B]


@torch.inference_mode()
def decode(model: ModelWithHead, prompts: Tensor, new_tokens: int, choose: Chooser) -> Tensor:
    """``prompts`` [B, T] -> the ``new_tokens`` tokens after each [B, new tokens], every time the same."""
    generator = torch.Generator(prompts.device).manual_seed(0)
    cache = model.gpt.new_cache(len(prompts))
    text = [prompts]
    for _ in range(new_tokens):
        hidden = model.gpt(text[-1], cache)[:, -1]
        text.append(choose(hidden, generator).unsqueeze(-1))
    return torch.cat(text[1:], dim=-1)
