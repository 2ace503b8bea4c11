"""Table 3 of arXiv 2411.06371: tokens per second and FLOPs of GPT-2, GPT-Neo and the paper's head.

    python -m experiments table3_speed measure [--rounds 5] [--hidden-sizes 128 256]
    python -m experiments table3_speed draw

times whole training steps and, apart, the forward pass alone (what the published figures are), all models in one
interleaved run, and counts FLOPs at the published sizes. results/cost/table3_speed.csv has a row for each model, pass
and round, table3_flops.csv the counts; table3_speed.md has both beside the published values.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from experiments.paper.paper_tables import MODELS, SETTINGS, Case
from experiments.study.figures import read_measured
from experiments.study.measuring import COST, add_rounds, identity, is_measured, measuring_device, write_measured
from vocabfold.files import write_text
from vocabfold.machine import origin
from vocabfold.measure.flops import count_flops, count_flops_by_operator
from vocabfold.measure.simulate import tensors_without_data
from vocabfold.measure.speed import interleaved_seconds, ratio_summary, tokens_per_second
from vocabfold.runs.tables import RESULTS

PUBLISHED_HIDDEN_SIZES = (128, 256, 1024)
SEQUENCE_LENGTH = 512
TIMED_SETTINGS = ("lean", "paper_code")
PASSES = {"training step": "whole step", "forward": "forward only"}
# The published counts leave the attention products out, but for GPT-Neo.
WITH_ATTENTION = {"gpt2": False, "gpt_neo": True, "grouped": False}
ATTENTION_OPERATORS = ("scaled_dot_product", "bmm")


def count(model: str, hidden_size: int) -> dict[str, object]:
    """FLOPs of a lean model over one sequence of 512 tokens; no tensor has data, so any size is counted at once."""
    case = Case("lean", model, hidden_size, batch_size=1, sequence_length=SEQUENCE_LENGTH)
    with tensors_without_data():
        module, _, loss = case.build()
        forward = count_flops_by_operator(loss)
        training = count_flops(lambda: loss().backward())
    attention = sum(flops for name, flops in forward.items() if any(part in name for part in ATTENTION_OPERATORS))
    forward_flops = sum(forward.values())
    counted = forward_flops if WITH_ATTENTION[model] else forward_flops - attention
    return {
        "model": model,
        "hidden_size": hidden_size,
        "published_convention_gmacs": counted / 2 / 1e9,
        "forward_gflops": forward_flops / 1e9,
        "attention_forward_gflops": attention / 1e9,
        "training_gflops": training / 1e9,
        "training_flops_per_token": training / SEQUENCE_LENGTH,
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
    }


def methods_of(
    hidden_size: int, batch_size: int, device: torch.device
) -> dict[tuple[str, str, str], Callable[[], None]]:
    """A whole training step and a forward pass for each setting and model, all on random tokens."""
    methods: dict[tuple[str, str, str], Callable[[], None]] = {}
    for setting in TIMED_SETTINGS:
        for model in MODELS:
            torch.manual_seed(0)
            case = Case(setting, model, hidden_size, batch_size, SEQUENCE_LENGTH)
            module, optimizer, loss = case.build(device)

            def step(
                module: nn.Module = module,
                optimizer: torch.optim.Optimizer = optimizer,
                loss: Callable[[], torch.Tensor] = loss,
            ) -> None:
                optimizer.zero_grad(set_to_none=True)
                loss().backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()

            def forward(loss: Callable[[], torch.Tensor] = loss) -> None:
                loss()

            methods[setting, model, "training step"] = step
            methods[setting, model, "forward"] = forward
    return methods


def measure_passes(hidden_sizes: list[int], batch_size: int, rounds: int, device: torch.device) -> pd.DataFrame:
    """One row a model, pass and round."""
    rows = []
    for hidden_size in hidden_sizes:
        methods = methods_of(hidden_size, batch_size, device)
        by_name = {"/".join(key): run for key, run in methods.items()}
        seconds = interleaved_seconds(by_name, rounds, 1, device, progress=True)
        for setting, model, part in methods:
            for round_index, value in enumerate(seconds[f"{setting}/{model}/{part}"]):
                key = {"setting": setting, "model": model, "hidden_size": hidden_size, "pass": part}
                tokens = batch_size * SEQUENCE_LENGTH
                rows.append(key | {"round": round_index, "seconds": value, "tokens": tokens})
    return pd.DataFrame(rows)


def flops_table(counts: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """Published and recomputed counts."""
    lines = [
        "| model, hidden size | published GFLOPs | the same rule, recomputed | forward GFLOPs | training GFLOPs "
        "| training FLOPs a token | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in counts.iterrows():
        printed = published.loc[published["hidden_size"] == row["hidden_size"], f"{row['model']}_gflops"].iloc[0]
        lines.append(
            f"| {MODELS[row['model']]}, {row['hidden_size']} | {printed:g} | {row['published_convention_gmacs']:.2f} "
            f"| {row['forward_gflops']:.2f} | {row['training_gflops']:.2f} | {row['training_flops_per_token']:,.0f} "
            f"| {row['num_parameters']:,} |"
        )
    return lines


def seconds_of(rows: pd.DataFrame, part: str) -> dict[str, list[float]]:
    """Seconds of every round of each model in one pass, from the rows of one hidden size and setting."""
    own = rows[rows["pass"] == part]
    return {str(model): values["seconds"].tolist() for model, values in own.groupby("model")}


def speed_table(table: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """Tokens per second of both passes, and the grouped model's ratio to each, beside the published ones."""
    lines = [
        "| model, hidden size, setting | published tokens/s (ratio) | whole step: tokens/s | grouped is faster by "
        "| forward only: tokens/s | grouped is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for (hidden_size, setting), rows in table.groupby(["hidden_size", "setting"]):
        printed = published[published["hidden_size"] == hidden_size].iloc[0]
        tokens = int(rows["tokens"].iloc[0])
        for model, title in MODELS.items():
            ratio = printed["grouped_tokens_per_s"] / printed[f"{model}_tokens_per_s"]
            cells = [f"{printed[f'{model}_tokens_per_s']:,.0f} ({ratio:.2f})"]
            for part in PASSES:
                seconds = seconds_of(rows, part)
                faster = ratio_summary(seconds, model, "grouped")
                cells.append(f"{tokens_per_second(seconds[model], tokens):,.0f}")
                cells.append(f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})")
            lines.append(f"| {title}, {hidden_size}, {SETTINGS[str(setting)]} | " + " | ".join(cells) + " |")
    return lines


def add_options(parser: ArgumentParser) -> None:
    """Rounds and sizes."""
    add_rounds(parser, 5)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of 512 tokens (default %(default)s)")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[128, 256], choices=PUBLISHED_HIDDEN_SIZES)


def measure(arguments: Namespace) -> None:
    """Time and count every model and write both tables."""
    path, measurement = COST / "table3_speed.csv", identity("table3_speed", arguments)
    if is_measured(path, measurement, timed=True):
        return
    device = measuring_device()
    sizes = [(model, hidden_size) for hidden_size in PUBLISHED_HIDDEN_SIZES for model in MODELS]
    counts = pd.DataFrame([count(*size) for size in tqdm(sizes, desc="counted models")])
    timed = measure_passes(arguments.hidden_sizes, arguments.batch_size, arguments.rounds, device)
    write_measured(counts.assign(**origin()), path.with_name("table3_flops.csv"), measurement)
    write_measured(timed.assign(**origin()), path, measurement)


def draw(corpus: str) -> None:
    """Write both tables beside the published values."""
    path = RESULTS / corpus / "table3_speed.csv"
    timed, counts = read_measured(path, ("pass", "seconds")), read_measured(path.with_name("table3_flops.csv"))
    published = pd.read_csv(RESULTS / "paper" / "table3_speed.csv")
    first = timed.iloc[0]
    setting = (
        f"Timed: V = 50,257, 8 layers, 8 heads, batch {first['tokens'] // SEQUENCE_LENGTH} x {SEQUENCE_LENGTH}, fp32, "
        f"Adam; {timed['round'].nunique()} interleaved rounds, medians, and 2.5 to 97.5% range of the rounds' ratios.\n"
        f"FLOPs: one sequence of {SEQUENCE_LENGTH} tokens; the published rule counts multiply-accumulates of the "
        f"forward pass, attention products only for GPT-Neo.\n{first['hardware']}; torch {first['torch']}.\n"
    )
    words = "\n".join([*flops_table(counts, published), "", *speed_table(timed, published), "", setting])
    write_text(path.with_suffix(".md"), words)
    print(f"{words}wrote {path.with_suffix('.md')}")
