"""In which of its two steps a folded head leads the full softmax, and where it loses the lead as the tokens grow.

    python -m experiments lead_by_step measure [--heads NAME,...] [KEY=VALUE ...]
    python -m experiments lead_by_step draw [CORPUS ...]

A full softmax has a loss of the group too, in the groups of the folded head that it is compared with: the probability
that it gives a group is the sum over its tokens. The trained runs of experiment=heads_scaling are evaluated in pairs of
the same seed, size and tokens into results/CORPUS/lead_by_step.csv, a row a pair; those of runs that are not here stay.
draw makes .md and .png from it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import FuncFormatter
from torch import Tensor
from tqdm import tqdm

from experiments.heads.heads_scaling import BEST, SMALLEST
from experiments.heads.scaling_points import FULL
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from experiments.study.measuring import add_settings, corpus_of
from experiments.study.statistics import in_words, mean_and_interval
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.heads.base import Head
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.partition import Partition
from vocabfold.machine import origin
from vocabfold.runs.checkpoint import WEIGHTS_NAME
from vocabfold.runs.load import load_run, validation_values
from vocabfold.runs.record import beside_others, finished_runs
from vocabfold.runs.settings import load_settings
from vocabfold.runs.tables import RESULTS, read_rows, read_table, write_table

NAME = "lead_by_step"
Run = tuple[Path, dict[str, Any]]
PAIRED = ("hidden_size", "num_layers", "tokens", "seed")
ROWS_A_TIME = 512  # of probabilities of the whole vocabulary
BLOCK_TARGETS = 256  # that follow each other in a text are no independent evidence: one block
STEPS = {"group": "groups", "token": "tokens given the group", "": "both"}
LOOKS = {"": ("black", "*", "-"), "group": (COLORS["blue"], "s", "--"), "token": (COLORS["orange"], "o", ":")}


def add_options(parser: ArgumentParser) -> None:
    """Which folded heads, and the text."""
    parser.add_argument("--heads", default=BEST, help="comma-separated folded heads (default %(default)s)")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Evaluate the pairs that the table lacks, each written at once. Raises UserError where there is no pair."""
    corpus = corpus_of(arguments.settings)
    path = RESULTS / corpus / f"{NAME}.csv"
    pairs = pairs_of(finished_runs("heads_scaling", corpus), arguments.heads.split(","))
    for folded, full in tqdm(lacking(pairs, path), desc="pairs of runs"):
        write_table(beside_others(pd.DataFrame([compared(folded, full)]), path), path)
    print(f"{path}: {len(pairs)} pairs of the runs here")


def lacking(pairs: list[tuple[Run, Run]], path: Path) -> list[tuple[Run, Run]]:
    """Those without a row in the table at ``path``."""
    table = read_rows(path) if path.is_file() else pd.DataFrame(columns=["run", "full_run"])
    measured = set(table[["run", "full_run"]].itertuples(index=False, name=None))
    return [(folded, full) for folded, full in pairs if (folded[1]["run"], full[1]["run"]) not in measured]


def pairs_of(runs: list[Run], heads: list[str]) -> list[tuple[Run, Run]]:
    """Each run of those heads with that of the best full softmax of the same seed, size and tokens; of runs whose
    weights were kept. Raises UserError where there is no pair."""
    kept = [run for run in runs if (run[0] / WEIGHTS_NAME).is_file()]
    pairs = []
    for folded in (run for run in kept if run[1]["head"] in heads):
        alike = [run for run in kept if run[1]["head"] in FULL and all(run[1][key] == folded[1][key] for key in PAIRED)]
        if alike:
            pairs.append((folded, min(alike, key=lambda run: run[1]["validation_loss_nats"])))
    if not pairs:
        raise UserError(
            f"no run of {' or '.join(heads)} has a full softmax of the same seed, size and tokens beside it: train "
            f"experiment=heads_scaling head={heads[0]},{FULL[1]}"
        )
    return pairs


def compared(folded: Run, full: Run) -> dict[str, Any]:
    """The row of a pair: the losses of both steps, and the standard errors of their differences over the text."""
    partition = partition_of(folded[0])
    corpus = load_corpus(load_settings(folded[0]).data)
    losses, reference = (
        validation_values(folder, corpus, torch.device("cpu"), step_losses(partition))[0]
        for folder, _ in (folded, full)
    )
    row = folded[1] | {"experiment": NAME, "full_run": full[1]["run"], "full_head": full[1]["head"]}
    for name, found in (("", losses), ("full_", reference)):
        group, both = found.mean(dim=0).tolist()
        row |= {f"{name}loss_nats": both, f"{name}group_loss_nats": group, f"{name}token_loss_nats": both - group}
    group, both = (losses - reference).unbind(dim=1)
    for name, difference in (("", both), ("group_", group), ("token_", both - group)):
        row[f"{name}standard_error_nats"] = standard_error(difference)
    return row | {"targets": len(losses)} | origin()


def partition_of(folder: Path) -> Partition:
    """The groups of a run. Raises UserError for a head that has no groups."""
    head = load_run(folder, torch.device("cpu")).head
    if not isinstance(head, FoldedHead):
        raise UserError(f"{folder.name} has no groups: name folded heads with --heads")
    return head.partition


def step_losses(partition: Partition) -> Callable[[Head, Tensor, Tensor], Tensor]:
    """What makes [N, 2] of a head's states: minus log P of the target's group, and of the target, in nats."""

    def losses(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
        parts = zip(hidden.split(ROWS_A_TIME), tokens.split(ROWS_A_TIME), strict=True)
        return torch.cat([-log_probs(head, partition, some, targets) for some, targets in parts])

    return losses


def log_probs(head: Head, partition: Partition, hidden: Tensor, tokens: Tensor) -> Tensor:
    """log P of the group of each token [N] and of the token itself, [N, 2]. A folded head has these very groups."""
    groups = partition.group_of[tokens].unsqueeze(-1)
    if isinstance(head, FoldedHead):
        of_group = head.group_log_prob(hidden).gather(-1, groups).squeeze(-1)
        return torch.stack([of_group, head.target_log_prob(hidden, tokens)], dim=-1)
    log_prob = head.log_prob(hidden)
    slots = torch.arange(partition.num_slots, device=tokens.device)
    exists = slots < partition.sizes[groups]
    members = partition.token_at(groups, slots.where(exists, 0))
    of_group = log_prob.gather(-1, members).masked_fill(~exists, -torch.inf).logsumexp(dim=-1)
    return torch.stack([of_group, log_prob.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)], dim=-1)


def standard_error(differences: Tensor) -> float:
    """Of the mean of ``differences`` [targets] in the order of the text, over blocks that follow each other; NaN of
    less than two."""
    blocks = differences[: len(differences) // BLOCK_TARGETS * BLOCK_TARGETS].view(-1, BLOCK_TARGETS).mean(dim=1)
    return float(blocks.std() / len(blocks) ** 0.5) if len(blocks) > 1 else float("nan")


def draw(corpus: str) -> None:
    """Write one corpus' table in words and, where the smallest models have two budgets, its picture."""
    table = with_gaps(read_table(NAME, corpus))
    path = RESULTS / corpus / f"{NAME}.md"
    write_text(path, markdown(table, corpus))
    print(f"wrote {path}")
    smallest = table[(table["hidden_size"] == SMALLEST) & (table["head"] == BEST)]
    if smallest["tokens"].nunique() > 1:
        draw_gaps(smallest, corpus)


def with_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with ``group_gap``, ``token_gap`` and ``gap``: losses minus the full softmax's."""
    gaps = {
        name: table[f"{step}loss_nats"] - table[f"full_{step}loss_nats"]
        for name, step in (("group_gap", "group_"), ("token_gap", "token_"), ("gap", ""))
    }
    return table.assign(**gaps).sort_values(["hidden_size", "head", "tokens", "seed"])


def draw_gaps(table: pd.DataFrame, corpus: str) -> None:
    """Both steps' gaps over the tokens, each pair a mark with its interval over the text, their means joined."""
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.5))
    for step, (color, marker, dash) in LOOKS.items():
        gap, error = (f"{step}_{name}" if step else name for name in ("gap", "standard_error_nats"))
        style: dict[str, Any] = {"color": color, "marker": marker, "capsize": 2}
        axis.errorbar(table["tokens"], table[gap], yerr=1.96 * table[error], **style, linestyle="none", alpha=0.6)
        means = table.groupby("tokens")[gap].mean()
        axis.plot(means.index, means, color=color, marker=marker, linestyle=dash, label=STEPS[step])
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(table["tokens"].unique()))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _millions(tokens)))
    axis.set(xlabel="Training tokens", ylabel="Loss minus full softmax's (nats)")
    axis.legend(title="step", title_fontsize=7)
    first = table.iloc[0]
    figure.suptitle(
        f"{corpus}; hidden {first['hidden_size']:.0f}; head=folded, 95% intervals over the text", fontsize=7
    )
    save(figure, RESULTS / corpus / f"{NAME}.png")


def markdown(table: pd.DataFrame, corpus: str) -> str:
    """A line a head and budget: both steps' losses of both heads, and the gaps."""
    lines = [
        "| hidden size | head | tokens | pairs | groups, head - full | tokens given the group, head - full "
        "| both, head - full |",
        "|---" * 7 + "|",
    ]
    keys = table[["hidden_size", "head", "tokens"]].drop_duplicates().itertuples(index=False, name=None)
    for size, head, tokens in keys:
        rows = table[(table["hidden_size"] == size) & (table["head"] == head) & (table["tokens"] == tokens)]
        cells = [_cell(rows, name) for name in ("group", "token", "")]
        lines.append(f"| {size:.0f} | `{head}` | {_millions(tokens)} | {len(rows)} | " + " | ".join(cells) + " |")
    fulls = ", ".join(f"`{name}`" for name in sorted(table["full_head"].unique()))
    note = (
        f"{corpus}; validation loss in nats a token, head - full softmax ({fulls}) of the same seed and tokens, whose "
        "group loss is that of the sums of its probabilities over the head's own groups; then their difference, ± its "
        "95% interval over seeds (Student's t), of one pair over the text (blocks of 256 targets)."
    )
    return "\n".join([*lines, "", note, ""])


def _cell(rows: pd.DataFrame, step: str) -> str:
    prefix = f"{step}_" if step else ""
    losses = [rows[f"{of}{prefix}loss_nats"].mean() for of in ("", "full_")]
    mean, half_width = mean_and_interval(rows[f"{prefix}gap"].tolist())
    if len(rows) == 1:
        half_width = 1.96 * float(rows[f"{prefix}standard_error_nats"].iloc[0])
    return f"{losses[0]:.3f} - {losses[1]:.3f} = {in_words(mean, half_width)}"


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.3g} M"
