"""What rounded keys and values cost in likelihood."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.inference.quantised import LAYER_CACHES
from vocabfold.models.build import ModelWithHead
from vocabfold.tokens import IGNORE_INDEX


@torch.inference_mode()
def losses_through_cache(
    model: ModelWithHead, batches: Iterable[tuple[Tensor, Tensor]], key_values: str, chunk: int
) -> tuple[Tensor, Tensor]:
    """Summed negative log likelihood in nats [rows], and how many targets counted [rows], of every row of ``batches``.

    Rows are read ``chunk`` tokens at a time through a cache of ``key_values`` (a key of LAYER_CACHES), so that each
    target is predicted from keys and values that came out of the cache. ``batches``: inputs and targets [B, T].
    """
    if key_values not in LAYER_CACHES or chunk < 1:
        raise UserError(f"key_values {key_values!r}, chunk {chunk}: choose {', '.join(LAYER_CACHES)} and at least 1")
    sums, counts = [], []
    for inputs, targets in batches:
        cache = model.gpt.new_cache(len(inputs), LAYER_CACHES[key_values])
        total = torch.zeros(len(inputs), dtype=torch.float64)
        for piece, wanted in zip(inputs.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True):
            hidden = model.gpt(piece, cache)
            log_prob = model.head.target_log_prob(hidden.flatten(0, 1), wanted.flatten())
            total -= log_prob.view(wanted.shape).double().sum(dim=1).cpu()
        sums.append(total)
        counts.append((targets != IGNORE_INDEX).sum(dim=1).cpu())
    return torch.cat(sums), torch.cat(counts)
