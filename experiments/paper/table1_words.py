"""What table1_story_quality measured, in words: the published table with ours beside it, and what each judge saw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from scipy import stats

from experiments.judging import (
    MIXED_SENTENCES,
    OWN_ENDINGS,
    SHUFFLED_WORDS,
    GrammarJudge,
    LanguageModelJudge,
    TextJudge,
)
from experiments.paper.paper_tables import MODELS
from experiments.study.statistics import in_words, mean_and_interval
from vocabfold.runs.tables import RESULTS

TRAINED, HALF_TRAINED = "trained", "half-trained"
WRITERS = [OWN_ENDINGS, TRAINED, HALF_TRAINED, MIXED_SENTENCES, SHUFFLED_WORDS]
WRITER = ["writer", "model", "hidden_size", "head"]
QUANTITIES = {**GrammarJudge.quantities, **LanguageModelJudge.quantities}
# The column of the published table that a quantity comes nearest to.
COUNTERPARTS = {
    "grammar": ("words_told_share", "new_sentences_share", "consistency_share", "plot_words_share", None),
    "text": ("well_formed_share", "new_sentences_share", "names_kept_share", None, None),
}
MARKS = tuple(LanguageModelJudge.quantities)
PUBLISHED_COLUMNS = ("grammar", "creativity", "consistency", "plot", "age")
BY_RULES = (GrammarJudge.name, TextJudge.name)
NOTES = {
    "text": "No grammar of this text is known, so nothing here measures its plot. The first table shows as grammar the "
    "well formed sentences (a capital, a stop, no word three times running), as creativity the sentences that are not "
    "in the training text, as consistency the capitalised words that stand in the beginning; all are shares. Random "
    "words are 'creative' too, and a model that repeats common phrases has more known trigrams than real stories.",
    "grammar": "The first table shows as grammar how much of a sentence the stories' own generator can tell, as "
    "creativity the sentences that are not in the training text (random words are 'creative' too), as consistency the "
    "mentions of the story's own names, object, place and helper, as plot the words "
    "of the plot that was begun among all that only one plot uses. Both are left empty where all "
    "stories together have too few. These are shares, the published marks a language "
    "model's opinions: compare orders, not numbers.",
}


def measured(table: pd.DataFrame, judge: str) -> list[str]:
    """The quantities that ``judge`` could measure on this text."""
    rows = table[table["judge"] == judge]
    return [name for name in QUANTITIES if name in rows and rows[name].notna().any()]


def writers_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Every writer, model, hidden size and head that was judged, the best reference first, the worst last."""
    kinds_of_writer = table[WRITER].drop_duplicates()
    order = kinds_of_writer["writer"].map(WRITERS.index)
    rows = kinds_of_writer.assign(order=order).sort_values(["order", *WRITER[1:]])[WRITER].to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def rows_of(table: pd.DataFrame, one: Mapping[str, Any], judge: str) -> pd.DataFrame:
    """One judge's rows of an one, one a seed."""
    same = table["judge"] == judge
    for name in WRITER:
        same &= table[name].isna() if pd.isna(one[name]) else table[name] == one[name]
    return table[same]


def summary(rows: pd.DataFrame, quantity: str) -> tuple[float, float, int]:
    """(Mean, half width of its 95% interval, seeds): over seeds, or over stories where there is one seed."""
    rows = rows[rows[quantity].notna()]
    if len(rows) == 1:
        return float(rows[quantity].iloc[0]), float(rows[f"{quantity}_half_width"].iloc[0]), 1
    return (*(mean_and_interval(rows[quantity].tolist()) if len(rows) else (math.nan, math.nan)), len(rows))


def name_of(one: Mapping[str, Any]) -> str:
    """How a reader calls an one."""
    if not isinstance(one["model"], str):
        return str(one["writer"])
    half = "" if one["writer"] == TRAINED else f", {one['writer']}"
    return f"{MODELS[one['model']]} {int(one['hidden_size'])}, {one['head']}{half}"


def markdown(table: pd.DataFrame) -> str:
    """The published table with ours beside it, then all that each judge measured, and the differences between heads."""
    lines = ["| model, hidden size | judge | " + " | ".join(PUBLISHED_COLUMNS) + " |"]
    lines.append("|---" * (len(PUBLISHED_COLUMNS) + 2) + "|")
    for _, row in pd.read_csv(RESULTS / "paper" / "table1_published.csv").iterrows():
        cells = " | ".join(f"{row[name]:.2f}" for name in PUBLISHED_COLUMNS)
        lines.append(f"| {MODELS[row['model']]} {row['hidden_size']} | published: language model, of 10 | {cells} |")
    kinds_of_writer, judges = writers_of(table), sorted(set(table["judge"]))
    for judge in judges:
        unit = "share from 0 to 1" if judge in BY_RULES else "of 10"
        for one in kinds_of_writer:
            rows = rows_of(table, one, judge)
            cells = " | ".join(cell(rows, name) for name in COUNTERPARTS.get(judge, MARKS))
            lines.append(f"| {name_of(one)} | {judge}, {unit} | {cells} |")
    for judge in judges:
        names = measured(table, judge)
        lines += ["", f"Everything measured by: {judge}", ""]
        lines.append("| writer | " + " | ".join(QUANTITIES[name] for name in names) + " | seeds |")
        lines.append("|---" * (len(names) + 2) + "|")
        for one in kinds_of_writer:
            rows = rows_of(table, one, judge)
            lines.append(f"| {name_of(one)} | " + " | ".join(cell(rows, name) for name in names) + f" | {len(rows)} |")
        lines += ["", *differences(table, judge)]
    first, interval = table.iloc[0], "± 95%: Student's t over seeds, or resampled stories where there is one seed."
    lines += ["", *(NOTES[judge] for judge in judges if judge in NOTES), ""]
    lines.append(f"Corpus {first['corpus']}; {first['stories']} stories from each writer. {interval}")
    return "\n".join([*lines, f"Hardware: {first['hardware']}; torch {first['torch']}.", ""])


def cell(rows: pd.DataFrame, quantity: str | None) -> str:
    """Mean and interval of one quantity; a dash where it cannot be measured."""
    if quantity is None or quantity not in rows or rows[quantity].isna().all():
        return "–"
    mean, half_width, _ = summary(rows, quantity)
    return in_words(mean, half_width)


def differences(table: pd.DataFrame, judge: str) -> list[str]:
    """The paper's head minus full of each trained model and quantity: mean over seeds, interval, paired t-test."""
    lines = []
    rows = table[(table["judge"] == judge) & (table["writer"] == TRAINED)]
    for model in rows[["model", "hidden_size"]].drop_duplicates().to_dict("records"):
        of_model = rows[(rows["model"] == model["model"]) & (rows["hidden_size"] == model["hidden_size"])]
        for quantity in measured(table, judge):
            values = of_model.pivot_table(index="seed", columns="head", values=quantity).dropna()
            if not {"full", "paper"} <= set(values.columns) or len(values) < 2:
                continue
            change = values["paper"] - values["full"]
            mean, half_width = mean_and_interval(change.tolist())
            if change.std() == 0:  # both always at the end of their scale
                continue
            p_value = stats.ttest_rel(values["paper"], values["full"]).pvalue
            lines.append(
                f"* {MODELS[model['model']]} {int(model['hidden_size'])}, {QUANTITIES[quantity]}: paper's head minus "
                f"full {mean:+.3f} ± {half_width:.3f} (paired t-test over {len(values)} seeds, p = {p_value:.2g})"
            )
    return lines
