"""What the heads of arXiv 2411.06371 cost: Tables 2 and 3, the left half of Figure 3, growth with the vocabulary."""

from __future__ import annotations

import math

import pandas as pd

from experiments.claims.base import (
    Check,
    Claim,
    Finding,
    at_least,
    at_most,
    fixed,
    measured,
    published_extreme,
    reference,
    rows_where,
)
from experiments.claims.card import (
    COMMAND,
    card_memory,
    card_name,
    card_speed_ups,
    card_steps,
    forward_tokens_per_second,
)
from experiments.heads.training_sides import FULL as FULL_STEP
from experiments.heads.training_sides import SCALE_SHIFT
from experiments.heads.vocabulary_cost import growth, medians
from experiments.paper.figure3_group_size import VOCABULARY_SIZE, compare_memory
from experiments.paper.paper_tables import MODELS
from experiments.paper.table2_memory import SETTINGS, agreeing_cells, peaks, saving
from experiments.paper.table3_speed import PASSES, seconds_of
from experiments.study.statistics import summarise
from vocabfold.errors import UserError
from vocabfold.machine import BYTES_PER_GIB
from vocabfold.measure.speed import ratio_summary, tokens_per_second
from vocabfold.runs.tables import read_table

SMALLEST = 128  # the hidden size of the headline numbers
SPEED_UP = 3.0  # the headline
BYTES_PER_NUMBER = 4
ROUNDING = 0.015  # of a printed number with two or three figures
NEAR_FACTOR = 2.0  # group sizes are on a log axis
SAME_SHAPE = 0.9  # correlation of two curves
NEAR_LEAST = 1.05  # times the least memory
SQUARE_ROOT, LINEAR = 0.5, 1.0  # published growth with V: of S + G, and of V
EXPONENT = 0.15  # how far a fitted exponent may lie from it
PAPER_HEAD, FULL = "scale_shift_bpe", "full"


def published_saving(hidden_size: int) -> float:
    """GPT-Neo's memory over the grouped model's where both fit."""
    rows = reference("table2_memory")
    rows = rows[(rows["hidden_size"] == hidden_size) & (rows["gpt_neo_gb"] != "oom") & (rows["grouped_gb"] != "oom")]
    row = rows.iloc[0]
    return float(row["gpt_neo_gb"]) / float(row["grouped_gb"])


def simulated_peaks() -> tuple[pd.Series, pd.DataFrame]:
    """(GiB by setting, model and hidden size; the whole table)."""
    columns = ("setting", "model", "hidden_size", "batch_size", "sequence_length", "peak_memory_gib", "parameters_gib")
    table = measured("cost", "table2_memory", "python -m experiments table2_memory measure", columns)
    return peaks(table), table


def memory_saving(_: str) -> Finding:
    """The headline of Table 2."""
    peak, _table = simulated_peaks()
    bound = round(published_saving(SMALLEST), 1)
    return Finding(
        tuple(
            at_least(f"hidden {SMALLEST}, {title}", saving(peak, setting, SMALLEST), bound, "{:.1f}x", f"{title} {{}}")
            for setting, title in SETTINGS.items()
        )
    )


def memory_on_a_card(_: str) -> Finding:
    """The saving on one card, at every published size that was measured there."""
    steps = card_steps()
    checks = []
    for size in sorted(set(steps["hidden_size"])):
        if (gib := card_memory(steps, size)) is not None:
            bound = round(published_saving(size), 1)
            found = f"hidden {size}: {gib['gpt_neo']:.2f} over {gib['grouped']:.2f} GiB, {{}}"
            checks.append(at_least(f"hidden {size}", gib["gpt_neo"] / gib["grouped"], bound, "{:.1f}x", found))
    if not checks:
        raise UserError(f"no size of results/cards/gpu_steps.csv has all three models: run {COMMAND} again")
    return Finding(tuple(checks))


def measured_memory(corpus: str) -> Finding:
    """The saving of the runs, GPT-Neo's backbone under both heads."""
    table = read_table("main_comparison", corpus)
    rows = rows_where(table, f"results/{corpus}/main_comparison.csv", model="gpt_neo")
    means = summarise(rows, ["head"], "peak_memory_gib").set_index("head")["mean"]
    for head in ("full", "paper"):
        rows_where(rows, f"results/{corpus}/main_comparison.csv", head=head)
    ratio = means["full"] / means["paper"]
    sizes = ", ".join(str(size) for size in sorted(rows["hidden_size"].unique()))
    found = f"hidden {sizes}: {means['full']:.3f} over {means['paper']:.3f} GiB, {{}}"
    return Finding((at_least("full over grouped", ratio, round(published_saving(SMALLEST), 1), "{:.1f}x", found),))


def cells(_: str) -> Finding:
    """All of Table 2: which model fits on which card."""
    peak, _table = simulated_peaks()
    checks = []
    for setting, title in SETTINGS.items():
        agree, total = agreeing_cells(reference("table2_memory"), peak, setting)
        checks.append(
            Check(f"{title}: every cell fits or fails as published", f"{title} {agree} of {total}", agree == total)
        )
    return Finding(tuple(checks))


def parameter_counts(_: str) -> Finding:
    """The model sizes of Table 2, from the bytes of the parameters of GPT-2."""
    millions = parameter_millions("lean", "gpt2")
    printed = reference("table2_memory").drop_duplicates("hidden_size").set_index("hidden_size")["model_size_m"]
    sizes = [int(size) for size in printed.index]
    return Finding(tuple(as_printed(f"hidden {size}", millions[size], printed[size], "M") for size in sizes))


def parameter_millions(setting: str, model: str) -> pd.Series:
    """Parameters in millions by hidden size."""
    _peak, table = simulated_peaks()
    rows = rows_where(table, "table2_memory.csv", setting=setting, model=model, batch_size=32, sequence_length=512)
    return rows.set_index("hidden_size")["parameters_gib"] * BYTES_PER_GIB / BYTES_PER_NUMBER / 1e6


def is_printed(ours: float, printed: float) -> bool:
    """Whether they differ by rounding alone."""
    return abs(ours / printed - 1) <= ROUNDING


def as_printed(name: str, ours: float, printed: float, unit: str) -> Check:
    """Whether a recomputed number is the printed one but for rounding."""
    asked = f"{name}: {printed:g} {unit}, within {ROUNDING:.1%}"
    return Check(asked, f"{name}: {ours:.4g} {unit}", is_printed(ours, printed))


def speed_columns() -> pd.DataFrame:
    """Table 3's measured rounds."""
    columns = ("setting", "model", "hidden_size", "pass", "round", "seconds", "tokens")
    return measured("cost", "table3_speed", "python -m experiments table3_speed measure", columns)


def speed_up(_: str) -> Finding:
    """The headline of Table 3: the grouped model against GPT-2."""
    table = speed_columns()
    checks = []
    for setting in table["setting"].unique():
        rows = rows_where(table, "table3_speed.csv", setting=setting, hidden_size=SMALLEST)
        for part, words in PASSES.items():
            ratio = ratio_summary(seconds_of(rows, part), "gpt2", "grouped")
            name = f"{SETTINGS[setting]}, {words}"
            found = f"{name} {{}} ({ratio.low:.2f} to {ratio.high:.2f})"
            checks.append(at_least(f"{name}, hidden {SMALLEST}", ratio.median, SPEED_UP, "{:.2f}x", found))
    return Finding(tuple(checks))


def speed_on_a_card(_: str) -> Finding:
    """The same on one card."""
    checks = []
    for words, (median, low, high) in card_speed_ups(card_steps(), SMALLEST):
        found = f"{words} {{}} ({low:.2f} to {high:.2f})"
        checks.append(at_least(f"{words}, hidden {SMALLEST}", median, SPEED_UP, "{:.2f}x", found))
    return Finding(tuple(checks))


def speed_in_training(corpus: str) -> Finding:
    """The paper's head against the full softmax in one interleaved run at the size of its own training runs."""
    table = measured(
        corpus, "heads_cost", "python -m experiments heads_cost measure", ("method", "seconds", "hidden_size")
    )
    seconds = {str(method): rows["seconds"].tolist() for method, rows in table.groupby("method")}
    ratio = ratio_summary(seconds, FULL, PAPER_HEAD)
    found = f"hidden {table['hidden_size'].iloc[0]}: {{}} ({ratio.low:.2f} to {ratio.high:.2f})"
    return Finding((at_least("grouped over full softmax, whole steps", ratio.median, SPEED_UP, "{:.2f}x", found),))


def absolute_speed(_: str) -> Finding:
    """The tokens a second of Table 3, which are those of the paper's code on a card."""
    table = speed_columns()
    if table["torch"].str.contains("+cpu", regex=False).all():
        return Finding(untestable=f"the paper's code was not measured on a card; {lean_speeds_on_a_card()}")
    rows = table[table["setting"] == "paper_code"]
    checks = []
    for _row, printed in reference("table3_speed").iterrows():
        of_size = rows[rows["hidden_size"] == printed["hidden_size"]]
        for model, values in seconds_of(of_size, "training step").items():
            speed = tokens_per_second(values, int(of_size["tokens"].iloc[0]))
            name = f"{MODELS[model]}, {printed['hidden_size']:.0f}"
            checks.append(at_least(f"{name}, tokens/s", speed, printed[f"{model}_tokens_per_s"], "{:,.0f}"))
    return Finding(tuple(checks))


def lean_speeds_on_a_card() -> str:
    """How many tokens a second this project's models have there, forward only as published."""
    steps = card_steps()
    words = []
    for _, printed in reference("table3_speed").iterrows():
        size = int(printed["hidden_size"])
        for model, title in MODELS.items():
            if (speed := forward_tokens_per_second(steps, model, size)) is not None:
                times = speed / printed[f"{model}_tokens_per_s"]
                words.append(f"{title}, {size}: {speed:,.0f}, {times:.1f} times the published")
    return f"our models on {card_name(steps)}, forward only: {'; '.join(words)}; ratios are compared instead"


def flops(_: str) -> Finding:
    """Table 3's counts, under the rule that gives most of them."""
    columns = ("model", "hidden_size", "published_convention_gmacs")
    table = measured("cost", "table3_flops", "python -m experiments table3_speed measure", columns)
    printed = reference("table3_speed").set_index("hidden_size")
    return Finding(
        tuple(
            as_printed(
                f"{MODELS[row['model']]}, {row['hidden_size']}",
                row["published_convention_gmacs"],
                printed.loc[row["hidden_size"], f"{row['model']}_gflops"],
                "G",
            )
            for _, row in table.iterrows()
        )
    )


def basin(_: str) -> Finding:
    """Figure 3, left, at the published batch."""
    found = compare_memory()
    least, printed = float(found.ours["group_size"]), float(found.published["group_size"])
    root = math.sqrt(VOCABULARY_SIZE)
    at_root = found.curve.iloc[(found.curve["group_size"] / root).map(math.log).abs().argmin()]
    return Finding((
        at_most("place of the least memory, as a factor from the published", max(least / printed, printed / least),
                NEAR_FACTOR, "{:.2f}", f"least at S = {least:,.0f}, {found.ours['mean']:.3f} GiB, factor {{}}"),
        at_least("correlation with the published points", found.correlation, SAME_SHAPE, "{:.3f}", "correlation {}"),
        at_most(f"memory at S = sqrt V over the least (S = {at_root['group_size']:,.0f})",
                at_root["mean"] / found.ours["mean"], NEAR_LEAST, "{:.3f}", "at sqrt V over the least {}"),
    ))  # fmt: skip


def cost_grows_slowly(_: str) -> Finding:
    """What the head costs as the vocabulary grows."""
    columns = ("method", "vocabulary_size", "fits", "head_seconds")
    table = measured("cost", "vocabulary_cost", "python -m experiments vocabulary_cost measure", columns)
    for head in (SCALE_SHIFT, FULL_STEP):
        rows_where(table, "results/cost/vocabulary_cost.csv", method=head)
    grouped, full = (growth(medians(table, head, "head_seconds")) for head in (SCALE_SHIFT, FULL_STEP))
    return Finding((
        at_most("exponent of the grouped head's time", grouped[0], SQUARE_ROOT + EXPONENT, "{:.2f}",
                f"grouped V^{{}} ± {grouped[1]:.2f}"),
        at_least("exponent of the full softmax's time", full[0], LINEAR - EXPONENT, "{:.2f}",
                 f"full V^{{}} ± {full[1]:.2f}"),
    ))  # fmt: skip


def published_speeds() -> str:
    """The ratios of Table 3 at the smallest size."""
    row = reference("table3_speed").set_index("hidden_size").loc[SMALLEST]
    ratios = [row["grouped_tokens_per_s"] / row[f"{model}_tokens_per_s"] for model in ("gpt2", "gpt_neo")]
    return f"{SPEED_UP:g}x; Table 3 has {ratios[0]:.2f}x of GPT-2 and {ratios[1]:.2f}x of GPT-Neo"


def printed_values(table: str, columns: list[str]) -> str:
    """A column of a published table, once a size."""
    rows = reference(table).drop_duplicates("hidden_size")
    return "; ".join(", ".join(f"{value:g}" for value in rows[column]) for column in columns)


TABLE2, GROUP_SIZES, COMPARISON, GROWTH = (
    tuple(f"{name}{suffix}" for suffix in (".png", ".md", ".csv"))
    for name in (
        "cost/table2_memory",
        "{corpus}/figure3_group_size",
        "{corpus}/main_comparison",
        "cost/vocabulary_cost",
    )
)
TABLE3 = ("cost/table3_speed.md", "cost/table3_speed.csv", "cost/table3_flops.csv", "paper/audit.md")
CARD = ("cards/gpu_steps.png", "cards/gpu.md", "cards/gpu_steps.csv")
SIMULATE, TIME = "`python -m experiments table2_memory measure`", "`python -m experiments table3_speed measure`"
CLAIMS = (
    Claim("abstract, Table 2", "The grouped head needs 3.4 times less training memory than GPT-Neo (simulated)",
          lambda: f"{published_saving(SMALLEST):.1f}x at hidden {SMALLEST}", memory_saving, TABLE2, SIMULATE),
    Claim("abstract, Table 2", "The same, measured in training runs on this text",
          lambda: f"{published_saving(SMALLEST):.1f}x at hidden {SMALLEST}", measured_memory, COMPARISON,
          "`make paper CORPUS={corpus}`"),
    Claim("abstract, Table 2", "The same, measured on one card (our models)",
          lambda: f"{published_saving(SMALLEST):.1f}x at hidden {SMALLEST}", memory_on_a_card, CARD, f"`{COMMAND}`"),
    Claim("Table 2", "Which of the models fits on which card",
          lambda: f"{len(MODELS) * len(reference('table2_memory'))} cells", cells, TABLE2, SIMULATE),
    Claim("Table 2", "Parameters (millions) at hidden 128, 256, 1024, 2048",
          lambda: printed_values("table2_memory", ["model_size_m"]), parameter_counts,
          (*TABLE2, "paper/audit.md"), SIMULATE),
    Claim("abstract, Table 3", "The grouped head trains 3 times as many tokens a second as GPT-2",
          published_speeds, speed_up, TABLE3, TIME),
    Claim("abstract, Table 3", "The same, measured on one card (our models)",
          published_speeds, speed_on_a_card, CARD, f"`{COMMAND}`"),
    Claim("abstract, Table 3", "The same at the size trained here, the paper's head against the full softmax",
          published_speeds, speed_in_training, ("{corpus}/heads_pareto.md", "{corpus}/heads_cost.csv"),
          "`python -m experiments heads_cost measure`"),
    Claim("Table 3", "Tokens a second of GPT-2, GPT-Neo and grouped at hidden 128, 256, 1024",
          lambda: printed_values("table3_speed", [f"{model}_tokens_per_s" for model in MODELS]),
          absolute_speed, (*TABLE3, *CARD[1:]), TIME),
    Claim("Table 3", "GFLOPs of GPT-2, GPT-Neo and grouped at hidden 128, 256, 1024",
          lambda: printed_values("table3_speed", [f"{model}_gflops" for model in MODELS]), flops, TABLE3, TIME),
    Claim("Figure 3, left", "Training memory is least near S = G = sqrt V (simulated at the published batch)",
          lambda: published_extreme("figure3_memory", "memory_gb", False, "GB"), basin,
          (*GROUP_SIZES[:2], "cost/figure3_simulated_memory.csv"),
          "`python -m experiments figure3_simulated_memory measure`"),
    Claim("method", "The head's cost grows as sqrt V, that of the full softmax as V",
          fixed("S + G = 2 sqrt V against V"), cost_grows_slowly, GROWTH,
          "`python -m experiments vocabulary_cost measure`"),
)  # fmt: skip
