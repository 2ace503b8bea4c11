"""Folding a finished model: what it costs in nats, against the rows that are read for a token.

    python -m experiments real_fold measure --smollm2 FILE.gguf --valid NAME=FILE ... --train FILE ...
    python -m experiments real_fold draw

The tokens' rows of SmolLM2-135M-Instruct stay as they are, so that only P(group | h) can differ from the model's own.
Its groups' scores learn from the model's on the hidden states of the training texts; the cost is measured on the
validation texts, as the loss of the very next token, by document. Axes: order, groups, shortlist, the form of the
scores (mean rows, linear, a network), groups that are visited and scored exactly, tokens learned from. The states are
kept in --cache. ``measure`` writes results/cost/real_fold.csv, one row a text, folding and number of visited groups.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.real.fold_inputs import MODEL, identity_of, rows_and_states
from experiments.real.fold_inputs import add_options as add_options
from experiments.real.loss import by_document, state_losses
from experiments.real.states import States
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, read_measured, save
from experiments.study.measuring import COST, is_measured, write_measured
from experiments.study.statistics import paired_bootstrap
from vocabfold.files import write_text
from vocabfold.heads import FullHead, Partition, SortedLinearScorer
from vocabfold.heads.base import log_softmax
from vocabfold.heads.orders import clustered_order, frequency_order
from vocabfold.heads.partition import equal_boundaries
from vocabfold.hugging_face.distil import STEPS, distil, with_exact
from vocabfold.hugging_face.fold import copy_rows
from vocabfold.hugging_face.fold_head import RescoredHead
from vocabfold.machine import origin

PATH = COST / "real_fold.csv"
CORPORA = ("cost",)
ROWS_AT_A_TIME = 128
VISITED = (0, 1, 4, 16, 64)
WIDTH = 512
FORMS = {"mean": "mean rows", "linear": "linear", "network": f"{WIDTH}-wide network"}
SCREEN_SHARE = 0.25  # of the rows' bytes that the exact int8 screen of screen() reads


@dataclass(frozen=True)
class Folding:
    """One way to fold. ``size``: of the groups beside the shortlist; ``share``: of the training states that the scores
    learn from; ``form``: one of FORMS."""

    order: str = "rows"
    size: int = 222
    shortlist: int = 2048
    form: str = "network"
    share: float = 1.0


BASE = Folding()
AXES: dict[str, list[Folding]] = {
    "form": [replace(BASE, form=form) for form in FORMS],
    "order": [replace(BASE, order="frequency"), BASE],
    "groups": [replace(BASE, size=size) for size in (64, 222, 768)],
    "shortlist": [replace(BASE, shortlist=shortlist) for shortlist in (0, 512, 2048, 8192)],
    "tokens": [replace(BASE, share=share) for share in (1 / 16, 1 / 4, 1.0)],
}


def foldings() -> list[Folding]:
    """Each folding of AXES once; those of one partition follow each other."""
    unique = dict.fromkeys(folding for axis in AXES.values() for folding in axis)
    return sorted(unique, key=lambda each: (each.order, each.shortlist, each.size, each.form, each.share))


def partition_of(folding: Folding, rows: Tensor, counts: Tensor) -> Partition:
    """The partition of a folding: ``rows`` [V, D] of the model, ``counts`` [V] of the tokens in the training texts."""
    boundaries = equal_boundaries(len(rows), folding.size, folding.shortlist)
    by_frequency = frequency_order(counts)
    if folding.order == "frequency":
        return Partition(by_frequency, boundaries)
    return Partition(clustered_order(rows, boundaries, by_frequency[: folding.shortlist]), boundaries)


def head_of(full: FullHead, partition: Partition, width: int) -> RescoredHead:
    """A head with the rows of ``full``, its groups scored by their mean rows."""
    head = RescoredHead(
        full.hidden_size, partition, SortedLinearScorer(full.hidden_size, partition, full.weight), width
    )
    copy_rows(head, full)
    return head


@torch.inference_mode()
def group_scores(rows: Tensor, partitions: Sequence[Partition], hidden: Tensor) -> list[Tensor]:
    """z [N, M] of each partition, see RescoredHead.teacher_scores: the logits are computed once for all of them."""
    result = [torch.empty(len(hidden), len(partition.multi_groups)) for partition in partitions]
    for start in tqdm(range(0, len(hidden), ROWS_AT_A_TIME), desc="the model's groups", leave=False):
        logits = rows @ hidden[start : start + ROWS_AT_A_TIME].t()  # [V, R], so that a token's numbers lie together
        largest = logits.max(dim=0).values
        weights = logits.sub_(largest).exp_()
        for partition, scores in zip(partitions, result, strict=True):
            sums = weights.new_zeros(partition.num_groups, weights.shape[1]).index_add_(0, partition.group_of, weights)
            # What underflows is e^-87 of the likeliest group: as good as never.
            sums = sums[partition.multi_groups].clamp(min=torch.finfo(sums.dtype).tiny)
            scores[start : start + ROWS_AT_A_TIME] = (sums.log() + largest).t()
    return result


@torch.inference_mode()
def costs(head: RescoredHead, states: States, exact: Tensor) -> dict[int, Tensor]:
    """{visited groups: log P of each target's group by the model less that by ``head`` [N], in nats}.

    ``exact`` [N, M], see group_scores: visited groups need not be computed again.
    """
    multi, groups = head.partition.multi_groups, head.partition.group_of[states.targets].unsqueeze(-1)
    found: dict[int, list[Tensor]] = {visited: [] for visited in VISITED if visited <= len(multi)}
    for hidden, known, of in zip(states.hidden.split(512), exact.split(512), groups.split(512), strict=True):
        scores = head.scores(hidden)
        true = log_softmax(with_exact(head, scores, known)).gather(-1, of)
        ranked = scores[:, multi].topk(max(found), dim=-1).indices
        for visited, extra in found.items():
            index = ranked[:, :visited]
            ours = log_softmax(head.with_visits(scores, index, known.gather(-1, index)))
            extra.append((true - ours.gather(-1, of)).squeeze(-1))
    return {visited: torch.cat(extra) for visited, extra in found.items()}


def measured_foldings(
    full: FullHead,
    wanted: Sequence[Folding],
    partition: Partition,
    train: tuple[States, Tensor],
    valid: dict[str, tuple[States, Tensor]],
    steps: int = STEPS,
) -> Iterator[dict[str, Any]]:
    """Rows of the foldings of one ``partition``. ``train``, ``valid``: states and what group_scores says of them;
    ``steps``: of learning."""
    states, taught = train
    shuffled = torch.randperm(len(taught), generator=torch.Generator().manual_seed(0))
    for folding in tqdm(wanted, desc="foldings", leave=False):
        torch.manual_seed(0)
        head = head_of(full, partition, WIDTH if folding.form == "network" else 0)
        some = shuffled[: math.ceil(folding.share * len(shuffled))]
        if folding.form != "mean":
            distil(head, states.hidden[some], taught[some], steps)
        common = asdict(folding) | {
            "groups": len(partition.multi_groups),
            "trained_tokens": 0 if folding.form == "mean" else len(some),
        }
        for name, (of_text, exact) in valid.items():
            own = state_losses(of_text.hidden, of_text.targets, full.logits)
            documents = of_text.documents.tolist()
            before = by_document(documents, own.tolist())
            for visited, extra in costs(head, of_text, exact).items():
                after = by_document(documents, (own + extra).tolist())
                added = paired_bootstrap(
                    after["loss_nats"].to_numpy(), before["loss_nats"].to_numpy(), before["tokens"].to_numpy()
                )
                head.visited = visited
                yield common | {
                    "text": name,
                    "visited": visited,
                    "rows_a_token": head.rows_a_token,
                    "share_of_rows": head.rows_a_token / full.vocabulary_size,
                    "model_loss_nats": float(own.double().mean()),
                    "added_nats": added.mean,
                    "added_low": added.low,
                    "added_high": added.high,
                    "valid_tokens": len(own),
                    "valid_documents": len(before),
                }


def measure(arguments: Namespace) -> None:
    """Write results/cost/real_fold.csv."""
    measurement = identity_of("real_fold", arguments)
    if is_measured(PATH, measurement):
        return
    rows = measured_rows(*rows_and_states(arguments))
    write_measured(pd.DataFrame(rows).assign(model=MODEL, **origin()), PATH, measurement)


def measured_rows(weight: Tensor, train: States, valid: dict[str, States]) -> list[dict[str, Any]]:
    """Rows of every folding of a model with the output rows ``weight`` [V, D]."""
    vocabulary_size, hidden_size = weight.shape
    full = FullHead(hidden_size, vocabulary_size, torch.nn.Parameter(weight, requires_grad=False))
    counts = torch.bincount(train.targets, minlength=vocabulary_size)
    by_partition: dict[tuple[str, int, int], list[Folding]] = {}
    for folding in foldings():
        by_partition.setdefault((folding.order, folding.size, folding.shortlist), []).append(folding)
    partitions = [partition_of(wanted[0], weight, counts) for wanted in by_partition.values()]
    taught = group_scores(weight, partitions, train.hidden)
    exact = {name: group_scores(weight, partitions, states.hidden) for name, states in valid.items()}
    result: list[dict[str, Any]] = []
    for index, wanted in enumerate(tqdm(by_partition.values(), desc="partitions")):
        of_texts = {name: (states, exact[name][index]) for name, states in valid.items()}
        result += measured_foldings(full, wanted, partitions[index], (train, taught[index]), of_texts)
    return result


def name_of(folding: Folding) -> str:
    """A folding in words."""
    order = "clustered by rows" if folding.order == "rows" else "by frequency"
    share = "" if folding.share == 1 else f", {folding.share:.3g} of the tokens"
    return f"{order}, groups of {folding.size}, shortlist {folding.shortlist:,}, {FORMS[folding.form]}{share}"


def draw(corpus: str) -> None:
    """Write results/CORPUS/real_fold.md and .png from its csv."""
    path = Path("results") / corpus / "real_fold.csv"
    table = read_measured(path, ("added_nats", "share_of_rows"))
    write_text(path.with_suffix(".md"), markdown(table))
    draw_curves(table, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')}")


def rows_with(table: pd.DataFrame, folding: Folding) -> pd.DataFrame:
    """The rows of one folding, fewest rows read first."""
    chosen = np.ones(len(table), dtype=bool)
    for column, value in asdict(folding).items():
        chosen &= np.isclose(table[column], value) if isinstance(value, float) else (table[column] == value).to_numpy()
    return table[chosen].sort_values("rows_a_token")


SERIES = {
    "mean": (replace(BASE, form="mean"), "mean rows, nothing learned", GREY, "v"),
    "network": (BASE, f"{WIDTH}-wide network", COLORS["green"], "^"),
    "larger groups": (replace(BASE, size=768), "the same, groups of 768", COLORS["blue"], "o"),
    "no shortlist": (replace(BASE, shortlist=0), "the same, no shortlist", COLORS["orange"], "s"),
    "large shortlist": (replace(BASE, shortlist=8192), "the same, shortlist 8,192", COLORS["purple"], "D"),
}


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Added loss against the share of rows read, a panel a text."""
    texts = list(dict.fromkeys(table["text"]))
    figure, axes = plt.subplots(1, len(texts), figsize=(2 * COLUMN_INCHES, 2.9), squeeze=False, sharey=True)
    for axis, text in zip(axes[0], texts, strict=True):
        for folding, label, color, marker in SERIES.values():
            # None and one visited group cost equally many rows: a line needs one of them, the table has both.
            rows = rows_with(table[table["text"] == text], folding)
            rows = rows.sort_values("added_nats").drop_duplicates("rows_a_token").sort_values("rows_a_token")
            bars = np.clip([rows["added_nats"] - rows["added_low"], rows["added_high"] - rows["added_nats"]], 0, None)
            axis.errorbar(
                100 * rows["share_of_rows"],
                rows["added_nats"],
                bars,
                color=color,
                marker=marker,
                capsize=1.5,
                elinewidth=0.7,
                label=label,
            )
        axis.axvline(100 * SCREEN_SHARE, color=GREY, linestyle=":", label="bytes that the exact screen reads")
        axis.set(xscale="log", yscale="log", xlabel="Rows of the output layer read for a token (%)")
        axis.set_title(text, fontsize=8)
        axis.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
        axis.minorticks_off()
    axes[0][0].set_ylabel("Loss above the model's (nats a token)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, path)


def markdown(table: pd.DataFrame) -> str:
    """One table an axis, every number of visited groups a column."""
    first = table.iloc[0]
    texts = list(dict.fromkeys(table["text"]))
    lines = [
        f"{first['model']}: its full softmax folded. Nats added to the loss of the next token (95% interval over "
        "documents), and the share of the output layer's rows that is read for a token.",
        "",
    ]
    for text in texts:
        of_text = table[table["text"] == text]
        loss, documents = of_text["model_loss_nats"].iloc[0], of_text["valid_documents"].iloc[0]
        lines.append(
            f"* {text}: {of_text['valid_tokens'].iloc[0]:,} tokens of {documents} documents, the model's own loss "
            f"{loss:.3f} nats"
        )
    visits = sorted(table["visited"].unique())
    for axis, wanted in AXES.items():
        head = " | ".join(f"{visited} visited" for visited in visits)
        lines += ["", f"## {axis}", "", f"| folding | tokens learned from | text | {head} |"]
        lines.append("|---" * (3 + len(visits)) + "|")
        for folding in wanted:
            for text in texts:
                rows = rows_with(table[table["text"] == text], folding).set_index("visited")
                if rows.empty:
                    continue
                cells = [cell(rows.loc[visited]) if visited in rows.index else "" for visited in visits]
                tokens = rows["trained_tokens"].iloc[0]
                lines.append(f"| {name_of(folding)} | {tokens:,} | {text} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Measured on {first['hardware']}, torch {first['torch']}, commit {first['commit']}. The exact int8 screen "
        f"reads {SCREEN_SHARE:.0%} of the bytes and adds nothing.",
        "",
    ]
    return "\n".join(lines)


def cell(row: pd.Series) -> str:
    """Added nats, their interval and the share of rows."""
    return f"{in_nats(row)}, {row['share_of_rows']:.1%}"


def in_nats(row: pd.Series) -> str:
    """Added nats and their interval."""
    return f"+{row['added_nats']:.3f} ({row['added_low']:.3f} to {row['added_high']:.3f})"
