"""What a real model thinks of stories: its loss on what each of our models wrote, and on endings that are known.

    python -m experiments real_stories measure [--run RUN_FOLDER ...] [--beginnings 20] [KEY=VALUE ...]
    python -m experiments real_stories draw

Validation stories are cut at random and written on by finished runs as for table1_story_quality; the real model reads
each beginning and predicts the continuation. References are the stories' own endings, and the same with sentences or
words mixed between stories: a measure of quality has to rank the first best and the last worst. ``measure`` writes
results/real/real_stories.csv, one row a writer; KEY=VALUE choose the text where no run does.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from experiments.judging import (
    MIXED_SENTENCES,
    OWN_ENDINGS,
    SHUFFLED_WORDS,
    Material,
    Story,
    Written,
    mean_and_bootstrap,
    written_by_runs,
    written_references,
)
from experiments.judging.writing import choose_beginnings
from experiments.paper.paper_tables import MODELS
from experiments.real.growing import GrowingTable, add_model, described
from experiments.real.loss import state_losses
from experiments.study.figures import COLORS, COLUMN_INCHES, report, save
from experiments.study.measuring import add_settings, at_least_one, composed, identity, text_of
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.hugging_face import load
from vocabfold.runs.settings import load_settings
from vocabfold.runs.tables import RESULTS

NAME = "real_stories"
SEED = 0  # of the beginnings and of what is mixed
REFERENCES = (OWN_ENDINGS, MIXED_SENTENCES, SHUFFLED_WORDS)
RUN = "a run"
STYLES = {OWN_ENDINGS: ("green", "^"), MIXED_SENTENCES: ("purple", "v"), SHUFFLED_WORDS: ("red", "x")}


@torch.inference_mode()
def story_losses(model: Any, tokenizer: Any, stories: Sequence[Story]) -> pd.DataFrame:
    """Columns tokens, nats and bytes of each story's continuation, read after its beginning; nats are a sum.

    Both parts are tokens of their own, cut in front of a word. An empty continuation has 0 of each.
    """
    rows = []
    for story in stories:
        first, second = (
            tokenizer(part, add_special_tokens=False).input_ids for part in (story.beginning, story.continuation)
        )
        nats = 0.0
        if first and second:
            ids = torch.tensor(first + second)
            hidden = model.base_model(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0, len(first) - 1 :]
            losses = state_losses(hidden, ids[len(first) :], model.get_output_embeddings())
            nats = float(losses.double().sum())
        rows.append({"tokens": len(second), "nats": nats, "bytes": len(story.continuation.encode())})
    return pd.DataFrame(rows)


def add_options(parser: ArgumentParser) -> None:
    """The model, who writes, and how much."""
    add_model(parser)
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="folders of finished runs, all on one text")
    parser.add_argument("--beginnings", type=int, default=20, help="validation stories (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=100, help="of a continuation (default %(default)s)")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """The loss of every writer that has no row yet."""
    at_least_one(arguments, "beginnings", "max_tokens")
    of_model = described(arguments.model)
    settings = composed(arguments.settings)
    data = load_settings(arguments.run[0]).data if arguments.run else settings.data
    for folder in arguments.run:
        if load_settings(folder).data != data:
            raise UserError(f"{folder} was trained on another text than {arguments.run[0]}: measure one at a time")
    settings.data = data
    sizes = Namespace(beginnings=arguments.beginnings, max_tokens=arguments.max_tokens)
    table = GrowingTable(NAME)

    def identity_of(writer: str) -> str:
        return identity(NAME, sizes, of_model["model_sha256"], text_of(settings), writer)

    folders = [folder for folder in arguments.run if identity_of(folder.name) not in table.runs]
    if not folders and all(identity_of(name) in table.runs for name in REFERENCES):
        print(f"{table.path}: all of this was measured before")
        return
    corpus = load_corpus(data)
    beginnings = choose_beginnings(corpus, arguments.beginnings, arguments.max_tokens, SEED)
    written = list(written_references(Material(data, corpus, beginnings), SEED))
    written += written_by_runs({RUN: folders}, arguments.beginnings, 1, arguments.max_tokens, SEED)
    names = [*REFERENCES, *(folder.name for folder in folders)]
    model, tokenizer = load(arguments.model)
    for name, writer in zip(names, written, strict=True):
        if identity_of(name) not in table.runs:
            losses = story_losses(model, tokenizer, writer.stories)
            table.add(identity_of(name), [of_model | row_of(name, writer, losses)])


def row_of(name: str, writer: Written, losses: pd.DataFrame) -> dict[str, Any]:
    """What a row says of one writer; numbers of each story stand in one cell."""
    row: dict[str, Any] = {"corpus": writer.material.corpus.name, "writer": name if writer.name != RUN else RUN}
    if writer.name == RUN:
        row["writer_run"] = name
        row |= {f"writer_{key}": writer.row.get(key) for key in ("model", "hidden_size", "head", "seed", "tokens")}
        row["writer_loss_nats"] = writer.row.get("validation_loss_nats")
    return row | {
        "stories": len(losses),
        "tokens": int(losses["tokens"].sum()),
        "loss_nats": losses["nats"].sum() / max(1, losses["tokens"].sum()),
        "bits_per_byte": losses["nats"].sum() / math.log(2) / max(1, losses["bytes"].sum()),
        "story_tokens": " ".join(map(str, losses["tokens"])),
        "story_nats": " ".join(f"{nats:.3f}" for nats in losses["nats"]),
    }


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Best first, one row a corpus and writer, runs that differ in their seed together.

    ``mean``: nats a token, the mean over beginnings, each of which weighs the same; ``above_own``: what the writer has
    more than the stories' own endings of the same beginnings. Both with half the width of a 95% interval, from
    resampled beginnings.
    """
    rows = []
    keys = ["corpus", "writer", "writer_model", "writer_hidden_size", "writer_tokens", "writer_head"]
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *keys, "writer_loss_nats"])))
    own = {row["corpus"]: losses_of(row) for _, row in table[table["writer"] == OWN_ENDINGS].iterrows()}
    for key, group in table.groupby(keys, dropna=False, sort=False):
        first: dict[str, Any] = dict(zip(keys, key, strict=True))
        of_beginning = pd.DataFrame(
            [losses_of(row) for _, row in group.iterrows()]
        ).mean()  # runs that wrote nothing: out
        mean, half_width = mean_and_bootstrap(of_beginning.tolist())
        above_own, above_own_half_width = mean_and_bootstrap((of_beginning - own[first["corpus"]]).tolist())
        name = first["writer"]
        if name == RUN:
            name = f"{MODELS.get(first['writer_model'], first['writer_model'])} {first['writer_hidden_size']:.0f}, "
            name += f"{first['writer_head']}, {first['writer_tokens'] / 1e6:.1f} M tokens"
        rows.append({
            "corpus": first["corpus"], "name": name, "mean": mean, "half_width": half_width, "above_own": above_own,
            "above_own_half_width": above_own_half_width, "bits_per_byte": group["bits_per_byte"].mean(),
            "runs": len(group), "stories": int(group["stories"].sum()), "loss": group["writer_loss_nats"].mean(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values(["corpus", "mean"], kind="stable")


def losses_of(row: pd.Series) -> np.ndarray:
    """Nats a token of each beginning's story; NaN where nothing was written."""
    tokens, nats = (np.array(str(row[name]).split(), float) for name in ("story_tokens", "story_nats"))
    return np.divide(nats, tokens, out=np.full(len(nats), math.nan), where=tokens > 0)


def markdown(table: pd.DataFrame) -> str:
    """Every writer, best first, and whether the references stand at the ends."""
    rows, judge = summary(table), table.iloc[0]["model"]
    lines = [
        f"| text | writer | loss under {judge} (nats a token) | above the own endings | bits a byte | runs | stories "
        "| own validation loss |"
    ]
    lines.append("|---" * 8 + "|")
    for _, row in rows.iterrows():
        own = "" if math.isnan(row["loss"]) else f"{row['loss']:.3f}"
        above = f"{row['above_own']:+.3f} ± {row['above_own_half_width']:.3f}" if row["name"] != OWN_ENDINGS else ""
        lines.append(
            f"| {row['corpus']} | {row['name']} | {row['mean']:.3f} ± {row['half_width']:.3f} | {above} "
            f"| {row['bits_per_byte']:.3f} | {row['runs']} | {row['stories']} | {own} |"
        )
    lines.append("")
    for corpus, group in rows.groupby("corpus", sort=False):
        lines.append(f"* {corpus}: {verdict(group)}")
    first_row = table.iloc[0]
    lines += [
        "",
        "± 95% over beginnings, each weighing the same, by resampling; differences are between continuations ",
    ]
    lines[-1] += "of the same beginning. Models draw with temperature 0.4 from the 50 likeliest tokens, which makes a "
    lines[-1] += "text more likely than what people write."
    return "\n".join([*lines, f"Hardware: {first_row['hardware']}; torch {first_row['torch']}.", ""])


def verdict(rows: pd.DataFrame) -> str:
    """Of one text: whether the loss ranks as a measure of quality must, and how the writers stand to the references."""
    names = rows["name"].tolist()
    is_measure = names[0] == OWN_ENDINGS and names[-1] == SHUFFLED_WORDS
    words = f"first {names[0]}, last {names[-1]}; a measure of quality puts {OWN_ENDINGS} first and {SHUFFLED_WORDS} "
    words += f"last, so this is {'one' if is_measure else 'none'} here."
    runs = rows[~rows["name"].isin(REFERENCES)].dropna(subset=["loss"])
    if len(runs) > 2:
        ranks = [runs[unit].corr(runs["loss"], method="spearman") for unit in ("mean", "bits_per_byte")]
        words += f" Over the {len(runs)} kinds of runs the rank correlation with their own validation loss is "
        words += f"{ranks[0]:.2f} by token and {ranks[1]:.2f} by byte."
    return words


def draw_losses(table: pd.DataFrame, path: Path) -> None:
    """The loss of each writer, one panel a text."""
    rows = summary(table)
    corpora = list(dict.fromkeys(rows["corpus"]))
    heights = [len(rows[rows["corpus"] == corpus]) for corpus in corpora]
    size = (2 * COLUMN_INCHES, 0.6 + 0.3 * len(corpora) + 0.18 * sum(heights))
    figure, axes = plt.subplots(len(corpora), 1, figsize=size, sharex=True, squeeze=False, height_ratios=heights)
    for axis, corpus in zip(axes[:, 0], corpora, strict=True):
        of = rows[rows["corpus"] == corpus].iloc[::-1]
        for place, (_, row) in enumerate(of.iterrows()):
            color, marker = STYLES.get(row["name"], ("blue", "o"))
            axis.errorbar(row["mean"], place, xerr=row["half_width"], color=COLORS[color], marker=marker, capsize=2)
        axis.set_yticks(range(len(of)), of["name"])
        axis.set_ylim(-0.6, len(of) - 0.4)
        axis.set_title(corpus, fontsize=8)
    axes[-1, 0].set_xlabel(f"Loss of the continuation under {table.iloc[0]['model']} (nats a token)")
    figure.suptitle("95% intervals over beginnings", fontsize=7)
    save(figure, path)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / f"{NAME}.csv", markdown, draw_losses, ("writer", "story_nats"))
