"""The table of the experiment on decoding finished models in words, and its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save
from vocabfold.measure.speed import Ratio, ratio_summary

GOALS = {  # the least ratio of transformers' seconds to the screened ones, of whole greedy decoding at batch 1
    ("SmolLM2-135M", "fp32"): 1.2,
    ("SmolLM2-135M", "bf16"): 1.1,
    ("Gemma 3 270M shape", "fp32"): 2.5,
    ("Gemma 3 270M shape", "bf16"): 1.8,
}
SCREENED = "screened"
ORDER = (
    "transformers",
    "dense",
    "dense, faster product",
    "int8, not exact",
    "screened, transformers' steps",
    SCREENED,
)
NOT_EXACT = "int8, not exact"
KEYS = ["model", "type", "batch", "sampling"]


def seconds_of(rows: pd.DataFrame) -> dict[str, list[float]]:
    """Method -> its seconds, round by round."""
    return {str(name): list(each.sort_values("round")["seconds"]) for name, each in rows.groupby("method")}


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _number(value: Any, digits: int = 3) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}g}"


def _words(key: tuple[object, ...]) -> list[str]:
    # A batch is a float in a column where other parts have none.
    return [f"{value:.0f}" if isinstance(value, float) else str(value) for value in key]


def in_words(table: pd.DataFrame) -> str:
    """Goals, whole decoding, the output layer and a step of the decoder alone, and what int8 without bounds costs."""
    first = table.iloc[0]
    where = f"{first['hardware']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}"
    parts = [_goals(table), _decoding(table), _layers(table), _steps(table), _quality(table), _bounds(table)]
    return "\n".join([*(f"{part}\n" for part in parts if part), f"Measured on {where}.", ""])


def _goals(table: pd.DataFrame) -> str:
    lines = [
        "Greedy decoding at batch 1: how many times as long others take as the screened layer with our steps.\n",
        "| model | type | transformers' generate | goal | | dense in our loop | int8, not exact, in our loop |",
        "|---" * 7 + "|",
    ]
    rows = table[(table["part"] == "decode") & (table["sampling"] == "greedy") & (table["batch"] == 1)]
    for (model, type_name), each in rows.groupby(["model", "type"], sort=False):
        seconds = seconds_of(each)
        ratios = [ratio_summary(seconds, name, SCREENED) for name in ("transformers", "dense", NOT_EXACT)]
        goal = GOALS.get((str(model), str(type_name)))
        verdict = "" if goal is None else "met" if ratios[0].median >= goal else "**not met**"
        cells = [
            _ratio(ratios[0]),
            "" if goal is None else str(goal),
            verdict,
            *(_ratio(ratio) for ratio in ratios[1:]),
        ]
        lines.append(f"| {model} | {type_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


Row = Callable[[pd.DataFrame, dict[str, list[float]], str], list[str]]


def _decoding(table: pd.DataFrame) -> str:
    def numbers(rows: pd.DataFrame, seconds: dict[str, list[float]], method: str) -> list[str]:
        median = float(np.median(seconds[method]))
        return [
            f"{1e3 * median:.1f}",
            f"{float(rows['batch'].iloc[0]) / median:.1f}",
            _ratio(ratio_summary(seconds, "transformers", method)),
            _number(rows["same_tokens"].iloc[0]),
        ]

    lines = [
        "Whole decoding. The last column: how many of the tokens are those of transformers' greedy decoding.\n",
        "| model | type | batch | sampling | method | exact | ms a step | tokens a second "
        "| transformers takes times as long | same tokens |",
        "|---" * 10 + "|",
    ]
    return "\n".join([*lines, *_by_method(table, "decode", numbers)])


def _layers(table: pd.DataFrame) -> str:
    def numbers(rows: pd.DataFrame, seconds: dict[str, list[float]], method: str) -> list[str]:
        counts = ("mib_a_call", "rows_scored_a_token", "dense_products_a_call")
        return [
            f"{1e3 * float(np.median(seconds[method])):.2f}",
            _ratio(ratio_summary(seconds, "dense", method)),
            *(_number(rows[name].iloc[0]) for name in counts),
        ]

    lines = [
        "The output layer alone, a call for the whole batch.\n",
        "| model | type | batch | sampling | method | exact | ms a call | dense takes times as long | MiB read a call "
        "| rows scored a token | dense products a call |",
        "|---" * 11 + "|",
    ]
    return "\n".join([*lines, *_by_method(table, "head", numbers)])


def _by_method(table: pd.DataFrame, part: str, numbers: Row) -> Iterator[str]:
    """A line for each case of a part and method in it; ``numbers``: of its rows, with the seconds of all methods."""
    for key, rows in table[table["part"] == part].groupby(KEYS, sort=False):
        seconds = seconds_of(rows)
        for method in (name for name in ORDER if name in seconds):
            exact = "no" if method == NOT_EXACT else "yes"
            cells = [*_words(key), method, exact, *numbers(rows[rows["method"] == method], seconds, method)]
            yield f"| {' | '.join(cells)} |"


def _steps(table: pd.DataFrame) -> str:
    lines = [
        "A step of the decoder below the output layer: the same bits.\n",
        "| model | type | batch | ms, transformers | ms, ours | transformers takes times as long |",
        "|---" * 6 + "|",
    ]
    for key, rows in table[table["part"] == "step"].groupby(["model", "type", "batch"], sort=False):
        seconds = seconds_of(rows)
        times = [f"{1e3 * float(np.median(seconds[name])):.1f}" for name in ("transformers", "ours")]
        lines.append(
            f"| {' | '.join([*_words(key), *times, _ratio(ratio_summary(seconds, 'transformers', 'ours'))])} |"
        )
    return "\n".join(lines)


def _quality(table: pd.DataFrame) -> str:
    rows = table[table["part"] == "quality"]
    if rows.empty:
        return ""
    lines = [
        "The int8 rows without their bounds against the model's own layer, on documents read whole; the screened layer "
        "beside it.\n",
        "| model | type | tokens | perplexity | KL, nats a token | perplexity times | same likeliest token "
        "| the screened layer's |",
        "|---" * 8 + "|",
    ]
    for _, row in rows.iterrows():
        times = (
            f"{row['perplexity_ratio']:.5f} ({row['perplexity_ratio_low']:.5f} to {row['perplexity_ratio_high']:.5f})"
        )
        cells = [
            row["model"],
            row["type"],
            f"{row['tokens_read']:,.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_nats']:.2g}",
            times,
            f"{row['agreement']:.4f}",
            f"{row['screened_agreement']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bounds(table: pd.DataFrame) -> str:
    rows = table[table["part"] == "bound"]
    lines = [
        "Which share of the rows other proven bounds would leave, on states after the beginnings of texts.\n",
        "| model | bound | rows left |",
        "|---" * 3 + "|",
    ]
    lines += [f"| {row['model']} | {row['method']} | {100 * row['rows_left']:.3g}% |" for _, row in rows.iterrows()]
    return "\n".join(lines)


def draw_bars(table: pd.DataFrame, path: Path) -> None:
    """Milliseconds a token of greedy decoding at batch 1, one panel a model and type; bars to the median round."""
    rows = table[(table["part"] == "decode") & (table["sampling"] == "greedy") & (table["batch"] == 1)]
    panels = list(rows.groupby(["model", "type"], sort=False))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(COLUMN_INCHES, 1.25 * len(panels)), sharex=True, layout="constrained", squeeze=False
    )
    colors = {SCREENED: COLORS["blue"], NOT_EXACT: COLORS["orange"]}
    for axis, ((model, type_name), each) in zip(axes[:, 0], panels, strict=True):
        seconds = seconds_of(each)
        values = [1e3 * np.array(seconds[name]) for name in ORDER]
        medians = np.array([np.median(value) for value in values])
        spread = [
            [median - value.min() for median, value in zip(medians, values, strict=True)],
            [value.max() - median for median, value in zip(medians, values, strict=True)],
        ]
        axis.barh(ORDER, medians, xerr=spread, color=[colors.get(name, GREY) for name in ORDER], height=0.7)
        for index, (median, value) in enumerate(zip(medians, values, strict=True)):
            axis.annotate(
                f"{median:.0f}", (value.max(), index), (3, 0), textcoords="offset points", va="center", size=6
            )
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.grid(visible=False, axis="y")
        axis.set_title(f"{model}, {type_name}", size=8, loc="left")
    figure.supxlabel("milliseconds a token (whiskers: all rounds)", size=8)
    save(figure, path)
