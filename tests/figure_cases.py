"""Rows of the tables that figures are drawn from, for the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd


def run_row(model: str, head: str, group_size: int | None, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "run": f"{model}-{head}-{group_size}-{seed}-{sorted(changes.items())}",
        "corpus": "stories",
        "corpus_sha256": "0",
        "corpus_documents": 100,
        "corpus_tokens": 200_000,
        "seed": seed,
        "model": model,
        "hidden_size": 64,
        "num_layers": 4,
        "head": head,
        "group_size": group_size,
        "num_groups": None if group_size is None else math.ceil(50257 / group_size),
        "learning_rate": 2e-3,
        "steps": 100,
        "tokens": 200_000,
        "validation_loss_nats": 4.0 + 0.1 * seed + 0.001 * (group_size or 0),
        "perplexity": 60.0 + seed,
        "tokens_per_second": 1000.0 + 10 * seed,
        "peak_memory_gib": 0.5 + 0.01 * seed,
        "flops_per_token": 1e7,
        "num_parameters": 4_000_000,
        "hardware": "test machine",
        "torch": "2",
        "commit": "none",
        "command": "none",
        **changes,
    }


def embedding_columns(name: str, tokens: int) -> dict[str, Any]:
    """Those of a run from scratch (200,000 tokens), of a compressed one (0) and of a recovered one."""
    return {
        "embedding": name,
        "embedding_mode_sizes": "8x8" if name == "tensor_train" else None,
        "embedding_ranks": "2" if name == "tensor_train" else None,
        "embedding_rank": None,
        "embedding_group_size": None,
        "embedding_compression": {"dense": 1.0, "int4": 7.1, "tensor_train": 3.3}[name],
        "embedding_bytes": 1_000_000,
        "recovery_tokens": None if tokens == 200_000 else tokens,
        "embedding_relative_error": None if tokens == 200_000 else 0.1,
        "model_bytes": 3_000_000,
        "scorer": "linear_sorted",
        "shortlist": 2048,
    }


def caching_tables() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What caching.py reads: a row a workload, cache and round; a row a kind of keys and values."""
    caches = {
        "vocabfold": ("none", "key/value", "prefix", "all exact", "all coded"),
        "transformers": ("none", "key/value"),
    }
    workloads = (("distinct", 32, 0, 64), ("distinct", 448, 0, 64), ("repeated", 448, 448, 64))
    keys = ["workload", "prompt_tokens", "shared_tokens", "new_tokens"]
    measured = {"kept_between_answers_mib": 1.0, "same_tokens_share": 1.0, "answer_bytes_a_token": 3.0, "threads": 1}
    size = {"prompt_tokens": 510, "new_tokens": 2, "weights_mib": 15.0, "kept_between_answers_mib": 1.0}
    yield (
        "caching_memory",
        [
            size | {"library": library, "cache": cache, "workload": "distinct", "peak_memory_mib": 20.0 + index}
            for library, names in caches.items()
            for index, cache in enumerate(names)
        ],
    )
    yield (
        "caching",
        [
            run_row("gpt2", "shortlist_frequency", 225, 0, library=library, cache=cache, round=number, **measured)
            | dict(zip(keys, workload, strict=True))
            | {"seconds": 1.0 + number + index, "seconds_to_first_token": 0.1 * (1 + number + index)}
            for workload in (*workloads, ("shared beginning", 512, 448, 1))
            for library, names in caches.items()
            for index, cache in enumerate(names)
            for number in range(2)
        ],
    )
    change = {"loss_change_nats": 0.001, "loss_change_half_width_nats": 0.0005}
    sizes = {"exact": 1024, "bf16": 512, "int8": 260}
    yield (
        "caching_perplexity",
        [
            run_row("gpt2", "shortlist_frequency", 225, 0, key_values=kind, bytes_a_position=size, **change)
            for kind, size in sizes.items()
        ],
    )


def write_documents(results: Path, shift: float = 0.0) -> None:
    """Three documents for each run of main_comparison, which add up to its loss plus ``shift``."""
    table = pd.read_csv(results / "tiny" / "main_comparison.csv")
    parts = pd.DataFrame({"document": [0, 1, 2], "tokens": [100, 300, 600], "of_mean": [0.5, 1.5, 5 / 6]})
    rows = table.drop(columns="tokens").merge(parts, how="cross")
    rows["loss_nats"] = (rows["validation_loss_nats"] + shift) * rows["tokens"] * rows["of_mean"]
    rows.drop(columns="of_mean").to_csv(results / "tiny" / "document_losses.csv", index=False)
