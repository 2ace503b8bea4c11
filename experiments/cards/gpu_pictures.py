"""A picture for each part of gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from experiments.cards import gpu_decoding, gpu_heads, gpu_steps
from experiments.cards.card_heads import WORDS
from experiments.cards.gpu_steps import BF16, CAPTURED, EAGER, FP32, NO_HEAD, STEP
from experiments.cards.gpu_summary import chosen, ratio, summary_of
from experiments.cards.rows import OK
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, save

SIZE_LOOKS = ((COLORS["blue"], "o"), (COLORS["orange"], "s"), (COLORS["green"], "^"))
SIDE_LOOKS = {
    gpu_steps.FULL_NEO: (COLORS["red"], "^"),
    gpu_steps.FULL: (COLORS["orange"], "s"),
    gpu_steps.PAPER: (COLORS["purple"], "D"),
    gpu_steps.FOLDED: (COLORS["blue"], "o"),
    NO_HEAD: (GREY, "x"),
}
METHOD_LOOKS = {
    gpu_decoding.FULL: (COLORS["orange"], "s"),
    gpu_decoding.FOLDED: (COLORS["blue"], "o"),
    gpu_decoding.PAPER: (COLORS["purple"], "D"),
}
SHORT_WORDS = WORDS | {
    "cce": "CCE, all gradients",
    "cce_filtered": "CCE as shipped",
    "paper": "paper's",
    "scale_shift": "paper's, faster",
    "folded": "sees its group",
    "folded_captured": "sees its group, graph",
    "shortlist": "linear, shortlist",
}
# Captured steps were measured at one hidden size: hollow markers without a line.
PASSES: tuple[tuple[str, str, Literal["-", "--", "none"], str], ...] = (
    (FP32, EAGER, "-", "fp32"),
    (BF16, EAGER, "--", "bf16"),
    (BF16, CAPTURED, "none", "bf16, CUDA graph"),
)
DECADES, FINE = (1.0,), (1.0, 2.0, 5.0)
TIMES = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)  # of the bare backbone's


def plain_numbers(axis: Axis, subs: tuple[float, ...] = FINE) -> None:
    """Ticks of a logarithmic axis as a person writes them."""
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def draw_heads(table: pd.DataFrame, path: Path) -> None:
    """Time with its floor, and memory, of each head at each size."""
    summary = summary_of(table, gpu_heads.KEYS)
    summary = summary[summary["status"] == OK]
    methods = [method for method in SHORT_WORDS if method in set(summary["method"])]
    figure, axes = plt.subplots(2, 1, figsize=(COLUMN_INCHES, 0.6 + 0.36 * len(methods) + 0.9))
    sizes = summary[["vocabulary_size", "hidden_size"]].drop_duplicates().itertuples(index=False)
    for (vocabulary_size, hidden_size), (color, marker) in zip(sizes, SIZE_LOOKS, strict=False):
        rows = summary[(summary["vocabulary_size"] == vocabulary_size) & (summary["hidden_size"] == hidden_size)]
        places = [methods.index(method) for method in rows["method"]]
        label = f"V = {vocabulary_size:,}, D = {hidden_size:,}"
        look = {"color": color, "marker": marker, "linestyle": "none"}
        spread = [rows["median"] - rows["low"], rows["high"] - rows["median"]]
        axes[0].errorbar(rows["median"], places, xerr=spread, elinewidth=0.8, label=label, **look)
        axes[0].scatter(rows["floor_milliseconds"], places, color=color, marker="|", s=35, linewidths=1.0)
        axes[1].plot(rows["peak_above_gib"].clip(lower=1e-6), places, label=label, **look)
    for axis, title in zip(axes, ("Forward and backward (ms); bar: floor", "Peak memory (GiB)"), strict=True):
        axis.set_yticks(range(len(methods)), [SHORT_WORDS[method] for method in methods])
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel=title)
    plain_numbers(axes[0].xaxis, DECADES)
    plain_numbers(axes[1].xaxis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1)
    save(figure, path)


def draw_steps(table: pd.DataFrame, path: Path) -> None:
    """Time over the backbone alone, and memory, by hidden size."""
    summary = summary_of(table, gpu_steps.KEYS)
    figure, axes = plt.subplots(2, 1, figsize=(COLUMN_INCHES, 4.6), sharex=True)
    ticks = sorted(summary["hidden_size"].unique())
    for side, (color, marker) in SIDE_LOOKS.items():
        for precision, mode, dash, _ in PASSES:
            wanted = {"precision": precision, "mode": mode, "pass": STEP}
            rows = [chosen(summary, **wanted, side=side, hidden_size=size) for size in ticks]
            bare = [chosen(summary, **wanted, side=NO_HEAD, hidden_size=size) for size in ticks]
            shares = [ratio(one, none) for one, none in zip(rows, bare, strict=True)]
            times = [float("nan") if share is None else share[0] for share in shares]
            memory = [float("nan") if one is None else one["peak_memory_gib"] for one in rows]
            look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": dash}
            axes[0].plot(ticks, times, **look, markerfacecolor="white" if mode == CAPTURED else color)
            if mode == EAGER:
                axes[1].plot(ticks, memory, **look)
    axes[0].set_ylabel("Step's time, no head = 1")
    axes[1].set_ylabel("Peak memory (GiB)")
    axes[1].set_xlabel("Hidden size")
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        plain_numbers(axis.yaxis)
    axes[0].yaxis.set_major_locator(FixedLocator(TIMES))
    handles = [plt.Line2D([], [], color=color, marker=marker) for color, marker in SIDE_LOOKS.values()]
    handles += [
        plt.Line2D([], [], color=GREY, linestyle=dash, marker="o" if mode == CAPTURED else "", markerfacecolor="white")
        for _, mode, dash, _ in PASSES
    ]
    labels = [*(gpu_steps.WORDS[side] for side in SIDE_LOOKS), *(words for *_, words in PASSES)]
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, path)


def draw_decoding(table: pd.DataFrame, path: Path) -> None:
    """Milliseconds a token, the head alone and whole decoding, at each size and batch."""
    summary = summary_of(table, gpu_decoding.KEYS)
    summary = summary[summary["status"] == OK]
    sizes = ["vocabulary_size", "hidden_size", "batch_size"]
    keys: list[tuple[int, int, int]] = list(summary[sizes].drop_duplicates().itertuples(index=False, name=None))
    places = {key: index for index, key in enumerate(keys)}
    figure, axes = plt.subplots(2, 1, figsize=(COLUMN_INCHES, 1.5 + 0.42 * len(places)))
    for axis, work, title, subs in (
        (axes[0], gpu_decoding.HEAD, "The head's step alone (ms)", DECADES),
        (axes[1], gpu_decoding.WHOLE, "Whole decoding (ms a token)", FINE),
    ):
        for method, (color, marker) in METHOD_LOOKS.items():
            for strategy, shift, face in (("greedy", -0.15, color), ("top-p 0.9", 0.15, "white")):
                rows = summary[
                    (summary["method"] == method) & (summary["work"] == work) & (summary["strategy"] == strategy)
                ]
                heights = [places[key] + shift for key in rows[sizes].itertuples(index=False, name=None)]
                spread = [rows["median"] - rows["low"], rows["high"] - rows["median"]]
                axis.errorbar(
                    rows["median"],
                    heights,
                    xerr=spread,
                    elinewidth=0.8,
                    color=color,
                    marker=marker,
                    markerfacecolor=face,
                    linestyle="none",
                )
        axis.set_yticks(range(len(keys)), [f"V {v:,}, D {d}, batch {b}" for v, d, b in keys])
        axis.set_ylim(len(keys) - 0.5, -0.5)
        axis.set(xscale="log", xlabel=title)
        plain_numbers(axis.xaxis, subs)
    handles = [plt.Line2D([], [], color=c, marker=m, linestyle="none") for c, m in METHOD_LOOKS.values()]
    handles += [
        plt.Line2D([], [], color=GREY, marker="o", markerfacecolor=face, linestyle="none") for face in (GREY, "white")
    ]
    labels = [SHORT_WORDS[method] for method in METHOD_LOOKS]
    figure.legend(handles, [*labels, "greedy", "top-p 0.9"], loc="outside lower center", ncols=3)
    save(figure, path)
