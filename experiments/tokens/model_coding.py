"""Text coded with trained models against general compressors: bits a byte, speed, and the models' own cross entropy.

    python -m experiments model_coding measure [--rounds 3] [--run NAME=RUN_FOLDER ...] [KEY=VALUE ...]
    python -m experiments model_coding draw [CORPUS ...]

writes results/CORPUS/model_coding.csv (one row a coder), .png and .md. The text is one that no model saw: the
validation text, or of the embedded stories those beyond every corpus. Without --run the models are those of
heads_pareto with seed 0: the full softmax and folded heads, each at its own learning rate.
"""

from __future__ import annotations

import bz2
import lzma
import math
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

from experiments.judging.writing import documents_of
from experiments.judging.writing import text_of as written_in
from experiments.study.figures import COLORS, COLUMN_INCHES, report, save
from experiments.study.measuring import (
    add_rounds,
    add_settings,
    composed,
    identity,
    is_measured,
    run_folders,
    text_of,
    write_measured,
)
from vocabfold.coding.container import decode, encode
from vocabfold.compress import load_text_model
from vocabfold.data.corpora import load_corpus
from vocabfold.data.stories import stories
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.errors import UserError
from vocabfold.inference.model_coder import Rows, decode_tokens, encode_tokens, one_thread
from vocabfold.inference.text_file import TextModel
from vocabfold.machine import origin
from vocabfold.measure.speed import interleaved_seconds, ratio_summary
from vocabfold.runs.checkpoint import WEIGHTS_NAME
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import Settings, load_settings
from vocabfold.runs.tables import RESULTS

NAME = "model_coding"
CPU = torch.device("cpu")
UNSEEN_STORIES = (1_000_000, 1_000_060)  # of the embedded generator's seed 0: far beyond what any run trains on
FULL = ("full", "full_untied")
ROWS_AT_A_TIME = 256  # hidden states that are scored together: 50 MB of logits at V = 49,152
MODELS = {  # head -> its name in the table
    "full_untied": "full softmax, untied",
    "scale_shift_bpe": "scale and shift, bpe",
    "linear_clustered": "linear, clustered",
    "shortlist_frequency": "shortlist 2,048",
}
Coder = tuple[Callable[[], bytes], Callable[[bytes], bytes]]


def general_compressors(text: bytes) -> dict[str, Coder]:
    """Compressors of bytes, and two token coders that need no model."""
    tokenizer = load_tokenizer("gpt2")
    tokens = tokenizer.encode_bytes(text)

    def arrow(name: str, level: int) -> Coder:
        codec = pyarrow.Codec(name, compression_level=level)
        return (
            lambda: codec.compress(text, asbytes=True),
            lambda code: codec.decompress(code, len(text), asbytes=True),
        )

    def token_coder(name: str) -> Coder:
        return (
            lambda: encode(tokenizer.encode_bytes(text), tokenizer.vocabulary_size, name),
            lambda code: tokenizer.decode_bytes(decode(code)),
        )

    assert tokenizer.decode_bytes(tokens) == text
    return {
        "xz -9e": (lambda: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "bzip2 -9": (lambda: bz2.compress(text, 9), bz2.decompress),
        "zstd -19": arrow("zstd", 19),
        "brotli -11": arrow("brotli", 11),
        "tokens, rans": token_coder("rans"),
        "tokens, order1": token_coder("order1"),
    }


def model_compressor(coder: TextModel, text: bytes) -> Coder:
    """The coder of vocabfold.compress on one segment."""
    tokens = coder.tokenizer.encode_bytes(text)
    end_token = coder.tokenizer.end_token
    return (
        lambda: encode_tokens(coder.model, coder.tokenizer.encode_bytes(text), end_token),
        lambda code: coder.tokenizer.decode_bytes(decode_tokens(coder.model, code, len(tokens), end_token)),
    )


@torch.inference_mode()
def cross_entropy_bits(coder: TextModel, tokens: np.ndarray) -> float:
    """What the model itself expects of the coder's rows and contexts, in all: whole windows, no cache, no integers."""
    model, total = coder.model, 0.0
    most = model.gpt.config.max_positions
    rows = Rows(len(tokens), coder.num_rows(len(tokens)))
    with one_thread():
        for first in range(0, len(tokens), rows.length):
            row = torch.tensor([coder.tokenizer.end_token, *tokens[first : first + rows.length].tolist()])
            begin, done = 0, 1  # the context's first place, and the next token to predict
            while done < len(row):
                end = min(begin + most, len(row) - 1)
                hidden = model.gpt(row[None, begin:end])[0, done - 1 - begin :]
                targets = row[done : end + 1]
                for some, of_some in zip(hidden.split(ROWS_AT_A_TIME), targets.split(ROWS_AT_A_TIME), strict=True):
                    total -= float(model.head.target_log_prob(some, of_some).double().sum())
                begin, done = end + 1 - max(1, most // 2), end + 1
    return total / math.log(2)


def measure_coders(text: bytes, runs: dict[str, Path], excerpt_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """One row a coder: sizes of the whole text, speeds on its beginning."""
    coders = {name: load_text_model(folder) for name, folder in runs.items()}
    excerpt = text[:excerpt_bytes]
    compressors = general_compressors(text) | {name: model_compressor(coder, text) for name, coder in coders.items()}
    timed_compressors = general_compressors(excerpt) | {
        name: model_compressor(coder, excerpt) for name, coder in coders.items()
    }
    rows, timed = [], dict[str, Callable[[], Any]]()
    for name, (encoder, decoder) in compressors.items():
        code = encoder()
        if decoder(code) != text:
            raise AssertionError(f"{name} does not give back what it was given")
        row: dict[str, Any] = {"coder": name, "bytes": len(text), "coded_bytes": len(code), "model_bytes": 0}
        if name in coders:
            tokens = coders[name].tokenizer.encode_bytes(text)
            own_bits = cross_entropy_bits(coders[name], tokens)
            trained = finished_row(runs[name]) or {}
            row |= {
                "model_bytes": (runs[name] / WEIGHTS_NAME).stat().st_size,
                "tokens": len(tokens),
                "bits_per_token": 8 * len(code) / len(tokens),
                "own_bits_per_token": own_bits / len(tokens),
                "excess_over_own_bits": 8 * len(code) / own_bits - 1,
                "training_command": trained.get("command"),
                **{
                    key: trained.get(key) for key in ("model", "head", "scorer", "partition_order", "shortlist", "tied")
                },
                **{key: trained.get(key) for key in ("hidden_size", "learning_rate", "steps", "validation_loss_nats")},
            }
        row["bits_per_byte"] = 8 * len(code) / len(text)
        row["bits_per_byte_with_model"] = 8 * (len(code) + row["model_bytes"]) / len(text)
        rows.append(row)
        short_encoder, short_decoder = timed_compressors[name]
        timed[f"{name} encode"] = short_encoder
        timed[f"{name} decode"] = partial(short_decoder, short_encoder())
    seconds = interleaved_seconds(timed, rounds, 0, CPU, progress=True)
    full = next((name for name in coders if load_settings(runs[name]).head.name in FULL), None)
    for row in rows:
        for kind in ("encode", "decode"):
            key = f"{row['coder']} {kind}"
            row[f"{kind}_kilobytes_per_second"] = len(excerpt) / float(np.median(seconds[key])) / 1e3
            if full is not None and row["coder"] in coders:
                ratio = ratio_summary(seconds, f"{full} {kind}", key)
                row |= {f"{kind}_speed_over_full": ratio.median, f"{kind}_speed_over_full_low": ratio.low}
                row[f"{kind}_speed_over_full_high"] = ratio.high
    return rows


def markdown(table: pd.DataFrame) -> str:
    """The table and the goals."""
    first = table.iloc[0]
    lines = [
        f"{first['corpus']}: {first['bytes']:,} bytes that no model saw.",
        "",
        "| coder | bits a byte | with the model's bytes | bits a token | the model's own | excess | encode (kB/s) "
        "| decode (kB/s) | decode, full = 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    models = table[table["model_bytes"] > 0]
    for _, row in table.iterrows():
        cells = ["-"] * 3
        if row["model_bytes"]:
            cells = [f"{row['bits_per_token']:.3f}", f"{row['own_bits_per_token']:.3f}"]
            cells.append(f"{row['excess_over_own_bits']:.2%}")
        ratio = "-"
        if "decode_speed_over_full" in row and not math.isnan(row["decode_speed_over_full"]):
            low, high = row["decode_speed_over_full_low"], row["decode_speed_over_full_high"]
            ratio = f"{row['decode_speed_over_full']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {row['coder']} | {row['bits_per_byte']:.3f} | {row['bits_per_byte_with_model']:.3f} | "
            + " | ".join(cells)
            + f" | {row['encode_kilobytes_per_second']:.1f} | {row['decode_kilobytes_per_second']:.1f} | {ratio} |"
        )
    excess = models["excess_over_own_bits"].max()
    lines += ["", f"* within 0.5% of the model's own cross entropy: at most {excess:.2%} above: {met(excess <= 0.005)}"]
    if "decode_speed_over_full" in table:
        folded = models[~models["head"].isin(FULL)]
        for _, row in folded.iterrows():
            least = min(row["encode_speed_over_full"], row["decode_speed_over_full"])
            lines.append(f"* {row['coder']}, 3x the speed of the full softmax: {least:.2f}x: {met(least >= 3)}")
    lines += ["", "Models on one thread, so that both directions add in the same order; medians of interleaved rounds."]
    return "\n".join([*lines, f"Hardware: {first['hardware']}; torch {first['torch']}.", ""])


def met(is_met: bool) -> str:
    """In words."""
    return "met" if is_met else "not met"


def draw_coders(table: pd.DataFrame, path: Path) -> None:
    """Bits a byte of every coder, and decoding speed."""
    figure, axes = plt.subplots(1, 2, figsize=(2 * COLUMN_INCHES, 2.4), sharey=True)
    table = table.sort_values("bits_per_byte", ascending=False, ignore_index=True)
    colors = [COLORS["blue"] if size else COLORS["orange"] for size in table["model_bytes"]]
    axes[0].barh(table["coder"], table["bits_per_byte"], color=colors, height=0.6)
    axes[0].set_xlabel("Bits a byte, model apart")
    axes[1].barh(table["coder"], table["decode_kilobytes_per_second"], color=colors, height=0.6)
    axes[1].set_xscale("log")
    axes[1].set_xlabel("Decoding (kB/s)")
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(axis="y", visible=False)
    kinds = {"coded with a model": "blue", "without": "orange"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[color]) for color in kinds.values()]
    first = table.iloc[0]
    figure.suptitle(f"{first['corpus']}, {first['bytes']:,} bytes that no model saw", fontsize=7)
    figure.legend(handles, list(kinds), loc="outside lower center", ncols=2)
    save(figure, path)


def trained_runs(corpus: str) -> dict[str, Path]:
    """The finished runs of MODELS with seed 0. Raises UserError where there is none."""
    rows = {folder: finished_row(folder) or {} for folder in run_folders("heads_pareto", corpus)}
    found = {
        f"model, {name}": folder
        for head, name in MODELS.items()
        for folder, row in rows.items()
        if row.get("head") == head and row.get("seed") == 0
    }
    if not found:
        raise UserError(f"no run of heads_pareto on {corpus} has seed 0: run `make tokens` first, or name --run")
    return found


def named_paths(pairs: list[str]) -> dict[str, Path]:
    """NAME=FOLDER pairs. Raises UserError for anything else."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"--run {wrong[0]}: write NAME=RUN_FOLDER")
    return {f"model, {name}": Path(folder) for name, _, folder in (pair.partition("=") for pair in pairs)}


def unseen_text(settings: Settings) -> bytes:
    """The embedded stories beyond every corpus, or the validation text. Raises UserError where there is none."""
    if settings.data["name"] == "stories":
        return "\n".join(stories(0, *UNSEEN_STORIES)).encode()
    corpus = load_corpus(settings.data)
    tokenizer = written_in(corpus)
    return "\n".join(tokenizer.decode(one) for one in documents_of(corpus.valid, tokenizer.end_token)).encode()


def add_options(parser: ArgumentParser) -> None:
    """Rounds, runs and the text."""
    add_rounds(parser, 3)
    parser.add_argument("--run", action="append", default=[], metavar="NAME=RUN_FOLDER")
    parser.add_argument("--excerpt-bytes", type=int, default=40_000, help="of the text are timed (default %(default)s)")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Code the text with every coder and write the table."""
    settings = composed(arguments.settings)
    runs = named_paths(arguments.run) or trained_runs(settings.corpus)
    path = RESULTS / settings.corpus / f"{NAME}.csv"
    measurement = identity(NAME, arguments, text_of(settings), [folder.name for folder in runs.values()])
    if is_measured(path, measurement, timed=True):
        return
    rows = measure_coders(unseen_text(settings), runs, arguments.excerpt_bytes, arguments.rounds)
    lead = {"experiment": NAME, "corpus": settings.corpus}
    write_measured(pd.DataFrame([lead | row | origin() for row in rows]), path, measurement)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / f"{NAME}.csv", markdown, draw_coders, ("coder", "bits_per_byte"))
