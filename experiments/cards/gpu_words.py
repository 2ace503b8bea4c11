"""The tables of gpu.py in words, with the goals that are met."""

from __future__ import annotations

import math

import pandas as pd

from experiments.cards import card_heads, gpu_decoding, gpu_heads, gpu_simulated, gpu_steps
from experiments.cards.card_heads import CCE, CCE_FILTERED, FOLDED, PAPER
from experiments.cards.gpu_steps import BF16, CAPTURED, EAGER, FORWARD, FP32, FULL_NEO, NO_HEAD, STEP
from experiments.cards.gpu_summary import (
    chosen,
    number,
    ratio,
    ratio_words,
    reached,
    summary_of,
    time_words,
    where,
)
from experiments.cards.rows import OK
from vocabfold.machine import BYTES_PER_GIB
from vocabfold.runs.tables import RESULTS, read_rows

COST = RESULTS / "cost"
QUARTER, STEP_GOAL, MEMORY_GOAL = 0.25, 1.15, 1.1
PUBLISHED_RATIOS = {128: 3.4, 256: 3.5, 1024: 1.8}  # GPT-Neo's memory over the grouped model's


def heads_words(table: pd.DataFrame) -> str:
    """Heads alone."""
    summary = summary_of(table, gpu_heads.KEYS)
    lines = ["## Heads alone: forward and backward", ""]
    for (vocabulary_size, hidden_size), rows in summary.groupby(["vocabulary_size", "hidden_size"], sort=False):
        peer = chosen(rows, method=CCE)
        first = rows.iloc[0]
        lines += [
            f"V = {vocabulary_size:,}, D = {hidden_size:,}, N = {first['num_tokens']:,} ({first['precision']}):",
            "",
            "| head | ms (2.5 to 97.5%) | floor (ms) | time over floor | of cut-cross-entropy's time | GiB above what "
            "stood | loss (nats) |",
            "|---" * 7 + "|",
        ]
        for method, title in card_heads.WORDS.items():
            named = rows[rows["method"] == method]
            if named.empty:
                lines.append(f"| {title} | not measured | | | | | |")
                continue
            row = named.iloc[0]
            if row["status"] != OK:
                lines.append(f"| {title} | {row['status']}: {row['note']} | | | | | |".replace(": nan", ""))
                continue
            lines.append(
                f"| {title} | {time_words(row)} | {number(row['floor_milliseconds'])} "
                f"| {number(row['median'] / row['floor_milliseconds'])} | {ratio_words(ratio(row, peer))} "
                f"| {number(row['peak_above_gib'])} | {row['loss_nats']:.2f} |"
            )
        lines.append("")
    measured = summary[summary["status"] == OK]
    if len(measured):
        rate, copied = (measured[name].median() for name in ("matrix_flops_per_second", "copied_bytes_per_second"))
        lines.append(
            "The floor: the products that a head cannot do without at the matrix rate measured here "
            f"({rate / 1e12:.3g} TFLOP/s), or reading and writing hidden states, weights and gradients once at the "
            f"copy rate measured here ({copied / 1e12:.3g} TB/s), whichever takes longer. Rounds took turns, but for "
            "the full softmax, which needs most of the card alone. Targets follow Zipf's law, groups are of tokens of "
            "like frequency. Weights are random, so that cut-cross-entropy as shipped drops nearly all gradients: its "
            "time is the least it can be."
        )
        lines += ["", where(table)]
    return "\n".join([*lines, ""])


def steps_words(table: pd.DataFrame, simulated: pd.DataFrame | None) -> str:
    """Tables 2 and 3."""
    summary = summary_of(table, gpu_steps.KEYS)
    expected = None if simulated is None else summary_of(simulated, gpu_simulated.KEYS)
    lines = ["## Whole training steps and forward passes (the paper's Tables 2 and 3, measured)", ""]
    for (hidden_size, precision), rows in summary.groupby(["hidden_size", "precision"], sort=False):
        first = rows.iloc[0]
        tokens = first["batch_size"] * first["sequence_length"]
        lines += [
            f"Hidden {hidden_size:,}, {precision}, batch {first['batch_size']} x {first['sequence_length']}, "
            f"V = {first['vocabulary_size']:,}:",
            "",
            "| model | step, ms | tokens/s | over no head | forward, tokens/s | captured step, ms | over no head, "
            "captured | peak GiB | reserved GiB | simulated GiB | published GB, tokens/s |",
            "|---" * 11 + "|",
        ]
        nobody = {mode: chosen(rows, side=NO_HEAD, mode=mode, **{"pass": STEP}) for mode in (EAGER, CAPTURED)}
        for side, title in gpu_steps.WORDS.items():
            own = rows[rows["side"] == side]
            if own.empty:
                continue
            step, graph, forward = (
                one.iloc[0] if len(one := own[(own["mode"] == mode) & (own["pass"] == name)]) else None
                for mode, name in ((EAGER, STEP), (CAPTURED, STEP), (EAGER, FORWARD))
            )
            memory = own.iloc[0]  # the step's, or of a side that was captured alone the graph's
            fake = simulated_gib(memory, expected)
            lines.append(
                f"| {title} | {time_words(step)} | {speed(step, tokens)} | {ratio_words(ratio(step, nobody[EAGER]))} "
                f"| {speed(forward, tokens)} | {time_words(graph)} | {ratio_words(ratio(graph, nobody[CAPTURED]))} "
                f"| {number(memory['peak_memory_gib'])} "
                f"| {number(reserved_gib(memory))} "
                f"| {number(fake)} "
                f"| {published(side, first['hidden_size'])} |"
            )
        lines.append("")
    lines.append(
        "8 layers, 8 heads; AdamW in one pass over memory, gradients clipped. No head: the same backbone with a head "
        "that costs nothing. Captured: the step as one CUDA graph. Published memory is what an allocator reserved, and "
        "published speed is of the forward pass; the paper's code ran on other cards. Reserved: what the allocator "
        "took for this side; not told where it reused what other sides had left."
    )
    first = summary.iloc[0]
    twice = number(2 * first["batch_size"] * first["sequence_length"] * first["vocabulary_size"] / BYTES_PER_GIB)
    lines += [
        "",
        "Simulated memory follows the CPU's list of operators for autocast, by which cross_entropy takes a float32 "
        "copy of bfloat16 logits and its gradient of them is float32 too. CUDA's log_softmax reads the bfloat16 logits "
        f"and writes a bfloat16 gradient: 2 N V bytes, {twice} GiB, less at the peak of a full softmax in bf16 than is "
        "simulated. Float32, and heads that never hold N V numbers, have no such difference.",
        "",
        *over_no_head_simulated(summary, expected),
        f"Not measured: {', '.join(steps_left_out(summary)) or 'nothing of the plan'}.",
        "",
        where(table),
    ]
    return "\n".join([*lines, ""])


def over_no_head_simulated(summary: pd.DataFrame, expected: pd.DataFrame | None) -> list[str]:
    """What measured memory over no head hides, at the smallest size; no lines where nothing was simulated."""
    steps = summary[(summary["mode"] == EAGER) & (summary["pass"] == STEP) & (summary["status"] == OK)]
    cells = []
    for precision in (FP32, BF16):
        rows = steps[(steps["hidden_size"] == steps["hidden_size"].min()) & (steps["precision"] == precision)]
        gib = {row["side"]: simulated_gib(row, expected) for _, row in rows.iterrows()}
        cells += [
            f"{gpu_steps.WORDS[side]}, {precision}: {gib[side] / gib[NO_HEAD]:.2f}"
            for side in (FOLDED, gpu_steps.TIED, gpu_steps.TIED_WIDE)
            if {side, NO_HEAD} <= set(gib) and not math.isnan(gib[side] / gib[NO_HEAD])
        ]
    if not cells:
        return []
    nobody = steps[steps["side"] == NO_HEAD]
    extra = [row["peak_memory_gib"] - simulated_gib(row, expected) for _, row in nobody.iterrows()]
    return [
        f"No head ran first of each group, and its measured peak is up to {number(max(extra))} GiB above its simulated "
        "one: buffers that libraries make once and keep, which later sides found there. So measured memory over no "
        f"head flatters eager heads; simulated it is, at hidden {steps['hidden_size'].min()}, {'; '.join(cells)}.",
        "",
    ]


def steps_left_out(summary: pd.DataFrame) -> list[str]:
    """What the plan has and the table has not, in words."""
    planned = (gpu_steps.TINY_GROUPS, gpu_steps.CARD_GROUPS)
    groups = next(groups for groups in planned if set(summary["hidden_size"]) <= {group[0] for group in groups})
    wanted: dict[tuple[int, str, str], list[str]] = {}
    for hidden_size, precision, mode, sides in groups:
        wanted.setdefault((hidden_size, precision, mode), []).extend(sides)
    found = []
    for (hidden_size, precision, mode), planned_sides in wanted.items():
        same = {"hidden_size": hidden_size, "precision": precision, "mode": mode}
        missing = [gpu_steps.WORDS[side] for side in planned_sides if chosen(summary, **same, side=side) is None]
        if missing:
            words = f"hidden {hidden_size:,} {precision}{' captured' if mode == CAPTURED else ''}"
            found.append(f"{words} ({'all' if len(missing) == len(planned_sides) else '; '.join(missing)})")
    return found


def reserved_gib(row: pd.Series) -> float:
    """What the allocator reserved for this side; NaN where other sides had left it some of that."""
    reserved = float(row["reserved_memory_gib"])
    return reserved if reserved >= row["peak_memory_gib"] else math.nan


def simulated_gib(row: pd.Series, expected: pd.DataFrame | None) -> float:
    """The peak of the same step without data, of the paper's own code that of table2_memory; NaN for none."""
    if row["side"] in gpu_steps.PAPER_CODE:
        path = COST / "table2_memory.csv"
        if not path.is_file():
            return math.nan
        table = read_rows(path)
        sizes = ("hidden_size", "batch_size", "sequence_length", "vocabulary_size")
        same = {name: row[name] for name in sizes} | {"model": gpu_steps.PAPER_CODE[row["side"]]}
        found = table[table["setting"] == "paper_code"]
        for name, value in same.items():
            found = found[found[name] == value]
        return float(found["peak_memory_gib"].iloc[0]) if len(found) else math.nan
    same = {name: row[name] for name in gpu_simulated.KEYS}
    fake = None if expected is None else chosen(expected, **same)
    return math.nan if fake is None else float(fake["peak_memory_gib"])


def speed(row: pd.Series | None, tokens: int) -> str:
    """Tokens a second."""
    return "-" if row is None or pd.isna(row["median"]) else f"{1e3 * tokens / row['median']:,.0f}"


def published(side: str, hidden_size: int) -> str:
    """What the paper prints for a model, at the card with the most memory."""
    names = {"full": "gpt2", FULL_NEO: "gpt_neo", PAPER: "grouped"}
    name = names.get(side, side.removeprefix("paper_code_"))
    memory = pd.read_csv(RESULTS / "paper" / "table2_memory.csv", dtype=str)
    rates = pd.read_csv(RESULTS / "paper" / "table3_speed.csv")
    if f"{name}_gb" not in memory:
        return ""
    cells = memory[(memory["gpu"] == "L40S") & (memory["hidden_size"] == str(hidden_size))][f"{name}_gb"].tolist()
    cells += [f"{value:,}" for value in rates[rates["hidden_size"] == hidden_size][f"{name}_tokens_per_s"]]
    return ", ".join(cells)


def decoding_words(table: pd.DataFrame) -> str:
    """A head's step alone, and whole decoding."""
    summary = summary_of(table, gpu_decoding.KEYS)
    columns = [
        (work, strategy) for work in (gpu_decoding.HEAD, gpu_decoding.WHOLE) for strategy in ("greedy", "top-p 0.9")
    ]
    titles = [f"{'the head alone' if work == gpu_decoding.HEAD else 'whole decoding'}, {way}" for work, way in columns]
    lines = ["## Decoding: milliseconds a token of each text", ""]
    lines.append(
        "| V, D, batch | head | " + " | ".join(titles) + " | tokens that differ from log_prob's | entropy (nats) |"
    )
    lines.append("|---" * (4 + len(columns)) + "|")
    for (vocabulary_size, hidden_size, batch_size), rows in summary.groupby(
        ["vocabulary_size", "hidden_size", "batch_size"], sort=False
    ):
        for method in gpu_decoding.METHODS:
            own = rows[rows["method"] == method]
            if own.empty:
                size = f"{vocabulary_size:,}, {hidden_size}, {batch_size}"
                lines.append(f"| {size} | {card_heads.WORDS[method]} | not measured |" + " |" * (1 + len(columns)))
                continue
            cells = []
            for work, strategy in columns:
                row = chosen(own, work=work, strategy=strategy)
                full = chosen(rows, method="full", work=work, strategy=strategy)
                faster = "" if row is None or method == "full" else f", {ratio_words(ratio(full, row))}x"
                failed = own[(own["work"] == work) & (own["strategy"] == strategy)]
                cells.append(str(failed["status"].iloc[0]) if row is None and len(failed) else time_words(row) + faster)
            measured = own[own["status"] == OK]
            exact = "-"
            if len(measured):
                first = measured.iloc[0]
                exact = f"{first['disagreements']:.0f} of {batch_size} (at most {first['largest_gap_nats']:.1e} nats)"
            entropy = number(measured["entropy_nats"].iloc[0]) if len(measured) else "-"
            title = card_heads.WORDS[method]
            size = f"{vocabulary_size:,}, {hidden_size}, {batch_size}"
            lines.append(f"| {size} | {title} | " + " | ".join(cells) + f" | {exact} | {entropy} |")
    new_tokens = summary[summary["work"] == gpu_decoding.WHOLE]["new_tokens"].max()
    lines += [
        "",
        f"8 layers, fp32, key/value cache, {gpu_decoding.PROMPT_TOKENS} tokens of prompt and {new_tokens:.0f} new ones "
        "(the prompt's pass is in the time); "
        "random weights. x: how many times as fast as the full softmax.",
        "",
        where(table),
    ]
    return "\n".join([*lines, ""])


def goals_words(tables: dict[str, pd.DataFrame]) -> str:
    """Which goals are met."""
    lines = ["## Goals", ""]
    if "heads" in tables:
        lines += head_goals(summary_of(tables["heads"], gpu_heads.KEYS))
    if "steps" in tables:
        lines += step_goals(summary_of(tables["steps"], gpu_steps.KEYS))
    if "decoding" in tables:
        rows = tables["decoding"][tables["decoding"]["status"] == OK].drop_duplicates(list(gpu_decoding.KEYS))
        worst = rows["largest_gap_nats"].max()
        lines.append(f"* greedy tokens are those of the head's own log_prob, but for gaps of at most {worst:.1e} nats")
    return "\n".join([*lines, ""])


def head_goals(summary: pd.DataFrame) -> list[str]:
    """Against cut-cross-entropy, at the first of the sizes that were measured."""
    lines = []
    sizes = [*gpu_heads.SIZES[:1], *zip(summary["vocabulary_size"], summary["hidden_size"], strict=True)]
    size = next(size for size in sizes if len(summary[summary["vocabulary_size"] == size[0]]))
    rows = summary[(summary["vocabulary_size"] == size[0]) & (summary["hidden_size"] == size[1])]
    own = chosen(rows, method=FOLDED)
    for method in (CCE, CCE_FILTERED):
        peer = chosen(rows, method=method)
        share = ratio(own, peer)
        time = f"{ratio_words(share)} of its time (goal {QUARTER}: {reached(share and share[0], QUARTER)})"
        memory = None if own is None or peer is None else float(own["peak_above_gib"] / peer["peak_above_gib"])
        room = f"{'-' if memory is None else number(memory)} of its memory (goal 1: {reached(memory, 1.0)})"
        pair = f"{card_heads.WORDS[FOLDED]}, beside {card_heads.WORDS[method]}"
        lines.append(f"* {pair} at V = {size[0]:,}, D = {size[1]:,}: {time}, {room}")
    return lines


def step_goals(summary: pd.DataFrame) -> list[str]:
    """Against the backbone alone, and the published ratios."""
    lines = []
    smallest = summary["hidden_size"].min()
    for precision in (FP32, BF16):
        for mode in (EAGER, CAPTURED):
            for side in (FOLDED, gpu_steps.TIED, gpu_steps.TIED_WIDE):
                wanted = {"hidden_size": smallest, "precision": precision, "mode": mode, "pass": STEP}
                own, nobody = (chosen(summary, **wanted, side=name) for name in (side, NO_HEAD))
                share = ratio(own, nobody)
                memory = None if own is None or nobody is None else own["peak_memory_gib"] / nobody["peak_memory_gib"]
                if share is None or memory is None:
                    continue
                lines.append(
                    f"* {gpu_steps.WORDS[side]} over no head at hidden {smallest}, {precision}, {mode}: time "
                    f"{ratio_words(share)} (goal {STEP_GOAL}: {reached(share[0], STEP_GOAL)}), memory {memory:.2f} "
                    f"(goal {MEMORY_GOAL}: {reached(memory, MEMORY_GOAL)})"
                )
    for neo, grouped, title in (
        (FULL_NEO, PAPER, "lean models"),
        ("paper_code_gpt_neo", "paper_code_grouped", "the paper's code"),
    ):
        for hidden_size, printed in PUBLISHED_RATIOS.items():
            wanted = {"hidden_size": hidden_size, "precision": FP32, "mode": EAGER, "pass": STEP}
            rows = [chosen(summary, **wanted, side=side) for side in (neo, grouped)]
            if rows[0] is None or rows[1] is None:
                continue
            allocated, held = (rows[0][name] / rows[1][name] for name in ("peak_memory_gib", "reserved_memory_gib"))
            verdict = "reached" if max(allocated, held) >= printed else "not reached"
            lines.append(
                f"* GPT-Neo's memory over the grouped model's at hidden {hidden_size:,}, {title}: {allocated:.1f} "
                f"allocated, {held:.1f} reserved (published {printed}: {verdict})"
            )
    return lines
