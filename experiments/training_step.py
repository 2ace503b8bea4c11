"""One training step with each head, in one interleaved run: seconds, tokens per second, peak memory, FLOPs.

    python experiments/training_step.py [--scale laptop] [--rounds 7]

writes results/SCALE/training_step.csv, one row a head and round, and prints each head's ratio to the full softmax.
``free`` is the same backbone with a head that costs nothing: no head can be faster or leaner.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from vocabfold.allocator import keep_freed_memory
from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.files import write_text
from vocabfold.heads import HeadSettings
from vocabfold.heads.build import PartitionSettings
from vocabfold.measure.flops import training_flops_per_token
from vocabfold.measure.machine import (
    BYTES_PER_GIB,
    code_commit,
    hardware,
    matrix_rate_flops_per_second,
    torch_version,
)
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.speed import interleaved_seconds, ratio_summary, tokens_per_second
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model
from vocabfold.records import RESULTS

VOCABULARY_SIZE = 50_257
SHORTLIST = PartitionSettings(shortlist=2048)
HEADS = {
    "full": HeadSettings(name="full", tied=True),
    "grouped scale_shift_sorted": HeadSettings(name="grouped", tied=False, scorer="scale_shift_sorted"),
    "grouped scale_shift": HeadSettings(name="grouped", tied=False, scorer="scale_shift"),
    "grouped low_rank_sorted": HeadSettings(name="grouped", tied=False, scorer="low_rank_sorted"),
    "grouped linear_sorted": HeadSettings(name="grouped", tied=True, scorer="linear_sorted"),
    "grouped linear_sorted shortlist": HeadSettings(
        name="grouped", tied=True, scorer="linear_sorted", partition=SHORTLIST
    ),
    "grouped linear_sorted free": HeadSettings(name="grouped", tied=False, scorer="linear_sorted"),
    "grouped linear_looped": HeadSettings(name="grouped", tied=True, scorer="linear_looped"),
}
FREE = "free"


class Side:
    """One model with its optimizer and a fixed batch of random tokens [B, T]."""

    def __init__(self, model: ModelWithHead, batch: tuple[Tensor, Tensor], loss: Callable[[], Tensor]) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.optimizer = torch.optim.Adam(model.parameters(), foreach=True)

    def step(self) -> None:
        """A whole training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def build_sides(model_settings: ModelSettings, batch: tuple[Tensor, Tensor], device: torch.device) -> dict[str, Side]:
    """The heads to compare on equal backbones, and the backbone alone."""
    sides = {}
    for name, head_settings in HEADS.items():
        torch.manual_seed(0)
        model = build_model(model_settings, head_settings, VOCABULARY_SIZE).to(device)
        sides[name] = Side(model, batch, lambda model=model: model(*batch).loss)  # type: ignore[misc]
    torch.manual_seed(0)
    model = build_model(model_settings, HEADS["full"], VOCABULARY_SIZE).to(device)
    sides[FREE] = Side(model, batch, lambda: model.backbone(batch[0]).mean())
    return sides


def measure(sides: dict[str, Side], rounds: int, device: torch.device) -> pd.DataFrame:
    """One row a side and round."""
    num_tokens = next(iter(sides.values())).batch[0].numel()
    seconds = interleaved_seconds({name: side.step for name, side in sides.items()}, rounds, 2, device, progress=True)
    rows = []
    for name, side in sides.items():
        memory = peak_memory_of(side.step, device, live_tensors(side.model, side.optimizer))
        flops = training_flops_per_token(lambda side=side: side.loss().backward(), num_tokens)  # type: ignore[misc]
        for round_index, value in enumerate(seconds[name]):
            row = {"side": name, "round": round_index, "seconds": value, "tokens": num_tokens}
            rows.append(row | {"peak_memory_gib": memory.peak_bytes / BYTES_PER_GIB, "flops_per_token": flops})
    return pd.DataFrame(rows)


def report(table: pd.DataFrame, rate: float) -> str:
    """Each side against the full softmax and the free head: median of per-round ratios and their 2.5-97.5% range."""
    seconds = {str(name): rows["seconds"].tolist() for name, rows in table.groupby("side", sort=False)}
    free = table[table["side"] == FREE].iloc[0]
    lines = [
        "| head | tokens/s | speed, full = 1 | speed, free head = 1 | peak memory (GiB) | memory, free head = 1 "
        "| step / FLOP floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        row = table[table["side"] == name].iloc[0]
        to_full, to_free = ratio_summary(seconds, "full", name), ratio_summary(seconds, FREE, name)
        floor_seconds = row["flops_per_token"] * row["tokens"] / rate
        above_floor = pd.Series(values).median() / floor_seconds
        lines.append(
            f"| {name} | {tokens_per_second(values, int(row['tokens'])):,.0f} "
            f"| {to_full.median:.2f} ({to_full.low:.2f} to {to_full.high:.2f}) "
            f"| {to_free.median:.2f} ({to_free.low:.2f} to {to_free.high:.2f}) "
            f"| {row['peak_memory_gib']:.3f} | {row['peak_memory_gib'] / free['peak_memory_gib']:.2f} "
            f"| {above_floor:.1f} |"
        )
    return "\n".join(lines)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="laptop", help="results/SCALE takes the table (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does; it helps the full softmax most
    model_settings = ModelSettings(
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        num_heads=arguments.num_heads,
        max_positions=arguments.sequence_length,
    )
    shape = (arguments.batch_size, arguments.sequence_length + 1)
    # Real token frequencies fall roughly as 1 / rank, which decides how many groups a batch touches.
    weights = 1.0 / torch.arange(1, VOCABULARY_SIZE + 1)
    tokens = torch.multinomial(
        weights, shape[0] * shape[1], replacement=True, generator=torch.Generator().manual_seed(0)
    )
    tokens = tokens.view(shape).to(device)
    table = measure(build_sides(model_settings, (tokens[:, :-1], tokens[:, 1:]), device), arguments.rounds, device)
    table = table.assign(
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        hardware=hardware(),
        torch=torch_version(),
        commit=code_commit(),
        command=" ".join(["python experiments/training_step.py", *sys.argv[1:]]),
    )
    path = RESULTS / arguments.scale / "training_step.csv"
    write_text(path, table.to_csv(index=False))
    rate = matrix_rate_flops_per_second(device, torch.float32)
    setting = (
        f"Hidden {arguments.hidden_size}, {arguments.num_layers} layers, V = {VOCABULARY_SIZE:,}, batch "
        f"{arguments.batch_size} x {arguments.sequence_length}, fp32, Adam; {arguments.rounds} interleaved rounds: "
        "median of the rounds' ratios and their 2.5 to 97.5% range.\n"
        f"Matrix rate of the machine: {rate / 1e9:.0f} GFLOP/s. {hardware()}; torch {torch_version()}.\n"
    )
    words = f"{report(table, rate)}\n\n{setting}"
    write_text(path.with_suffix(".md"), words)
    print(words + f"wrote {path}")


if __name__ == "__main__":
    main()
