"""Rows of the tables that figures are drawn from, for the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from vocabfold.runs.tables import write_table

ORDERS = ("bpe", "frequency", "random", "clustered")
# Models and heads of two seeds and more, and one of a single seed: an interval that does not exist stops no figure.
MODELS = [
    ("gpt2", "full", None, 3),
    ("gpt2", "paper", 225, 2),
    ("gpt_neo", "full", None, 2),
    ("gpt_neo", "paper", 225, 1),
]


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


def tables() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(experiment, its rows): what the programs read."""
    yield (
        "main_comparison",
        [run_row(model, head, size, seed) for model, head, size, seeds in MODELS for seed in range(seeds)],
    )
    yield (
        "figure3_group_size",
        [run_row("gpt2", "paper", group_size, seed) for group_size in (14, 225, 3864) for seed in range(3)],
    )
    foldings = [("bpe", 0, 3), ("clustered", 0, 1), ("frequency", 2048, 2)]
    yield (
        "fold",
        [
            run_row(
                "gpt2",
                "paper",
                225,
                seed,
                partition_order=order,
                shortlist=shortlist,
                distillation_tokens=tokens,
                start_tokens=4096,
                teacher_loss_nats=3.9 + 0.1 * seed,
                teacher_perplexity=55.0 + seed,
                at_once_loss_nats=4.5 + 0.1 * seed,
                at_once_perplexity=90.0 + seed,
            )
            for order, shortlist, seeds in foldings
            for seed in range(seeds)
            for tokens in (1000, 2000)
        ],
    )

    folded = [
        run_row("gpt2", "paper", 225, seed, tokens=tokens, **embedding_columns(name, tokens))
        for name in ("dense", "int4", "tensor_train")
        for seed in range(2)
        for tokens in (200_000, 0, 20_000)
    ]
    yield "embedding_compression", folded
    yield "both_ends", [row for row in folded if row["tokens"] == 200_000]
    heads = ["full", "full_untied", "linear_clustered", "shortlist_frequency"]
    heads += [f"scale_shift_{order}" for order in ORDERS]
    pareto = [head_row(name, 225, seed) for name in heads for seed in range(2)]
    yield "heads_pareto", pareto
    yield (
        "shapes",
        [
            run_row("cnn", head, None, seed, learning_rate=rate, vocabulary_size=256)
            for head in ("full", "paper")
            for seed in (0, 1)
            for rate in (1e-3, 3e-3)
        ],
    )
    yield "first_look", [run_row("gpt2", head, 225, 0) for head in ("full", "linear_clustered")]
    yield (
        "order_matters",
        [head_row(f"scale_shift_{order}", size, seed) for order in ORDERS for size in (56, 897) for seed in (0, 1)],
    )
    yield (
        "vocabulary_scaling",
        [
            head_row(name, 225, seed) | {"vocabulary_size": size, "excess_loss_nats": size / 1e5 + seed}
            for name in ("full_untied", "linear_clustered")
            for size in (10_000, 50_257)
            for seed in (0, 1)
        ],
    )
    yield (
        "larger_vocabulary",
        [
            head_row(name, 225, seed) | {"vocabulary_size": size, "validation_bits_per_byte": 1.5 + 0.1 * seed}
            for name in ("full_untied", "linear_clustered")
            for size in (50_257, 100_277)
            for seed in (0, 1)
        ],
    )
    yield "lead_by_step", [paired_row(tokens, seed) for tokens in (500_000, 4_000_000) for seed in (0, 1)]
    yield "table1_story_quality", judged_rows()
    classes = {"rank": 6, "decile": 10}
    yield (
        "rare_tokens",
        [
            row | {"sorted_by": sorting, "class": number, "targets": 100}
            for row in pareto
            for sorting, count in classes.items()
            for number in range(count)
        ],
    )


def paired_row(tokens: int, seed: int) -> dict[str, Any]:
    """A row of lead_by_step: a folded head that is ahead in both steps, the more so the fewer the tokens."""
    lead = 100_000 / tokens
    losses = {"loss_nats": 6.0, "group_loss_nats": 3.5, "token_loss_nats": 2.5}
    row = run_row("gpt2", "conditioned_tied_wide", 225, seed, tokens=tokens) | losses
    row |= {"full_run": f"9e{seed}{tokens}", "full_head": "full_counts", "full_loss_nats": 6.0 + 2 * lead}
    row |= {f"full_{step}_loss_nats": losses[f"{step}_loss_nats"] + lead for step in ("group", "token")}
    return row | {f"{step}standard_error_nats": 0.01 for step in ("", "group_", "token_")}


def judged_rows() -> list[dict[str, Any]]:
    """Two judges' rows of table1_story_quality: runs, half-trained runs and references, which are of no run."""
    judges = {
        "grammar": ("words_told_share", "new_sentences_share", "consistency_share", "plot_words_share"),
        "language model m": ("grammar_of_10", "creativity_of_10", "consistency_of_10", "plot_of_10", "age_years"),
    }
    writers = [
        (run_row(model, head, size, seed), "trained") for model, head, size, seeds in MODELS for seed in range(seeds)
    ]
    writers += [(run_row("gpt2", "full", None, 0), "half-trained")]
    reference = {"run": None, "corpus": "stories", "seed": 0, "hardware": "test machine", "torch": "2"}
    writers += [(reference, name) for name in ("the stories' own endings", "words mixed between stories")]
    return [
        row
        | {"writer": writer, "judge": judge, "stories": 40}
        | {name: 0.1 * index + 0.05 * row["seed"] for index, name in enumerate(names)}
        | {f"{name}_half_width": 0.02 for name in names}
        for row, writer in writers
        for judge, names in judges.items()
    ]


def head_row(head: str, size: int, seed: int) -> dict[str, Any]:
    return run_row(
        "gpt2", head, size, seed, scorer=head, partition_order=head.rpartition("_")[2], group_accuracy=0.4 + 0.1 * seed
    )


def write_side_tables(folder: Path) -> None:
    """What heads_pareto reads besides its own table: curves of its runs, and the seconds of a training step."""
    curves = []
    for head in ("full", "full_untied", "linear_clustered", "scale_shift_bpe"):
        for step, loss in ((50, 6.0), (100, 4.0)):
            line = {
                "experiment": "heads_pareto",
                "head": head,
                "seed": 0,
                "step": step,
                "tokens": 2000 * step,
                "train_loss": loss,
            }
            curves.append(line | {"validation_loss_nats": loss, "validation_group_accuracy": 0.01 * step})
    pd.DataFrame(curves).to_csv(folder / "heads_pareto_curves.csv", index=False)
    steps = [
        {
            "method": method,
            "round": number,
            "seconds": seconds,
            "tokens": 4096,
            "peak_memory_gib": seconds,
            "flops_per_token": 9,
        }
        for method, seconds in (("no_head", 0.1), ("full", 0.9), ("full_untied", 0.9), ("linear_clustered", 0.2))
        for number in range(2)
    ]
    pd.DataFrame(steps).to_csv(folder / "heads_cost.csv", index=False)
    pictures = [
        {
            "experiment": "shapes",
            "run": run_row("cnn", head, None, seed, learning_rate=rate, vocabulary_size=256)["run"],
            "head": head,
            "learning_rate": rate,
            "seed": seed,
            "step": step,
            "train_loss": 5.0 - step / 50,
        }
        | {"validation_accuracy": step / 100, "validation_group_accuracy": 0.5, "validation_loss_nats": 3.0 + seed}
        for head in ("full", "paper")
        for rate in (1e-3, 3e-3)
        for seed in (0, 1)
        for step in (10, 20)
    ]
    pd.DataFrame(pictures).to_csv(folder / "shapes_curves.csv", index=False)
    looks = [
        {"experiment": "first_look", "run": head, "head": head, "seed": 0, "step": step, "tokens": 2000 * step}
        | {"train_loss": 1.0, "tokens_per_second": 100.0 if step else None, "validation_loss_nats": 6.0 - step / 20}
        for head in ("full", "linear_clustered")
        for step in (10, 20)
    ]
    pd.DataFrame(looks).to_csv(folder / "first_look_curves.csv", index=False)
    ceilings = [{"quantity": f"best {kind}", "value": 0.9, "classes": 256} for kind in ("accuracy", "group accuracy")]
    pd.DataFrame(ceilings).to_csv(folder / "figure1_shapes.csv", index=False)


def write_tables(folder: Path) -> None:
    """Those of ``tables``; a row is a run of its own, but for the image study, whose curves name theirs."""
    for name, rows in tables():
        table = pd.DataFrame([{**row, "experiment": name} for row in rows])
        if name != "shapes":
            table["run"] = [f"{name}{index}" for index in range(len(table))]
        write_table(table, folder / f"{name}.csv")
