"""Token streams at rest: bits a token, speed and memory of every coder and peer, against the entropies of the stream.

    python -m experiments token_coding measure [--rounds 3] [KEY=VALUE ...]
    python -m experiments token_coding draw [CORPUS ...]

writes results/CORPUS/token_coding.csv (one row a stream and coder), .png and .md, of the training text. Ids: GPT-2's,
and a WordPiece of up to 30,522 tokens (the size of bert-base-uncased, which needs a download) trained here on the same
text.
"""

from __future__ import annotations

import time
import tracemalloc
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import constriction
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tokenizers
import torch
from matplotlib.axes import Axes

from experiments.judging.writing import documents_of
from experiments.judging.writing import text_of as written_in
from experiments.study.figures import COLORS, COLUMN_INCHES, report, save
from experiments.study.measuring import (
    add_rounds,
    add_settings,
    composed,
    identity,
    is_measured,
    text_of,
    write_measured,
)
from vocabfold.coding.coders import CODERS
from vocabfold.coding.container import Container, decode, encode
from vocabfold.coding.frequencies import count_frequencies, index_of
from vocabfold.data.corpora import load_corpus
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.machine import origin
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.runs.tables import RESULTS

NAME = "token_coding"
BERT_VOCABULARY_SIZE = 30_522
LEARNING = ("adaptive", "order1", "order2")  # slow, and a stream is learned once: timed once, on the stream
SPEED_TOKENS = 1 << 22
STATIC = ("huffman", "arithmetic", "rans", "folded")
MIB = 1 << 20
LABEL_HEIGHT_POINTS, LABEL_WIDTH_POINTS = 5.5, 30.0
CPU = torch.device("cpu")
Coder = tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]


def streams(texts: dict[str, list[str]]) -> list[tuple[str, str, np.ndarray, int]]:
    """(corpus, tokenizer, ids [n], V) of every text under both tokenizers."""
    found = []
    for corpus, documents in texts.items():
        gpt2 = load_tokenizer("gpt2")
        end = np.array([gpt2.end_token])
        ids = np.concatenate([part for text in documents for part in (gpt2.encode_array(text), end)])
        found.append((corpus, "gpt2", ids.astype(np.uint16), gpt2.vocabulary_size))
        wordpiece = tokenizers.BertWordPieceTokenizer(lowercase=True)
        wordpiece.train_from_iterator(documents, BERT_VOCABULARY_SIZE, min_frequency=1, show_progress=False)
        encoded = wordpiece.encode_batch(documents)  # with [CLS] and [SEP] around each, as BERT has it
        ids = np.concatenate([np.array(part.ids, np.uint16) for part in encoded])
        found.append((corpus, "wordpiece", ids, wordpiece.get_vocab_size()))
    return found


def entropies_bits(tokens: np.ndarray) -> tuple[float, float]:
    """(H0 of a token, H1 of a token after another), of the stream's own shares: no static table does better."""

    def joint(values: np.ndarray) -> float:
        shares = np.unique(values, return_counts=True)[1] / len(values)
        return float(-(shares * np.log2(shares)).sum())

    pairs = tokens[:-1].astype(np.int64) << 32 | tokens[1:]
    return joint(tokens), joint(pairs) - joint(tokens[:-1])


def peers(tokens: np.ndarray, vocabulary_size: int) -> dict[str, Coder]:
    """Other people's coders, in memory: constriction's ANS with the same table, and blosc2 on the raw ids."""
    model = count_frequencies(tokens, vocabulary_size)
    distribution = constriction.stream.model.Categorical(model.frequencies / float(1 << model.bits), perfect=False)
    model_words = np.frombuffer(model.to_bytes().ljust(-(-len(model.to_bytes()) // 4) * 4, b"\0"), np.uint32)

    def ans_encode(ids: np.ndarray) -> tuple[np.ndarray, int]:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(index_of(model.tokens, ids).astype(np.int32), distribution)
        return np.concatenate([model_words, coder.get_compressed()]), len(ids)

    def ans_decode(coded: tuple[np.ndarray, int]) -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder(coded[0][len(model_words) :])
        return model.tokens[coder.decode(distribution, coded[1])]

    return {
        "constriction ANS": (ans_encode, ans_decode),
        "blosc2": (lambda ids: blosc2.pack_array2(ids), lambda coded: blosc2.unpack_array2(coded)),
    }


def timed_call(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gives, seconds)."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def coded_bytes(coded: Any) -> int:
    """Of what an encoder gave."""
    return int(coded[0].nbytes) if isinstance(coded, tuple) else len(coded)


def measure_stream(
    corpus: str, tokenizer: str, tokens: np.ndarray, vocabulary_size: int, rounds: int, speed_tokens: int
) -> list[dict[str, Any]]:
    """One row a coder. Speeds of all but LEARNING are of the stream repeated to ``speed_tokens``."""
    coders: dict[str, Coder] = {
        name: (
            partial(encode, vocabulary_size=vocabulary_size, coder=name),
            partial(decode, vocabulary_size=vocabulary_size),
        )
        for name in CODERS
    } | peers(tokens, vocabulary_size)
    order0, order1 = entropies_bits(tokens)
    many = np.tile(tokens, max(1, speed_tokens // len(tokens)))
    rows = []
    timed: dict[str, Callable[[], Any]] = {}
    for name, (encoder, decoder) in coders.items():
        coded, encode_seconds = timed_call(partial(encoder, tokens))
        _, decode_seconds = timed_call(partial(decoder, coded))
        tracemalloc.start()
        decoded = decoder(coded)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if not np.array_equal(decoded, tokens):
            raise AssertionError(f"{name} does not give back what it was given")
        size = coded_bytes(coded)
        model_bytes = Container(coded).model_bytes if name in CODERS else 0
        rows.append(
            {
                "corpus": corpus,
                "tokenizer": tokenizer,
                "vocabulary_size": vocabulary_size,
                "coder": name,
                "tokens": len(tokens),
                "types": len(np.unique(tokens)),
                "bits_per_token": 8 * size / len(tokens),
                "bits_per_token_without_model": 8 * (size - model_bytes) / len(tokens),
                "model_bytes": model_bytes,
                "order0_entropy_bits": order0,
                "order1_entropy_bits": order1,
                "decode_memory_mib": peak / MIB,
            }
        )
        if name in LEARNING:
            rows[-1]["encode_million_tokens_per_second"] = len(tokens) / encode_seconds / 1e6
            rows[-1]["decode_million_tokens_per_second"] = len(tokens) / decode_seconds / 1e6
        else:
            timed[f"{name} encode"] = partial(encoder, many)
            timed[f"{name} decode"] = partial(decoder, encoder(many))
    seconds = interleaved_seconds(timed, rounds, 0, CPU, progress=True)
    for row in rows:
        for kind in ("encode", "decode"):
            if values := seconds.get(f"{row['coder']} {kind}"):
                low, median, high = np.percentile(len(many) / np.array(values) / 1e6, [2.5, 50, 97.5])
                row[f"{kind}_million_tokens_per_second"] = median
                row |= {f"{kind}_low": low, f"{kind}_high": high}
    return rows


def markdown(table: pd.DataFrame) -> str:
    """The table, the goals and the verdict."""
    lines = []
    for (corpus, tokenizer), rows in table.groupby(["corpus", "tokenizer"], sort=False):
        first = rows.iloc[0]
        lines += [
            f"{corpus}, {tokenizer} ids: {first['tokens']:,} tokens of {first['types']:,} types, V = "
            f"{first['vocabulary_size']:,}; H0 {first['order0_entropy_bits']:.3f}, H1 "
            f"{first['order1_entropy_bits']:.3f} bits a token.",
            "",
            "| coder | bits a token | without its table | fewer bytes than 16 bits | encode (M tokens/s) "
            "| decode (M tokens/s) | decoding memory (MiB) |",
            "|---|---|---|---|---|---|---|",
        ]
        for _, row in rows.iterrows():
            lines.append(
                f"| {row['coder']} | {row['bits_per_token']:.3f} | {row['bits_per_token_without_model']:.3f} "
                f"| {1 - row['bits_per_token'] / 16:.1%} | {row['encode_million_tokens_per_second']:.2f} "
                f"| {row['decode_million_tokens_per_second']:.2f} | {row['decode_memory_mib']:.1f} |"
            )
        lines.append("")
    return "\n".join([*lines, *goals(table), "", *notes(table), ""])


def goals(table: pd.DataFrame) -> list[str]:
    """What was wanted, and whether it was met."""
    static = table[table["coder"].isin(STATIC)]
    static = static.assign(excess=static["bits_per_token_without_model"] / static["order0_entropy_bits"] - 1)
    excess = static.groupby("coder", sort=False)["excess"].max()
    best = static.sort_values("decode_million_tokens_per_second").iloc[-1]
    first = static[static["corpus"] == table["corpus"].iloc[0]]
    saved = 1 - first[first["tokenizer"] == "gpt2"]["bits_per_token"].min() / 16
    wanted = [
        *(
            (f"{name} within 0.5% of H0, its table aside: at most {value:.2%} above", value <= 0.005)
            for name, value in excess.items()
        ),
        (
            f"decode 20 M tokens/s on two cores: {best['coder']} {best['decode_million_tokens_per_second']:.1f}",
            best["decode_million_tokens_per_second"] >= 20,
        ),
        (f"40% fewer bytes than 16 bits with GPT-2 ids, tables included: {saved:.1%}", saved >= 0.4),
    ]
    return [f"* {text}: {'met' if met else 'not met'}" for text, met in wanted]


def notes(table: pd.DataFrame) -> list[str]:
    """The claim, and what the numbers are of."""
    savings = 1 - table[table["coder"] == "rans"]["bits_per_token"] / 16
    runs = 1 - table[table["coder"] == "run_length"]["bits_per_token"] / 16
    first = table.iloc[0]
    return [
        '"Up to 30% less memory" is true of the stored token stream alone: a static coder saves '
        f"{savings.min():.0%} to {savings.max():.0%} against 16-bit ids; run lengths save {runs.max():.0%} at best, "
        "since text hardly repeats a token. The stream is no part of a model's memory: weights, activations and "
        "gradients stay as they are, and nothing here makes inference faster.",
        "",
        *general_compressor(table),
        "",
        "Speeds: median of interleaved rounds on the stream repeated to about 4 million tokens, on all cores; those of "
        "adaptive, order1 and order2 once, on the stream itself. The WordPiece vocabulary was trained on the stream's "
        f"own text. Hardware: {first['hardware']}.",
    ]


def general_compressor(table: pd.DataFrame) -> list[str]:
    """How zstd compares with the static coders of single tokens."""
    rows = table.set_index(["corpus", "tokenizer", "coder"])
    bits, speed = rows["bits_per_token"].unstack(), rows["decode_million_tokens_per_second"].unstack()
    static = bits[list(STATIC)].min(axis=1)
    size, ratio = bits["zstd"] / static, speed["zstd"] / speed[list(STATIC)].max(axis=1)
    return [
        f"zstd -19, a general compressor, takes {size.min():.2f} to {size.max():.2f} times "
        f"the best static coder's bytes and decodes {ratio.min():.1f} to {ratio.max():.1f} times as fast: it also "
        "writes repeated phrases once, which no code of single tokens can.",
    ]


def draw_streams(table: pd.DataFrame, path: Path) -> None:
    """Decoding speed against bits a token, one panel a stream."""
    groups = list(table.groupby(["corpus", "tokenizer"], sort=False))
    num_rows = -(-len(groups) // 2)
    size = (2 * COLUMN_INCHES, 2.3 * num_rows)
    figure, axes = plt.subplots(num_rows, 2, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, ((corpus, tokenizer), rows) in zip(axes.flat, groups, strict=False):
        for _, row in rows.iterrows():
            is_ours = row["coder"] in CODERS
            color = COLORS["blue"] if is_ours else COLORS["orange"]
            axis.plot(row["bits_per_token"], row["decode_million_tokens_per_second"], "o", color=color)
        for name, dash in (("order0_entropy_bits", "--"), ("order1_entropy_bits", ":")):
            axis.axvline(rows.iloc[0][name], color="#666666", linestyle=dash, linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xlim(right=20)
        axis.set_title(f"{corpus}, {tokenizer}", fontsize=7)
    figure.supxlabel("Bits a token (dashed H0, dotted H1)", fontsize=8)
    figure.supylabel("Decoding (million tokens/s)", fontsize=8)
    figure.draw_without_rendering()  # where labels stand to each other is known once the panels have their places
    for axis, (_, rows) in zip(axes.flat, groups, strict=False):
        label_points(axis, rows)
    save(figure, path)


def label_points(axis: Axes, rows: pd.DataFrame) -> None:
    """The coders' names beside their points, ours to the right, the peers' to the left, each below the one above."""
    points_a_pixel = 72 / axis.figure.dpi
    for is_ours, names in rows.groupby(rows["coder"].isin(CODERS)):
        above: list[tuple[float, float]] = []  # x and y in points of the names that stand
        for _, row in names.sort_values("decode_million_tokens_per_second", ascending=False).iterrows():
            place = (row["bits_per_token"], row["decode_million_tokens_per_second"])
            x, y = (float(value) * points_a_pixel for value in axis.transData.transform(place))
            near = [other for other_x, other in above if abs(other_x - x) < LABEL_WIDTH_POINTS]
            height = min([y, *(other - LABEL_HEIGHT_POINTS for other in near)])
            above.append((x, height))
            axis.annotate(
                row["coder"],
                place,
                textcoords="offset points",
                xytext=(4 if is_ours else -4, height - y),
                horizontalalignment="left" if is_ours else "right",
                verticalalignment="center",
                fontsize=LABEL_HEIGHT_POINTS,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8},
            )


def add_options(parser: ArgumentParser) -> None:
    """Rounds, sizes and the text."""
    add_rounds(parser, 3)
    parser.add_argument("--documents", type=int, default=1000, help="of the training text (default %(default)s)")
    parser.add_argument("--speed-tokens", type=int, default=SPEED_TOKENS, help="timed (default %(default)s)")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Code the text with every coder and write the table."""
    settings = composed(arguments.settings)
    path, measurement = RESULTS / settings.corpus / f"{NAME}.csv", identity(NAME, arguments, text_of(settings))
    if is_measured(path, measurement, timed=True):
        return
    corpus = load_corpus(settings.data)
    tokenizer = written_in(corpus)
    documents = documents_of(corpus.train, tokenizer.end_token, arguments.documents)
    texts = {settings.corpus: [tokenizer.decode(document) for document in documents]}
    sizes = (arguments.rounds, arguments.speed_tokens)
    rows = [row for stream in streams(texts) for row in measure_stream(*stream, *sizes)]
    write_measured(pd.DataFrame([{"experiment": NAME} | row | origin() for row in rows]), path, measurement)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / f"{NAME}.csv", markdown, draw_streams, ("coder", "bits_per_token"))
