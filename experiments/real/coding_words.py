"""What real_coding measured, in words."""

from __future__ import annotations

import math

import pandas as pd

PROBED_STEPS = 4


def speed_cells(speeds: pd.DataFrame | None, coder: str) -> str:
    """Encoding and decoding in kB a second: two cells."""
    cells = []
    for direction in ("encode", "decode"):
        of = speeds[(speeds["coder"] == coder) & (speeds["direction"] == direction)] if speeds is not None else None
        rate = (of["bytes"] / of["seconds"] / 1e3).median() if of is not None and len(of) else math.nan
        cells.append("" if math.isnan(rate) else f"{rate:,.2f}" if rate < 100 else f"{rate:,.0f}")
    return " | ".join(cells)


def markdown(table: pd.DataFrame, speeds: pd.DataFrame | None) -> str:
    """Every coder on every text."""
    lines = [
        "| text | coder | bits a byte | with the model's bytes | the model's own | of the whole file | encode (kB/s) "
        "| decode (kB/s) |"
    ]
    lines.append("|---" * 8 + "|")
    for text, rows in table.groupby("text", sort=False):
        for _, row in rows.sort_values("bits_per_byte").iterrows():
            own = "" if pd.isna(row["own_bits_per_byte"]) else f"{row['own_bits_per_byte']:.3f}"
            whole = "" if pd.isna(row["whole_bytes"]) else f"{8 * row['whole_coded_bytes'] / row['whole_bytes']:.3f}"
            deflated = " (deflated: shorter than its own code)" if is_deflated(row) else ""
            lines.append(
                f"| {text}, {row['bytes']:,} bytes | {row['coder']}{deflated} | {row['bits_per_byte']:.3f} "
                f"| {row['bits_per_byte_with_model']:,.3f} | {own} | {whole} | {speed_cells(speeds, row['coder'])} |"
            )
    first, told = words_of(table)
    text = "Both directions of a model compute on one thread, whatever number they are given, since one changed "
    text += "integer of a code ends it. "
    if changed := first["integers_changed_by_threads"]:
        text += f"On two threads {changed:.1%} of {first['coder']}'s are others. "
    else:
        text += f"On two threads none of {first['coder']}'s was another in {PROBED_STEPS} steps here; nothing promises "
        text += "that of longer texts and other machines. "
    text += "Whether these texts or some like them were among what it was trained on is not known."
    lines += ["", *told, "", text]
    return "\n".join([*lines, f"Hardware: {first['hardware']}; torch {first['torch']}.", ""])


def is_deflated(row: pd.Series) -> bool:
    """Whether a model's file holds DEFLATE's code instead: no code of its own is below its cross entropy."""
    return bool(row["bits_per_byte"] < row["own_bits_per_byte"])


def words_of(table: pd.DataFrame) -> tuple[pd.Series, list[str]]:
    """(A row of the real model, bullets on what the table says of it and of our own small models)."""
    is_ours = table.reindex(columns=["trained_run"])["trained_run"].notna()
    general, ours = table[table["model_bytes"] == 0], table[is_ours]
    real = table[(table["model_bytes"] > 0) & ~is_ours].set_index("text")
    best = general.groupby("text")["coded_bytes"].min()
    saved = 1 - real["coded_bytes"] / best
    excess = real["coded_bytes"] - real["own_bits_per_byte"] * real["bytes"] / 8
    whole = (8 * general["whole_coded_bytes"] / general["whole_bytes"]).groupby(general["text"]).min()
    ahead = whole - real["bits_per_byte"]
    first = real.iloc[0]
    megabytes = 8 * first["model_bytes"] / ahead[ahead > 0] / 1e6
    lines = [
        f"* {first['coder']} takes {span(saved, '.0%')} fewer bytes than the best of the general compressors, its own "
        f"{first['model_bytes'] / 1e6:.0f} MB left out. These gain from longer texts: where they code the whole file, "
        f"the best takes {span(ahead, '.2f')} bits a byte more than the model takes of the beginning. At that rate the "
        f"model's bytes are won back after about {span(megabytes, ',.0f')} MB of text.",
        f"* Its files are {span(excess, '.0f')} bytes above its cross entropy, most of them the header and the coder's "
        "states, which do not grow with a text.",
    ]
    if len(ours):
        parts = []
        for name, rows in ours.groupby("text", sort=False):
            text = str(name)
            shortest = rows.sort_values("coded_bytes").iloc[0]
            size, coder = shortest["model_bytes"] / 1e6, shortest["coder"].removeprefix("ours: ")
            of_best, of_real = shortest["coded_bytes"] / best[text], shortest["coded_bytes"] / real["coded_bytes"][text]
            parts.append(f"{text} {of_best:.2f} ({of_real:.2f}; {coder}, {size:.0f} MB)")
        lines.append(
            "* The shortest code of our own small models, the best general compressor = 1 (in brackets the real model "
            f"= 1): {'; '.join(parts)}."
        )
    threads = " and ".join(str(first["decoded_with_threads"]).split())
    lines.append(f"* Every model's codes were decoded in other processes on {threads} threads: the same bytes.")
    return first, lines


def span(values: pd.Series, form: str) -> str:
    """The least and the largest of some numbers in words, once where they read the same."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (values.min(), values.max())))
