"""The tables of caching in words: speed, memory and perplexity by cache, the goals, and the guide's claims."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.study.figures import COLORS
from vocabfold.measure.speed import Ratio, ratio_summary

LIBRARIES = {"vocabfold": (COLORS["blue"], "o"), "transformers": (COLORS["orange"], "s")}
RUN = ["corpus", "hidden_size", "num_layers", "head", "tokens"]
WORKLOAD = ["workload", "prompt_tokens", "new_tokens"]
SHORT, LONG = ("distinct", 32, 64), ("distinct", 448, 64)
REPEATED, SHARED = ("repeated", 448, 64), ("shared beginning", 512, 1)
FULL = ("distinct", 510, 2)  # of the memory table
FASTER_CLAIM, LEANER_CLAIM = 1.25, 0.70  # the guide's "up to 25% faster inference" and "up to 30% less memory"
FIRST_TOKEN_GOAL = 5.0
BYTES_GOAL = 0.52  # of bfloat16's bytes: half, and the scales
PERPLEXITY_GOAL = 0.005


def rows_of(table: pd.DataFrame, key: tuple[str, int, int]) -> pd.DataFrame:
    """The rows of one workload."""
    return table[(table[WORKLOAD] == pd.Series(key, WORKLOAD)).all(axis=1)]


def seconds_of(rows: pd.DataFrame, library: str, column: str = "seconds") -> dict[str, list[float]]:
    """Seconds of every round of each cache of one library."""
    own = rows[rows["library"] == library]
    return {
        str(cache): of_cache.sort_values("round")[column].tolist()
        for cache, of_cache in own.groupby("cache", sort=False)
    }


def words(ratio: Ratio) -> str:
    """As in 1.23 (1.20 to 1.31)."""
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def speed_table(table: pd.DataFrame, key: tuple[str, int, int]) -> str:
    """One line a library and cache."""
    rows = rows_of(table, key)
    name, prompt_tokens, new_tokens = key
    shared = int(rows["shared_tokens"].iloc[0])
    lines = [
        f"**{name}**: prompts of {prompt_tokens} tokens, {shared} of them read before; {new_tokens} new tokens",
        "",
        "| library, cache | new tokens/s | speed, no cache = 1 | speed, key/value = 1 | first token (ms) "
        "| kept between answers (MiB) | tokens as without cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in rows["library"].unique():
        seconds = seconds_of(rows, library)
        first_seconds = seconds_of(rows, library, "seconds_to_first_token")
        for cache, values in seconds.items():
            row = rows[(rows["library"] == library) & (rows["cache"] == cache)].iloc[0]
            to_none = words(ratio_summary(seconds, "none", cache)) if "none" in seconds else "-"
            lines.append(
                f"| {library}, {cache} | {new_tokens / np.median(values):,.0f} | {to_none} "
                f"| {words(ratio_summary(seconds, 'key/value', cache))} | {1e3 * np.median(first_seconds[cache]):.1f} "
                f"| {row['kept_between_answers_mib']:.2f} | {row['same_tokens_share']:.0%} |"
            )
    return "\n".join(lines)


def memory_table(memory: pd.DataFrame) -> str:
    """Peak memory of one answer at a full context, one line a library and cache."""
    lines = [
        "| library, cache, prompt | peak memory (MiB) | of it above the weights | of it kept between answers |",
        "|---|---|---|---|",
    ]
    for _, row in memory.iterrows():
        above = row["peak_memory_mib"] - row["weights_mib"]
        lines.append(
            f"| {row['library']}, {row['cache']}, {row['workload']} | {row['peak_memory_mib']:.2f} | {above:.2f} "
            f"| {row['kept_between_answers_mib']:.2f} |"
        )
    return "\n".join([*lines, "", "Peak while a prompt of 510 tokens is answered with 2 more, the second answer."])


def perplexity_table(kinds: pd.DataFrame) -> str:
    """What rounding costs and saves, one line a run and kind."""
    lines = [
        "| run | keys and values | bytes a position | of bf16's | loss (nats) | perplexity | change of perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, rows in kinds.groupby(RUN, sort=False):
        half = rows.loc[rows["key_values"] == "bf16", "bytes_a_position"].iloc[0]
        for _, row in rows.iterrows():
            low, change, high = perplexity_change(row)
            interval = "" if np.isnan(low) else f" ({low:+.4%} to {high:+.4%})"
            lines.append(
                f"| {row['corpus']}, hidden {row['hidden_size']}, {row['num_layers']} layers, head={row['head']}, "
                f"{row['tokens'] / 1e6:.2f} M tokens "
                f"| {row['key_values']} | {row['bytes_a_position']:,.0f} | {row['bytes_a_position'] / half:.3f} "
                f"| {row['validation_loss_nats']:.5f} | {row['perplexity']:.3f} "
                f"| {change:+.4%}{interval} |"
            )
    lines += ["", "Whole validation set, read through the cache 64 tokens at a time; 95% intervals over its rows."]
    lines.append(
        "The last line of a run is the control: what its model loses that forgets the past instead of rounding it."
    )
    return "\n".join(lines)


def perplexity_change(row: pd.Series) -> tuple[float, float, float]:
    """The ratio to the exact cache's perplexity less 1, with its 95% interval: (low, change, high)."""
    change, half_width = row["loss_change_nats"], row["loss_change_half_width_nats"]
    return float(np.expm1(change - half_width)), float(np.expm1(change)), float(np.expm1(change + half_width))


def goals(table: pd.DataFrame, kinds: pd.DataFrame) -> str:
    """What was aimed at, what came out, met or not."""
    first_seconds = seconds_of(rows_of(table, SHARED), "vocabfold", "seconds_to_first_token")
    sooner = ratio_summary(first_seconds, "key/value", "prefix")
    lines = [
        f"* {met(sooner.median >= FIRST_TOKEN_GOAL)}: first token at 448 shared tokens of 512 at least "
        f"{FIRST_TOKEN_GOAL:.0f} times sooner with the prefix cache: {words(sooner)} times"
    ]
    for _, rows in kinds.groupby(RUN, sort=False):
        half = rows[rows["key_values"] == "bf16"].iloc[0]
        row = rows[rows["key_values"] == "int8"].iloc[0]
        share = float(row["bytes_a_position"] / half["bytes_a_position"])
        low, change, high = perplexity_change(row)
        run = f"hidden {row['hidden_size']}, head={row['head']}"
        forgetful = rows[rows["loss_change_half_width_nats"].isna()]
        control = "".join(
            f"; a weak test where forgetting matters little: {other['key_values']} changes it by "
            f"{np.expm1(other['loss_change_nats']):+.2%}"
            for _, other in forgetful.iterrows()
        )
        lines += [
            f"* {met(share <= BYTES_GOAL)}: int8 takes half the bytes of bf16 (at most {BYTES_GOAL}, scales counted): "
            f"{share:.3f} ({run})",
            f"* {met(max(abs(low), abs(high)) < PERPLEXITY_GOAL)}: int8 changes perplexity by less than "
            f"{PERPLEXITY_GOAL:.1%}: {change:+.4%} ({low:+.4%} to {high:+.4%}; {run}){control}",
        ]
    return "\n".join(["Goals", "", *lines])


def met(is_met: bool) -> str:
    """In words."""
    return "met" if is_met else "**not met**"


def verdicts(table: pd.DataFrame, memory: pd.DataFrame) -> str:
    """The guide's two claims against what was measured."""
    lines = ["The guide's claims", ""]
    for library in LIBRARIES:
        lines += faster(table, library) + leaner(memory, library)
    lines.append(combined(table))
    return "\n".join(lines)


def faster(table: pd.DataFrame, library: str) -> list[str]:
    """ "Up to 25% faster inference", for the caches of one library."""
    if library not in set(table["library"]):
        return []
    parts = []
    for key in (SHORT, LONG):
        against_none = speed_ups(table, library, key)
        slow = [f"{cache} {ratio:.2f}" for cache, ratio in against_none.items() if ratio < FASTER_CLAIM]
        lowest, highest = min(against_none.values()), max(against_none.values())
        missing = f"; below 1.25: {', '.join(slow)}" if slow else ", each more than the claim"
        parts.append(f"{lowest:.2f} to {highest:.2f} times with prompts of {key[1]}{missing}")
    lines = [f"* {library}, 25% faster than without a cache, on prompts not seen before: " + "; ".join(parts) + "."]
    for key, when in ((LONG, "unseen prompts of 448"), (REPEATED, "the same prompt of 448 again")):
        seconds = seconds_of(rows_of(table, key), library)
        others = [cache for cache in seconds if cache not in ("none", "key/value")]
        parts = [f"{cache} {words(ratio_summary(seconds, 'key/value', cache))}" for cache in others]
        lines.append(f"* {library}, speed beside a plain key/value cache, {when}: {'; '.join(parts)}.")
    return lines


def leaner(memory: pd.DataFrame, library: str) -> list[str]:
    """ "Up to 30% less memory", for the caches of one library."""
    rows = unseen(memory, library)
    if rows.empty:
        return []
    lines = []
    for base in ("none", "key/value"):
        whole, above = memory_shares(rows, base)
        parts = [f"{cache} {whole[cache]:.3f} ({above[cache]:.2f})" for cache in rows.index if cache != base]
        leanest = [str(cache) for cache in rows.index if whole[cache] <= LEANER_CLAIM]
        reached = f"30% less is reached by {', '.join(leanest)}" if leanest else "none needs 30% less"
        name = "no cache" if base == "none" else "a plain key/value cache"
        lines.append(
            f"* {library}, peak memory beside {name} at a full context of 512, in brackets above the weights alone: "
            f" {', '.join(parts)}; {reached}."
        )
    return lines


def speed_ups(table: pd.DataFrame, library: str, key: tuple[str, int, int]) -> dict[str, float]:
    """Median speed of each cache of one library on one workload, that without a cache being 1."""
    seconds = seconds_of(rows_of(table, key), library)
    return {cache: ratio_summary(seconds, "none", cache).median for cache in seconds if cache != "none"}


def unseen(memory: pd.DataFrame, library: str) -> pd.DataFrame:
    """The memory of each cache of one library, by cache, on prompts not seen before."""
    return memory[(memory["library"] == library) & (memory["workload"] == "distinct")].set_index("cache")


def memory_shares(rows: pd.DataFrame, base: str) -> tuple[pd.Series, pd.Series]:
    """(whole peak, peak above the weights) of each cache, those of the cache ``base`` being 1."""
    above = rows["peak_memory_mib"] - rows["weights_mib"]
    return rows["peak_memory_mib"] / rows["peak_memory_mib"][base], above / above[base]


def combined(table: pd.DataFrame) -> str:
    """The guide's last step."""
    rows = table[(table["library"] == "vocabfold") & (table["cache"] == "all coded")]
    long = rows_of(rows, LONG).iloc[0]
    exact = rows_of(table[table["cache"] == "all exact"], LONG).iloc[0]
    return (
        "* Coding and caching combined (all coded: int8 keys and values, beginnings kept as the same int8 rows, "
        f"answers deflated on disk): {long['kept_between_answers_mib']:.2f} MiB of beginnings where exact ones take "
        f"{exact['kept_between_answers_mib']:.2f}, and {long['answer_bytes_a_token']:.2f} bytes an answered token on "
        "disk, its file's 38 bytes included, where int64 takes 8 and uint16 takes 2: greedy text of a small model "
        "repeats itself, which deflating likes."
    )
