"""A real model as a compressor of texts: bits a byte, kB a second, and the same bytes on one and two threads.

    python -m experiments real_coding measure --text NAME=FILE [--text ...] [--run RUN_FOLDER ...] [--kilobytes 30]
    python -m experiments real_coding measure --speed --text NAME=FILE [--run RUN_FOLDER ...] [--rounds 3]
    python -m experiments real_coding draw

The beginning of each text is coded with the model, with small models of finished runs and by general compressors; every
code is decoded, that of a model twice in processes of their own, with one thread and with two, which take the same
bytes. ``measure`` writes results/real/real_coding.csv, one row a text and coder; ``--speed`` real_coding_speed.csv, one
row a coder, direction and round, on a shorter beginning of the first text; ``draw`` makes real_coding.png and .md.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
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

from experiments.real.coding_words import PROBED_STEPS, markdown
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
from experiments.tokens.model_coding import cross_entropy_bits
from vocabfold.compress import load_text_model
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.inference.model_coder import ModelSteps, decode_tokens, encode_tokens, one_thread
from vocabfold.inference.text_file import TextModel, compress
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.runs.checkpoint import WEIGHTS_NAME
from vocabfold.runs.record import finished_row
from vocabfold.runs.tables import RESULTS

NAME, SPEED = "real_coding", "real_coding_speed"
THREADS = (1, 2)
SPEED_BYTES = 2_000
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


def described_run(folder: Path) -> dict[str, str]:
    """The columns that say which run of ours a row is about. Raises UserError where it has not finished."""
    row, weights = finished_row(folder), folder / WEIGHTS_NAME
    if row is None or not weights.is_file():
        raise UserError(f"{folder} holds no finished run with its weights")
    return {
        "model": f"ours: {row['head']}, {row['tokens'] / 1e6:.1f} M tokens of {row['corpus']}",
        "model_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        "trained_run": row["run"],
    }


def bytes_of_model(path: Path) -> int:
    """Of the files of a model of transformers, or of a run's weights."""
    files = [path / WEIGHTS_NAME] if finished_row(path) is not None else weight_files(path)
    return sum(file.stat().st_size for file in files)


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
        "model_bytes": bytes_of_model(model),
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
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="folders of finished runs, which code too")
    parser.add_argument("--kilobytes", type=int, default=30, help="of each text (default %(default)s)")
    parser.add_argument("--speed", action="store_true", help="measure kB a second instead, on the first text")
    add_rounds(parser, 3)


def measure(arguments: Namespace) -> None:
    """Sizes of every text and model that have no rows yet, or speeds."""
    at_least_one(arguments, "kilobytes", "rounds")
    texts, of_model = texts_of(arguments), described(arguments.model)
    models = {arguments.model: of_model} | {folder: described_run(folder) for folder in arguments.run}
    if arguments.speed:
        measure_speed(arguments.rounds, *next(iter(texts.items())), models)
        return
    table, sizes = GrowingTable(NAME), Namespace(kilobytes=arguments.kilobytes)
    coders: dict[Path, TextModel] = {}
    for name, path in texts.items():
        text = excerpt(path, 1000 * arguments.kilobytes)
        lead = {"text": name, "text_sha256": sha256_of(path), "bytes": len(text)}
        for model, columns in models.items():
            run = identity(NAME, sizes, columns["model_sha256"], name, sha256_of(path))
            if run in table.runs:
                print(f"{name}, {columns['model']}: measured before")
                continue
            rows = general_rows(text, path.read_bytes()) if columns is of_model else []
            coder = coders[model] = coders.get(model) or load_text_model(model)
            rows.append({"coder": columns["model"], **columns, **measure_model(text, coder, model)})
            for row in rows:
                row["bits_per_byte"] = 8 * row["coded_bytes"] / len(text)
                row["bits_per_byte_with_model"] = 8 * (row["coded_bytes"] + row["model_bytes"]) / len(text)
            table.add(run, [lead | row for row in rows])


def general_rows(text: bytes, whole: bytes) -> list[dict[str, Any]]:
    """The columns of each general compressor on the beginning of a text, and on the whole of it."""
    rows: list[dict[str, Any]] = []
    for compressor in general_compressors(len(text)):
        sizes = []
        for one in (text, whole):
            encode, decode = general_compressors(len(one))[compressor]
            if decode(code := encode(one)) != one:
                raise AssertionError(f"{compressor} does not give back what it was given")
            sizes.append(len(code))
        row = {"coder": compressor, "coded_bytes": sizes[0], "model_bytes": 0}
        rows.append(row | {"whole_bytes": len(whole), "whole_coded_bytes": sizes[1]})
    return rows


def measure_speed(rounds: int, name: str, path: Path, models: dict[Path, dict[str, str]]) -> None:
    """Both directions of every coder in turns, on a beginning of one text."""
    table = GrowingTable(SPEED)
    digests = [columns["model_sha256"] for columns in models.values()]
    run = identity(SPEED, Namespace(rounds=rounds), *digests, name, sha256_of(path))
    if run in table.runs:
        print(f"{table.path}: measured before")
        return
    text = excerpt(path, SPEED_BYTES)
    calls: dict[str, Callable[[], Any]] = {}
    num_rows: dict[str, int] = {}
    for model, columns in models.items():
        coder = load_text_model(model)
        tokens, end = coder.tokenizer.encode_bytes(text), coder.tokenizer.end_token
        most = coder.most_rows  # as in a long text
        encode = partial(encode_tokens, coder.model, tokens, end, num_rows=most)
        decode = partial(decode_tokens, coder.model, encode(), len(tokens), end, num_rows=most)
        calls |= {f"{columns['model']} encode": encode, f"{columns['model']} decode": decode}
        num_rows[columns["model"]] = most
    for compressor, (shorten, restore) in general_compressors(len(text)).items():
        code = shorten(text)
        calls |= {f"{compressor} encode": partial(shorten, text), f"{compressor} decode": partial(restore, code)}
    with one_thread():
        seconds = interleaved_seconds(calls, rounds, 0, torch.device("cpu"), progress=True)
    measured = []
    for call, values in seconds.items():
        compressor, direction = call.rsplit(" ", 1)
        lead = {"text": name, "bytes": len(text), "coder": compressor, "direction": direction}
        lead |= {"threads": 1, "rows": num_rows.get(compressor)}
        measured += [lead | {"round": index, "seconds": value} for index, value in enumerate(values)]
    table.add(run, measured)


def draw_coders(table: pd.DataFrame, path: Path) -> None:
    """Bits a byte of every coder, one row a coder, one mark a text."""
    texts = list(dict.fromkeys(table["text"]))
    coders = table.groupby("coder")["bits_per_byte"].mean().sort_values(ascending=False).index.tolist()
    figure, axis = plt.subplots(figsize=(2 * COLUMN_INCHES, 1.0 + 0.2 * len(coders)))
    for text, color, marker in zip(texts, COLORS.values(), "osv^Dx*", strict=False):
        of = table[table["text"] == text]
        heights = [coders.index(coder) for coder in of["coder"]]
        axis.plot(of["bits_per_byte"], heights, color=color, marker=marker, linestyle="none", label=text)
    axis.set_yticks(range(len(coders)), coders)
    axis.set_xlim(left=0)
    axis.set_xlabel("Bits a byte, the model's own bytes left out")
    figure.legend(loc="outside upper right", ncols=len(texts))
    title = f"The first {table['bytes'].max() / 1e3:.0f} kB of each text"
    figure.suptitle(title, fontsize=7, x=0.02, ha="left")
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
