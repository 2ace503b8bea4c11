"""A real model as a compressor of texts: bits a byte, kB a second, and the same bytes on one and two threads.

    python -m experiments real_coding measure --text NAME=FILE [--text ...] [--kilobytes 30]
    python -m experiments real_coding measure --speed --text NAME=FILE [--rounds 3]
    python -m experiments real_coding draw

The beginning of each text is coded with the model and by general compressors; every code is decoded, that of the model
twice in processes of their own, with one thread and with two, which take the same bytes. ``measure`` writes
results/real/real_coding.csv, one row a text and coder; ``--speed`` real_coding_speed.csv, one row a coder, direction
and round, on a shorter beginning of the first text; ``draw`` makes real_coding.png and .md.
"""

from __future__ import annotations

import bz2
import lzma
import math
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow
import torch

from experiments.real.growing import (
    REAL,
    GrowingTable,
    add_model,
    add_texts,
    described,
    sha256_of,
    texts_of,
    weight_files,
)
from experiments.study.figures import COLORS, COLUMN_INCHES, read_measured, save
from experiments.study.measuring import add_rounds, at_least_one, identity
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.hugging_face.text import load_text_model
from vocabfold.inference.model_coder import ModelSteps, Rows, decode_tokens, encode_tokens, one_thread
from vocabfold.inference.text_file import TextModel, compress
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.runs.tables import RESULTS

NAME, SPEED = "real_coding", "real_coding_speed"
THREADS = (1, 2)
SPEED_BYTES = 2_000
PROBED_STEPS = 4
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def general_compressors(num_bytes: int) -> dict[str, Coder]:
    """Compressors that need no model, for texts of ``num_bytes``."""

    def arrow(name: str, level: int) -> Coder:
        codec = pyarrow.Codec(name, compression_level=level)
        return (
            lambda text: codec.compress(text, asbytes=True),
            lambda code: codec.decompress(code, num_bytes, asbytes=True),
        )

    return {
        "xz -9e": (lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "bzip2 -9": (lambda text: bz2.compress(text, 9), bz2.decompress),
        "zstd -22": arrow("zstd", 22),
        "brotli -11": arrow("brotli", 11),
    }


def excerpt(path: Path, num_bytes: int) -> bytes:
    """The whole lines that fit into the first ``num_bytes`` of a text. Raises UserError where none does."""
    with path.open("rb") as file:
        text = file.read(num_bytes + 1)
    if len(text) <= num_bytes:
        return text
    if not (whole := text[: text.rfind(b"\n", 0, num_bytes) + 1]):
        raise UserError(f"{path} has no line that ends within its first {num_bytes:,} bytes: code more of it")
    return whole


@torch.inference_mode()
def cross_entropy_bits(coder: TextModel, tokens: np.ndarray) -> float:
    """What the model itself expects of the coder's rows, in all: whole windows, no cache, no integers.

    For rows within the model's positions, which those of short texts are. Raises UserError for longer ones.
    """
    rows = Rows(len(tokens), coder.num_rows(len(tokens)))
    if rows.length > coder.model.gpt.config.max_positions:
        raise UserError(f"rows of {rows.length} tokens are longer than a context: code less text")
    total = 0.0
    for first in range(0, len(tokens), rows.length):
        row = torch.tensor([coder.tokenizer.end_token, *tokens[first : first + rows.length].tolist()])
        hidden = coder.model.gpt(row[None, :-1])[0]
        for some, targets in zip(hidden.split(256), row[1:].split(256), strict=True):
            total -= float(coder.model.head.target_log_prob(some, targets).double().sum())
    return total / math.log(2)


@torch.inference_mode()
def changed_by_threads(coder: TextModel) -> float:
    """The share of the coder's integers that change where a few steps compute on two threads instead of one."""
    threads, found = torch.get_num_threads(), list[np.ndarray]()
    try:
        for number in THREADS:
            torch.set_num_threads(number)
            steps = ModelSteps(coder.model, coder.most_rows, coder.tokenizer.end_token)
            integers = []
            for step in range(PROBED_STEPS):
                tokens = (torch.arange(coder.most_rows) * 97 + step) % coder.model.head.vocabulary_size
                integers += [one.ravel() for one in steps.cumulatives(steps.symbols.of(tokens))]
                steps.advance(tokens)
            found.append(np.concatenate(integers))
    finally:
        torch.set_num_threads(threads)
    return float((found[0] != found[1]).mean())


def decoded_elsewhere(coded: Path, model: Path, threads: int) -> bytes:
    """What another process with so many threads makes of a coded file. Raises UserError where it cannot."""
    back = coded.with_suffix(f".{threads}")
    command = [sys.executable, "-m", "vocabfold.compress", "--decompress", str(coded), "--model", str(model)]
    answer = subprocess.run(
        [*command, "--output", str(back)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        raise UserError(f"decoding on {threads} threads failed: {answer.stderr.strip().splitlines()[-1:]}")
    return back.read_bytes()


def measure_model(text: bytes, coder: TextModel, model: Path) -> dict[str, Any]:
    """The columns of the model on one text, coded here and decoded in other processes."""
    with tempfile.TemporaryDirectory() as folder:
        plain, coded = Path(folder) / "text", Path(folder) / "text.vftm"
        plain.write_bytes(text)
        compress(plain, coded, coder, lambda *_: None)
        for threads in THREADS:
            if decoded_elsewhere(coded, model, threads) != text:
                raise AssertionError(f"{threads} threads do not give back what was coded")
        code_bytes = coded.stat().st_size
    tokens = coder.tokenizer.encode_bytes(text)
    own_bits = cross_entropy_bits(coder, tokens)
    return {
        "coded_bytes": code_bytes,
        "model_bytes": sum(file.stat().st_size for file in weight_files(model)),
        "tokens": len(tokens),
        "rows": coder.num_rows(len(tokens)),
        "own_bits_per_byte": own_bits / len(text),
        "integers_changed_by_threads": changed_by_threads(coder),
        "decoded_with_threads": " ".join(map(str, THREADS)),
    }


def add_options(parser: ArgumentParser) -> None:
    """The model, its texts, and what is measured of them."""
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--kilobytes", type=int, default=30, help="of each text (default %(default)s)")
    parser.add_argument("--speed", action="store_true", help="measure kB a second instead, on the first text")
    add_rounds(parser, 3)


def measure(arguments: Namespace) -> None:
    """Sizes of every text that has no rows yet, or speeds."""
    at_least_one(arguments, "kilobytes", "rounds")
    texts, of_model = texts_of(arguments), described(arguments.model)
    if arguments.speed:
        measure_speed(arguments, *next(iter(texts.items())), of_model)
        return
    table = GrowingTable(NAME)
    coder: TextModel | None = None
    for name, path in texts.items():
        run = identity(NAME, Namespace(kilobytes=arguments.kilobytes), of_model["model_sha256"], name, sha256_of(path))
        if run in table.runs:
            print(f"{name}: measured before")
            continue
        coder = coder or load_text_model(arguments.model)
        text = excerpt(path, 1000 * arguments.kilobytes)
        lead = {"text": name, "text_sha256": sha256_of(path), "bytes": len(text)}
        rows: list[dict[str, Any]] = []
        for compressor, (encode, decode) in general_compressors(len(text)).items():
            if decode(code := encode(text)) != text:
                raise AssertionError(f"{compressor} does not give back what it was given")
            rows.append({"coder": compressor, "coded_bytes": len(code), "model_bytes": 0})
        rows.append({"coder": of_model["model"], **of_model, **measure_model(text, coder, arguments.model)})
        for row in rows:
            row["bits_per_byte"] = 8 * row["coded_bytes"] / len(text)
            row["bits_per_byte_with_model"] = 8 * (row["coded_bytes"] + row["model_bytes"]) / len(text)
        table.add(run, [lead | row for row in rows])


def measure_speed(arguments: Namespace, name: str, path: Path, of_model: dict[str, str]) -> None:
    """Both directions of every coder in turns, on a beginning of one text."""
    table = GrowingTable(SPEED)
    run = identity(SPEED, Namespace(rounds=arguments.rounds), of_model["model_sha256"], name, sha256_of(path))
    if run in table.runs:
        print(f"{table.path}: measured before")
        return
    coder = load_text_model(arguments.model)
    text = excerpt(path, SPEED_BYTES)
    tokens, end = coder.tokenizer.encode_bytes(text), coder.tokenizer.end_token
    num_rows = 16  # as in a text of more than 8,192 tokens
    code = encode_tokens(coder.model, tokens, end, num_rows=num_rows)
    calls: dict[str, Callable[[], Any]] = {
        f"{of_model['model']} encode": lambda: encode_tokens(coder.model, tokens, end, num_rows=num_rows),
        f"{of_model['model']} decode": lambda: decode_tokens(coder.model, code, len(tokens), end, num_rows=num_rows),
    }
    for compressor, (encode, decode) in general_compressors(len(text)).items():
        calls |= {f"{compressor} encode": partial(encode, text), f"{compressor} decode": partial(decode, encode(text))}
    with one_thread():
        seconds = interleaved_seconds(calls, arguments.rounds, 0, torch.device("cpu"), progress=True)
    rows = []
    for call, values in seconds.items():
        compressor, direction = call.rsplit(" ", 1)
        lead = {"text": name, "bytes": len(text), "coder": compressor, "direction": direction}
        rows += [lead | {"round": index, "seconds": value} for index, value in enumerate(values)]
    table.add(run, [row | {"threads": 1, "rows": num_rows} for row in rows])


def speed_cells(speeds: pd.DataFrame | None, coder: str) -> str:
    """Encoding and decoding in kB a second: two cells."""
    cells = []
    for direction in ("encode", "decode"):
        of = speeds[(speeds["coder"] == coder) & (speeds["direction"] == direction)] if speeds is not None else None
        rate = (of["bytes"] / of["seconds"] / 1e3).median() if of is not None and len(of) else math.nan
        cells.append("" if math.isnan(rate) else f"{rate:,.2f}" if rate < 100 else f"{rate:,.0f}")
    return " | ".join(cells)


def small_models(text: str) -> list[str]:
    """Lines of our own small models on the same text, from their table."""
    path = RESULTS / text / "model_coding.csv"
    if not path.is_file():
        return []
    table = read_measured(path, ("coder", "bits_per_byte"))
    return [
        f"| {text}, {row['bytes']:,} bytes | ours: {row['coder'].removeprefix('model, ')} "
        f"| {row['bits_per_byte']:.3f} | {row['bits_per_byte_with_model']:,.1f} | | | |"
        for _, row in table[table["model_bytes"] > 0].iterrows()
    ]


def markdown(table: pd.DataFrame, speeds: pd.DataFrame | None) -> str:
    """Every coder on every text."""
    lines = [
        "| text | coder | bits a byte | with the model's bytes | the model's own | encode (kB/s) | decode (kB/s) |"
    ]
    lines.append("|---" * 7 + "|")
    for text, rows in table.groupby("text", sort=False):
        for _, row in rows.sort_values("bits_per_byte").iterrows():
            own = "" if pd.isna(row["own_bits_per_byte"]) else f"{row['own_bits_per_byte']:.3f}"
            lines.append(
                f"| {text}, {row['bytes']:,} bytes | {row['coder']} | {row['bits_per_byte']:.3f} "
                f"| {row['bits_per_byte_with_model']:,.3f} | {own} | {speed_cells(speeds, row['coder'])} |"
            )
        lines += small_models(str(text))
    models = table[table["model_bytes"] > 0]
    best = table[table["model_bytes"] == 0].groupby("text")["coded_bytes"].min()
    saved = 1 - models.set_index("text")["coded_bytes"] / best
    share = models["own_bits_per_byte"] / models["bits_per_byte"]
    first = models.iloc[0]
    bits_saved = (best / table.groupby("text")["bytes"].first() - models.set_index("text")["coded_bytes"]
                  / models.set_index("text")["bytes"]).mean()  # fmt: skip
    lines += ["", f"* {first['coder']} takes {saved.min():.0%} to {saved.max():.0%} fewer bytes than the best of the "]
    lines[-1] += f"others, its own {first['model_bytes'] / 1e6:.0f} MB left out. Counted in, it pays from about "
    lines[-1] += f"{first['model_bytes'] / bits_saved / 1e6:,.0f} MB of text on."
    lines.append(f"* Coded bytes are {1 / share.max() - 1:.2%} to {1 / share.min() - 1:.2%} above its cross entropy.")
    threads = " and ".join(str(first["decoded_with_threads"]).split())
    lines.append(f"* Decoded in other processes on {threads} threads: the same bytes.")
    changed = first["integers_changed_by_threads"]
    lines += ["", "Both directions of the model compute on one thread, whatever number they are given: on two, "]
    lines[-1] += f"{changed:.1%} of the integers that a code is made of are others, and one of them ends it. "
    lines[-1] += f"Whether these texts or some like them were among what {first['model']} was trained on is not known."
    return "\n".join([*lines, f"Hardware: {first['hardware']}; torch {first['torch']}.", ""])


def draw_coders(table: pd.DataFrame, path: Path) -> None:
    """Bits a byte of every coder, one group of bars a text."""
    texts, coders = list(dict.fromkeys(table["text"])), list(dict.fromkeys(table["coder"]))
    coders = sorted(coders, key=lambda coder: -table[table["coder"] == coder]["bits_per_byte"].mean())
    figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.6))
    hatches = ["", "//", "..", "xx", "--"]
    width = 0.8 / len(coders)
    for index, coder in enumerate(coders):
        values = table[table["coder"] == coder].set_index("text")["bits_per_byte"].reindex(texts)
        color = list(COLORS.values())[index % len(COLORS)]
        places = np.arange(len(texts)) + (index - (len(coders) - 1) / 2) * width
        axis.bar(places, values, width * 0.9, color=color, hatch=hatches[index % len(hatches)], label=coder)
    axis.set_xticks(range(len(texts)), texts)
    axis.grid(axis="x", visible=False)
    axis.set_axisbelow(True)
    axis.set_ylabel("Bits a byte, model apart")
    figure.legend(loc="outside lower center", ncols=2)
    most = table["bytes"].max()
    figure.suptitle(f"The first {most:,} bytes of each text", fontsize=7)
    save(figure, path)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    path = RESULTS / corpus / f"{NAME}.csv"
    table = read_measured(path, ("text", "coder", "bits_per_byte"))
    speeds = read_measured(REAL / f"{SPEED}.csv") if (REAL / f"{SPEED}.csv").is_file() else None
    words = markdown(table, speeds)
    write_text(path.with_suffix(".md"), words)
    draw_coders(table, path.with_suffix(".png"))
    print(words)
