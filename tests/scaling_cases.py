"""Tables of heads_scaling whose slopes and crossings are known, for the tests."""

from __future__ import annotations

import math
from typing import Any

from figure_cases import run_row

V = 50_257
FULL_LOSS = 6.0
CLUSTERED = {"partition_order": "clustered", "num_groups": 225, "shortlist": 0}


def scaling_row(head: str, training_tokens: float, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """A run of hidden 64 over ``training_tokens`` tokens; one with groups tells the losses of both steps."""
    folded = not head.startswith("full")
    row = run_row("gpt2", head, 225 if folded else None, seed)
    row |= {"corpus": "text", "experiment": "heads_scaling", "vocabulary_size": V, "learning_rate": 3e-3}
    row |= {"training_tokens": training_tokens, "epochs": 1.0, "tokens": training_tokens, "validation_loss_nats": loss}
    row |= {"flops_per_token": 2e6 if folded else 2e7, "scorer": "linear_sorted" if folded else None}
    row |= {"perplexity": math.exp(loss), "run": f"{head}-{training_tokens}-{seed}-{sorted(changes.items())}"}
    if folded:
        row |= {"validation_group_loss": 0.6 * loss, "validation_token_loss": 0.4 * loss, "group_accuracy": 0.3}
        row |= CLUSTERED
    return row | changes


def rows_with_slope(slope: float, at_one_million: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """A full softmax and a folded head whose gap is ``at_one_million`` nats at 1 M tokens and changes by ``slope`` for
    twice as many; at 0.5, 1, 2 and 4 M, three seeds up to 2 M and one beyond. ``noise``: times -1, 0 and 1 by seed."""
    rows = []
    for tokens, seeds in ((0.5e6, 3), (1e6, 3), (2e6, 3), (4e6, 1)):
        for seed in range(seeds):
            full = FULL_LOSS - 0.3 * math.log2(tokens / 1e6) + 0.01 * seed
            gap = at_one_million + slope * math.log2(tokens / 1e6) + noise * (seed - 1) * (seeds > 1)
            rows.append(scaling_row("full_untied_counts", tokens, seed, full))
            rows.append(scaling_row("full_counts", tokens, seed, full + 0.2))
            rows.append(scaling_row("linear_clustered_counts", tokens, seed, full + gap))
    return rows


def cost_rows(hidden_size: int = 64) -> list[dict[str, Any]]:
    """The full softmax takes eight times as long as a folded head, which needs 1.05 times the memory of no head."""
    methods = {"no_head": (0.09, 0.2), "full_untied_counts": (0.8, 1.2), "linear_clustered_counts": (0.1, 0.21)}
    return [
        {"method": method, "round": number, "seconds": seconds, "tokens": 2048, "hidden_size": hidden_size}
        | {"peak_memory_gib": memory, "flops_per_token": 1e6, "run": "x"}
        for method, (seconds, memory) in methods.items()
        for number in range(2)
    ]
