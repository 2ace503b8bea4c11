"""Where a folded head loses and wins: validation loss by how often a token stands in the training text.

    python -m experiments rare_tokens measure [--of heads_scaling] [KEY=VALUE ...]
    python -m experiments rare_tokens draw [CORPUS ...]

evaluates the trained runs of experiment=heads_pareto, or those of heads_scaling at the largest budget that a full
softmax has at the smallest hidden size, into results/CORPUS/rare_tokens.csv, one row a run and class of tokens, and
draws .png and .md from it.
"""

from __future__ import annotations

import itertools
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from experiments.heads.scaling_points import FULL, arm_of
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save, seeds_of, trained_on
from experiments.study.measuring import add_settings, corpus_of, identity, is_measured
from experiments.study.statistics import in_words, summarise
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.machine import origin
from vocabfold.runs.load import validation_losses
from vocabfold.runs.record import finished_runs
from vocabfold.runs.settings import load_settings
from vocabfold.runs.tables import RESULTS, read_table, write_table
from vocabfold.tokens import token_counts

NUM_DECILES = 10
RANK_LIMITS = (0, 10, 100, 1_000, 10_000)  # of classes of tokens by rank in the training text; the last has no end
SHOWN = {
    "full": ("full, tied", COLORS["orange"], "s", "-"),
    "full_untied": ("full, untied", COLORS["red"], "D", "--"),
    "scale_shift_bpe": ("paper's head", GREY, "x", ":"),
    "linear_clustered": ("folded: linear, clustered", COLORS["green"], "^", "-."),
    "shortlist_frequency": ("shortlist, frequency", COLORS["blue"], "o", "-"),
    "shortlist_clustered": ("shortlist, clustered", COLORS["purple"], "v", "--"),
    "full_untied_counts": ("full, untied, count biases", COLORS["orange"], "D", "-"),
    "full_counts": ("full, tied, count biases", COLORS["red"], "s", "--"),
    "paper": ("paper's head", GREY, "x", ":"),
    "paper, S = 3,866": ("paper's head, S = 3,866", GREY, "+", "--"),
    "linear_clustered_counts": ("linear, clustered, count biases", COLORS["blue"], "v", "--"),
    "conditioned_clustered": ("conditioned on the group", COLORS["green"], "o", "-"),
    "conditioned_exchanged": ("sees its group, groups by exchange", COLORS["green"], "^", "-."),
    "conditioned_tied": ("the same, tied", COLORS["purple"], "v", "--"),
    "conditioned_tied_wide": ("head=folded", "black", "*", "-"),
}


def classes_of(counts: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each way of sorting, the class of each target: deciles of equal numbers of targets, from the rarest token
    to the most frequent, and classes of the token's rank by frequency in training (tokens never seen apart)."""
    rank = torch.empty_like(counts)
    rank[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    place = torch.empty_like(targets)
    # Equally frequent targets are dealt by token id, so that a token stays in one class but for those at a border.
    place[torch.from_numpy(np.lexsort((targets.numpy(), counts[targets].numpy())))] = torch.arange(len(targets))
    limits = torch.tensor(RANK_LIMITS[1:])
    by_rank = torch.bucketize(rank[targets], limits, right=True)
    by_rank[counts[targets] == 0] = len(RANK_LIMITS)
    return {"decile": place * NUM_DECILES // len(targets), "rank": by_rank}


def loss_of_targets(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(negative log likelihood in nats, token) of every validation target of a run, and the training counts [V]."""
    settings = load_settings(folder)
    corpus = load_corpus(settings.data).with_training_tokens(settings.training_tokens)
    losses, tokens = validation_losses(folder, corpus, torch.device("cpu"))
    return losses, tokens, token_counts(corpus.train.tokens, corpus.vocabulary_size)


def add_options(parser: ArgumentParser) -> None:
    """Which experiment's runs, and settings of training."""
    parser.add_argument("--of", default="heads_pareto", choices=("heads_pareto", "heads_scaling"), help="whose runs")
    add_settings(parser)


def of_largest_full(runs: list[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """The runs of the smallest hidden size on as many tokens as its full softmax had at most. Raises UserError where
    there is no full softmax."""
    smallest = min(row["hidden_size"] for _, row in runs)
    tokens = [row["tokens"] for _, row in runs if row["head"] in FULL and row["hidden_size"] == smallest]
    if not tokens:
        raise UserError("no full softmax has finished: train experiment=heads_scaling head=full_untied_counts first")
    return [one for one in runs if one[1]["tokens"] == max(tokens) and one[1]["hidden_size"] == smallest]


def measure(arguments: Namespace) -> None:
    """Evaluate the finished runs and write the table. Raises UserError where there is none."""
    corpus = corpus_of(arguments.settings)
    runs = finished_runs(arguments.of, corpus)
    if arguments.of == "heads_scaling":
        runs = of_largest_full(runs)
    path = RESULTS / corpus / "rare_tokens.csv"
    # Whose runs they are is told by their names.
    measurement = identity("rare_tokens", Namespace(), [folder.name for folder, _ in runs])
    if is_measured(path, measurement, "measurement"):
        return
    rows: list[dict[str, Any]] = []
    for folder, run in tqdm(runs, desc="runs"):
        loss, targets, counts = loss_of_targets(folder)
        for sorting, classes in classes_of(counts, targets).items():
            for number in classes.unique().tolist():
                members = classes == number
                rows.append(
                    run
                    | {
                        "experiment": "rare_tokens",
                        "validation_loss_nats": float(loss[members].mean()),
                        "perplexity": None,
                        "sorted_by": sorting,
                        "class": number,
                        "targets": int(members.sum()),
                        "least_training_count": int(counts[targets[members]].min()),
                        "most_training_count": int(counts[targets[members]].max()),
                        **origin(),
                    }
                )
    write_table(pd.DataFrame(rows).assign(measurement=measurement), path, ("run", "sorted_by", "class"))
    print(f"wrote {path}")


def draw(corpus: str) -> None:
    """Write one corpus' picture and table from results/CORPUS/rare_tokens.csv."""
    table = with_arms(read_table("rare_tokens", corpus))
    reference = next(head for head in ("full", *FULL) if head in set(table["head"]))
    shown = {head: look for head, look in SHOWN.items() if head in set(table["head"])}
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.9))
    by_rank, by_decile = (table[table["sorted_by"] == name] for name in ("rank", "decile"))
    for head, (label, color, marker, dash) in shown.items():
        style: dict[str, Any] = {"label": label, "color": color, "marker": marker, "linestyle": dash, "capsize": 2}
        rows = summarise(by_rank[by_rank["head"] == head], ["class"], "validation_loss_nats")
        axes[0].errorbar(rows["class"], rows["mean"], yerr=rows["half_width"], **style)
        rows = summarise(differences(by_decile, head, reference), ["class"], "difference")
        axes[1].errorbar(rows["class"] + 1, rows["mean"], yerr=rows["half_width"], **style)
    names = rank_names(by_rank)
    axes[0].set_xticks(list(names), list(names.values()), rotation=30, ha="right")
    axes[0].set(xlabel="Rank of the target in the training text", ylabel="Validation loss (nats)")
    axes[1].set_xticks(range(1, NUM_DECILES + 1))
    axes[1].set(xlabel="Decile of targets, rarest token first", ylabel="Loss minus full softmax's (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=6)
    seeds = seeds_of(table[table["head"].isin(shown)])
    intervals = ", 95% intervals" if table["seed"].nunique() > 1 else ""
    figure.suptitle(f"{trained_on(table)}; {seeds}{intervals}; right: minus {SHOWN[reference][0]}", fontsize=7)
    save(figure, RESULTS / corpus / "rare_tokens.png")
    path = RESULTS / corpus / "rare_tokens.md"
    write_text(path, markdown(by_rank))
    print(f"wrote {path}")


def with_arms(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with group sizes far from the root of V under a name of their own (see scaling_points.arm_of)."""
    if "vocabulary_size" not in table:
        return table
    described = table.astype({"group_size": float})[["head", "scorer", "group_size", "vocabulary_size"]]
    return table.assign(head=[arm_of(*one) for one in described.itertuples(index=False, name=None)])


def differences(by_decile: pd.DataFrame, head: str, reference_head: str) -> pd.DataFrame:
    """Loss of ``head`` minus that of the reference with the same seed, a row a seed and decile."""
    key = ["seed", "class"]
    loss, reference = (
        by_decile[by_decile["head"] == name].set_index(key)["validation_loss_nats"] for name in (head, reference_head)
    )
    return (loss - reference).dropna().rename("difference").reset_index()


def rank_names(by_rank: pd.DataFrame) -> dict[int, str]:
    """Each class of ranks and how a reader calls it."""
    names = {index: f"{start + 1:,} to {stop:,}" for index, (start, stop) in enumerate(itertools.pairwise(RANK_LIMITS))}
    names[len(RANK_LIMITS) - 1] = f"over {RANK_LIMITS[-1]:,}"
    names[len(RANK_LIMITS)] = "never seen"
    return {number: names[number] for number in sorted(by_rank["class"].unique())}


def markdown(by_rank: pd.DataFrame) -> str:
    """Mean loss and 95% interval over seeds, a line a head, a column a class of ranks."""
    names = rank_names(by_rank)
    lines = ["| head | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    for head in sorted(set(by_rank["head"].astype(str))):
        rows = summarise(by_rank[by_rank["head"] == head], ["class"], "validation_loss_nats")
        cells = [in_words(mean, half_width) for mean, half_width in rows[["mean", "half_width"]].to_numpy()]
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    share = by_rank[by_rank["head"] == by_rank["head"].iloc[0]].groupby("class")["targets"].first()
    lines.append("| share of targets | " + " | ".join(f"{share[number] / share.sum():.1%}" for number in names) + " |")
    interval = "mean ± 95% interval (Student's t) over " if by_rank["seed"].nunique() > 1 else ""
    note = (
        "Validation loss in nats per token by the rank of the target in the training text; "
        f"{interval}{seeds_of(by_rank)}."
    )
    return "\n".join([*lines, "", note, ""])
