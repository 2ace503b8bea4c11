"""Greedy decoding of finished models with the screened output layer, against dense ones.

    python -m experiments real_decode measure --smollm2 FILE.gguf [--rounds 5] [--tokens 24] [--threads 2]
    python -m experiments real_decode draw

SmolLM2-135M-Instruct (``python -m vocabfold.hugging_face.fetch`` prints its path) continues the start of a story; the
shape of Gemma 3 270M (V = 262,144, D = 640) has random weights, for speed only. Methods take turns, so ratios hold on a
machine that is not idle. ``measure`` writes results/cost/real_decode.csv, one row a model, method, part and round: the
whole of decoding (``part`` decode, seconds a token) and the output layer alone on the states of that text (``part``
head, seconds a call).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vocabfold.errors import UserError
from vocabfold.files import replacing, write_text
from vocabfold.hugging_face import ScreenedHead, generate, load, screen
from vocabfold.hugging_face.screened_state import Counts
from vocabfold.machine import origin
from vocabfold.measure.speed import interleaved_seconds, ratio_summary

RESULTS = Path("results") / "cost"
STORY = "Once upon a time there was a little girl named Lily. She loved to play outside in the park"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {  # the least ratio of dense seconds to screened seconds, of whole decoding
    ("SmolLM2-135M", "fp32"): 1.2,
    ("SmolLM2-135M", "bf16"): 1.1,
    ("Gemma 3 270M shape", "fp32"): 2.5,
    ("Gemma 3 270M shape", "bf16"): 1.8,
}


class DenseHead:
    """The product with all rows behind the one method that ``generate`` calls."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def sample(self, hidden: Tensor, *_: Any) -> Tensor:
        """``hidden`` [N, D] -> the likeliest token [N]."""
        return F.linear(hidden, self.rows).argmax(dim=-1)


class RoundedHead(DenseHead):
    """The int8 product without its bounds: fast, and not always the same token."""

    def __init__(self, head: ScreenedHead) -> None:
        self.head = head

    def sample(self, hidden: Tensor, *_: Any) -> Tensor:
        """``hidden`` [N, D] -> the likeliest token [N] of the rounded logits."""
        quantised = self.head.quantised
        return quantised.product(quantised.round_states(hidden, parts=1).steps).argmax(dim=-1)


def gemma_shape() -> Any:
    """A model of Gemma 3 270M's shape with random weights."""
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


@torch.inference_mode()
def states_of(model: Any, ids: Tensor) -> Tensor:
    """The hidden states [L, D] of a text."""
    hidden: Tensor = model.base_model(input_ids=ids).last_hidden_state[0]
    return hidden


def own_generate(model: Any, ids: Tensor, num_tokens: int) -> Tensor:
    """transformers' own greedy decoding of exactly ``num_tokens`` tokens."""
    text: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return text


def measure_model(name: str, model: Any, ids: Tensor, num_tokens: int, rounds: int) -> list[dict[str, object]]:
    """Rows of one model in both types. ``ids`` [1, L]: what it continues."""
    decoding: dict[str, Callable[[], Tensor]] = {}
    heads: dict[str, Callable[[], object]] = {}
    columns: dict[str, dict[str, object]] = {}
    for type_name, dtype in DTYPES.items():
        of_type = type(model)(model.config)
        of_type.load_state_dict(model.state_dict())
        of_type = of_type.to(dtype).eval()
        head = screen(of_type)
        rows = of_type.get_output_embeddings().weight.detach()
        dense = DenseHead(rows)
        methods: dict[str, Any] = {"screened": head, "dense": dense, "int8, not exact": RoundedHead(head)}
        for method, each in methods.items():
            decoding[f"{method} {type_name}"] = partial(generate, of_type, each, ids, num_tokens)
        decoding[f"transformers {type_name}"] = partial(own_generate, of_type, ids, num_tokens)
        texts = {method: generate(of_type, each, ids, num_tokens)[0] for method, each in methods.items()}
        states = states_of(of_type, texts["dense"].unsqueeze(0))[-num_tokens - 1 : -1]
        for method, each in methods.items():
            for batch in (1, 16):
                some = states[:batch] if batch <= len(states) else states.repeat(batch, 1)[:batch]
                heads[f"{method} {type_name} batch {batch}"] = partial(each.sample, some, 0.0)
            columns[f"{method} {type_name}"] = {
                "same_tokens": float((texts[method] == texts["dense"])[ids.shape[1] :].float().mean()),
            }
        head.counts = Counts()
        for state in states.split(1):
            head.greedy(state)
        columns[f"screened {type_name}"] |= {
            "mib_a_token": head.bytes_read / len(states) / 2**20,
            "rows_scored_a_token": head.counts.scored / len(states),
            "dense_products_a_token": head.counts.dense / len(states),
        }
        columns[f"dense {type_name}"]["mib_a_token"] = rows.numel() * rows.element_size() / 2**20
        columns[f"int8, not exact {type_name}"]["mib_a_token"] = head.quantised.num_bytes / 2**20
    cpu = torch.device("cpu")
    table: list[dict[str, object]] = []
    for part, calls, unit in (("head", heads, 1), ("decode", decoding, num_tokens)):
        seconds = interleaved_seconds(calls, rounds, 1, cpu, progress=True)
        for call, values in seconds.items():
            method, _, size = call.partition(" batch ")
            row: dict[str, object] = {"model": name, "part": part, "method": method, "batch": int(size or 1)}
            row |= columns.get(method, {})
            table += [row | {"round": index, "seconds": value / unit} for index, value in enumerate(values)]
    return table


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``measure``."""
    parser.add_argument(
        "--smollm2", type=Path, help="GGUF file of SmolLM2-135M-Instruct; without it only Gemma's shape"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each text")
    parser.add_argument("--threads", type=int, default=2)


def measure(arguments: argparse.Namespace) -> None:
    """Write results/cost/real_decode.csv."""
    torch.set_num_threads(arguments.threads)
    rows = []
    if arguments.smollm2 is not None:
        model, tokenizer = load(arguments.smollm2)
        ids = tokenizer(STORY, return_tensors="pt").input_ids
        rows += measure_model("SmolLM2-135M", model, ids, arguments.tokens, arguments.rounds)
    ids = torch.randint(262_144, (1, 20), generator=torch.Generator().manual_seed(0))
    rows += measure_model("Gemma 3 270M shape", gemma_shape(), ids, arguments.tokens, arguments.rounds)
    table = pd.DataFrame(rows).assign(threads=arguments.threads, **origin())
    with replacing(RESULTS / "real_decode.csv") as beside:
        table.to_csv(beside, index=False)


def draw(corpus: str) -> None:
    """Write results/CORPUS/real_decode.md from its csv: medians, ratios to dense with the spread of rounds, goals."""
    path = Path("results") / corpus / "real_decode.csv"
    if not path.is_file():
        raise UserError(f"there is no {path}: python -m experiments real_decode measure")
    table = pd.read_csv(path)
    columns = ("ms a token", "dense of the same type takes", "MiB read", "rows scored", "dense products", "same tokens")
    lines = [f"| model | part | batch | method | {' | '.join(columns)} |", "|---" * 10 + "|"]
    goals = ["| goal | measured | |", "|---|---|---|"]
    for (model, part, batch), rows in table.groupby(["model", "part", "batch"], sort=False):
        seconds = {str(method): list(each.sort_values("round")["seconds"]) for method, each in rows.groupby("method")}
        for method, each in rows.groupby("method"):
            type_name = str(method).rpartition(" ")[2]
            ratio = ratio_summary(seconds, f"dense {type_name}", str(method))
            first = each.iloc[0]
            optional = [
                "" if pd.isna(first[column]) else f"{first[column]:.3g}"
                for column in ("mib_a_token", "rows_scored_a_token", "dense_products_a_token", "same_tokens")
            ]
            milliseconds = 1e3 * float(each["seconds"].median()) / int(first["batch"])
            times = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) times as long"
            lines.append(
                f"| {model} | {part} | {batch} | {method} | {milliseconds:.2f} | {times} | {' | '.join(optional)} |"
            )
            goal = GOALS.get((str(model), type_name))
            if part == "decode" and goal is not None and str(method).startswith("screened"):
                verdict = "met" if ratio.median >= goal else "**not met**"
                goals.append(
                    f"| {model}, {type_name}: {goal} times as fast as dense | {ratio.median:.2f} | {verdict} |"
                )
    first = table.iloc[0]
    where = f"{first['hardware']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}"
    write_text(path.with_suffix(".md"), "\n".join([*lines, "", *goals, "", f"Measured on {where}.", ""]))
