"""A backbone of 1 B parameters with 1 M tokens on eight cards: which heads fit, spread in which way, at which batch?

    python -m experiments larger_than_one measure|draw

writes results/cost/larger_than_one.csv, .md and .png. On paper and by simulated memory: no such cards were here. What a
card computes in a step (activations, logits, gradients in the making) is simulated with its own sizes in bfloat16; what
it keeps and gathers is counted from shapes. The table states the assumptions.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from torch import Tensor, nn
from tqdm import tqdm

from experiments.cards.one_cards_share import (
    BACKBONE,
    CARDS,
    CHUNKED,
    FOLDED,
    FSDP,
    FULL,
    LAYOUTS,
    REPLICATED,
    SEQUENCE_LENGTH,
    VOCABULARY,
    VOCABULARY_SIZE,
    Case,
    head_of,
)
from experiments.study.figures import COLORS, COLUMN_INCHES, GREY, report, save
from experiments.study.measuring import COST, identity, is_measured, write_measured
from vocabfold.heads import equal_partition
from vocabfold.heads.traffic import folded_traffic, full_traffic, gradient_bytes
from vocabfold.machine import BYTES_PER_GIB, BYTES_PER_MIB, origin
from vocabfold.measure.simulate import SimulatedMemory, TrainingParts, simulated_peak_memory
from vocabfold.models.gpt import GPT
from vocabfold.runs.tables import RESULTS

SEQUENCES = (1, 2, 4, 8)  # of a card in a step
# What the driver leaves to programs of the nominal 80 and 24 GB, as nvidia-smi reports it for an H100 and an A10G.
USABLE_MIB = {"80 GB": 81_559, "24 GB": 23_028}
LOOKS = {FULL: (COLORS["red"], "s"), CHUNKED: (COLORS["orange"], "^"), FOLDED: (COLORS["blue"], "o")}
FLOAT, HALF = 4, 2  # bytes of a number
COLUMNS = ("layout", "head", "sequences", "peak_memory_gib")


@contextmanager
def making(dtype: torch.dtype) -> Iterator[None]:
    """Modules made within it have parameters of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def training_parts(case: Case, tokens: Tensor) -> TrainingParts:
    """One card's step: with weights in float32 and Adam where they are replicated; where they are gathered in
    bfloat16, with these and an optimizer that needs nothing."""
    # Made in bfloat16: simulated tensors cannot be converted in place.
    with making(torch.float32 if case.layout == REPLICATED else torch.bfloat16):
        backbone = GPT(BACKBONE)
    embedding = backbone.token_embedding.weight
    assert isinstance(embedding, nn.Parameter)
    # Rows of a sharded head are never gathered: float32, and autocast takes copies.
    with making(torch.bfloat16 if case.layout == FSDP else torch.float32):
        head, loss = head_of(case, embedding)
    model = nn.ModuleList([backbone, head])
    optimizer: torch.optim.Optimizer
    if case.layout == REPLICATED:
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), foreach=False)
    inputs = tokens.view(case.sequences, SEQUENCE_LENGTH)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(backbone(inputs).flatten(0, 1), tokens)

    return model, optimizer, step


@dataclass(frozen=True)
class Sizes:
    """Numbers in the parts of the model."""

    blocks: int
    block: int
    rest: int  # embeddings, the last norm, and a head's groups
    rows: int  # of a head that has its own

    @property
    def gathered(self) -> int:
        """All that FSDP spreads."""
        return self.blocks + self.rest


def sizes_of(case: Case) -> Sizes:
    """From shapes alone; only a vocabulary-sharded head has rows of its own, the others take the embedding's."""
    with torch.device("meta"):
        backbone = GPT(BACKBONE)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    blocks = sum(parameter.numel() for parameter in backbone.blocks.parameters())
    groups = equal_partition(VOCABULARY_SIZE).num_groups * BACKBONE.hidden_size if case.head == FOLDED else 0
    rows = VOCABULARY_SIZE * BACKBONE.hidden_size if case.layout == VOCABULARY else 0
    return Sizes(blocks, blocks // BACKBONE.num_layers, total - blocks + groups, rows)


def peak_bytes(case: Case, sizes: Sizes, memory: SimulatedMemory) -> float:
    """What a card holds at the peak of a step."""
    if case.layout == REPLICATED:
        # DDP copies all gradients into the buckets that it sends.
        return memory.peak_bytes + FLOAT * (sizes.gathered + sizes.rows)
    kept = 3 * FLOAT * (sizes.gathered + sizes.rows) / CARDS  # weights and Adam's two means
    grad_rows = FLOAT * sizes.rows / CARDS
    grad_blocks = FLOAT * sizes.blocks / CARDS
    gathered = HALF * (sizes.rest + 2 * sizes.block)  # this block and the next
    made = memory.peak_bytes - memory.parameter_bytes - memory.buffer_bytes - memory.optimizer_state_bytes
    computing = kept + gathered + made + memory.buffer_bytes
    # After the last block FSDP2 copies the gradients of all that is left in float32, and sums a part of each.
    reducing = kept + grad_rows + grad_blocks + memory.buffer_bytes + sizes.rest * (HALF + FLOAT + FLOAT / CARDS)
    return max(computing, reducing)


def sent_bytes(case: Case, sizes: Sizes) -> float:
    """Bytes that a card sends in a step."""
    if case.layout == REPLICATED:
        return gradient_bytes(sizes.gathered, CARDS)
    share = (CARDS - 1) / CARDS
    # Blocks are gathered for each pass, the rest once; gradients are summed in float32.
    spread = share * (HALF * (2 * sizes.blocks + sizes.rest) + FLOAT * sizes.gathered)
    if case.layout == FSDP:
        return spread
    traffic = (folded_traffic if case.head == FOLDED else full_traffic)(BACKBONE.hidden_size, CARDS, HALF)
    return spread + case.tokens * traffic.bytes_per_token + traffic.bytes_per_step


def simulate(case: Case, tokens: Tensor) -> dict[str, object]:
    """The row of one case."""
    memory = simulated_peak_memory(partial(training_parts, case, tokens[: case.tokens]))
    sizes = sizes_of(case)
    peak = peak_bytes(case, sizes, memory)
    return {
        **asdict(case),
        "tokens_of_a_card": case.tokens,
        "peak_memory_gib": peak / BYTES_PER_GIB,
        "simulated_activation_gib": memory.activation_bytes / BYTES_PER_GIB,
        "kept_numbers_of_a_card": round((sizes.gathered + sizes.rows) / (1 if case.layout == REPLICATED else CARDS)),
        "sent_gib_a_step": sent_bytes(case, sizes) / BYTES_PER_GIB,
        **{f"fits_{name.replace(' GB', '_gb')}": peak <= mib * BYTES_PER_MIB for name, mib in USABLE_MIB.items()},
    }


def cases() -> list[Case]:
    """Every layout, head and batch."""
    return [
        Case(layout, head, sequences) for layout, heads in LAYOUTS.items() for head in heads for sequences in SEQUENCES
    ]


def measure(arguments: Namespace) -> None:
    """Simulate every case and write the table."""
    path, measurement = COST / "larger_than_one.csv", identity("larger_than_one", arguments)
    if is_measured(path, measurement):
        return
    weights = 1.0 / torch.arange(1, VOCABULARY_SIZE + 1)
    generator = torch.Generator().manual_seed(0)
    number = max(SEQUENCES) * SEQUENCE_LENGTH
    tokens = torch.multinomial(weights, number, replacement=True, generator=generator)
    rows = [simulate(case, tokens) for case in tqdm(cases(), desc="simulated steps", mininterval=2.0)]
    table = pd.DataFrame(rows).assign(cards=CARDS, vocabulary_size=VOCABULARY_SIZE, **columns_of_backbone(), **origin())
    write_measured(table, path, measurement)


def columns_of_backbone() -> dict[str, int]:
    """The columns that tell its size."""
    return {"hidden_size": BACKBONE.hidden_size, "num_layers": BACKBONE.num_layers, "sequence_length": SEQUENCE_LENGTH}


def largest(rows: pd.DataFrame, card: str) -> str:
    """The most sequences that fit on a card, in words."""
    fitting = rows[rows["peak_memory_gib"] * 1024 <= USABLE_MIB[card]]["sequences"]
    if fitting.empty:
        return "none"
    most = int(fitting.max())
    return f"{most}{' or more' if most == max(SEQUENCES) else ''}"


def markdown(table: pd.DataFrame) -> str:
    """GiB by layout, head and batch, what fits, and what is sent."""
    batches = [f"{sequences}" for sequences in SEQUENCES]
    lines = [
        f"| on {CARDS} cards | head | GiB of a card at {', '.join(batches)} sequences | most on 80 GB "
        "| most on 24 GB | sent by a card at 4 sequences (GiB a step) |",
        "|---" * 6 + "|",
    ]
    for layout, heads in LAYOUTS.items():
        for head in heads:
            rows = table[(table["layout"] == layout) & (table["head"] == head)].sort_values("sequences")
            gib = ", ".join(f"{value:.1f}" for value in rows["peak_memory_gib"])
            sent = rows.set_index("sequences")["sent_gib_a_step"][4]
            lines.append(
                f"| {layout} | {head} | {gib} | {largest(rows, '80 GB')} | {largest(rows, '24 GB')} | {sent:.2f} |"
            )
    size = BACKBONE.hidden_size
    full, folded = (traffic(size, CARDS, HALF).bytes_per_token for traffic in (full_traffic, folded_traffic))
    usable = ", ".join(f"{name}: {mib:,} MiB" for name, mib in USABLE_MIB.items())
    lines += [
        "",
        f"The head of a vocabulary-sharded model sends {full:,.0f} bytes a token where it is the full softmax and "
        f"{folded:,.0f} where it is folded ({full / folded:.1f} times less): a hidden state goes to the one card that "
        "has its group, not to all.",
        "",
        "Simulated and counted, not measured; what it assumes:",
        "",
        f"* GPT-2 of hidden {size}, {BACKBONE.num_layers} layers, {BACKBONE.num_heads} heads (1.0 B parameters), "
        f"sequences of {SEQUENCE_LENGTH} tokens, V = {VOCABULARY_SIZE:,}, groups of about 1,000; no recomputation of "
        "activations and no parameters on the host.",
        "* Weights, gradient sums and Adam's two means in float32, products in bfloat16 (autocast by the CPU's lists "
        "of operators, attention fused). By these a full softmax in one piece takes 2 N V bytes more than on CUDA, "
        f"{2 * SEQUENCE_LENGTH * VOCABULARY_SIZE / BYTES_PER_GIB:.1f} GiB a sequence ([measured](../cards/gpu.md)); "
        "without them the same batches fit.",
        "* Replicated and FSDP models lend the embedding's rows to the head; a vocabulary-sharded head has rows of its "
        "own, 2.05 B more. The input embedding is spread by FSDP in both, and gathered whole in bfloat16.",
        "* FSDP as runs/sharding.py does it: embeddings and head gathered from the forward pass to the end of the "
        "backward pass, two blocks at a time, gradients copied to float32 before they are summed.",
        "* Tokens spread evenly over the cards that hold their groups. Fragments and buffers of allocator, NCCL and "
        "driver are left out, so that what is within 10% of a limit may not fit.",
        f"* Usable memory: {usable}.",
    ]
    return "\n".join([*lines, ""])


def draw_memory(table: pd.DataFrame, path: Path) -> None:
    """Memory over the batch, a panel a layout."""
    figure, axes = plt.subplots(1, len(LAYOUTS), figsize=(2 * COLUMN_INCHES, 2.6), sharey=True)
    for axis, (layout, heads) in zip(axes, LAYOUTS.items(), strict=True):
        for head in heads:
            rows = table[(table["layout"] == layout) & (table["head"] == head)].sort_values("sequences")
            color, marker = LOOKS[head]
            axis.plot(rows["sequences"], rows["peak_memory_gib"], color=color, marker=marker, label=head)
        for card, mib in USABLE_MIB.items():
            axis.axhline(mib / 1024, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
            if axis is axes[-1]:  # where no curve is in the way
                axis.text(SEQUENCES[0], mib / 1024, f"{card} card", fontsize=7, color=GREY, va="bottom")
        axis.set(xscale="log", yscale="log", xlabel="Sequences of 2,048 a card")
        axis.xaxis.set_major_locator(FixedLocator(SEQUENCES))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(FixedLocator([10, 20, 50, 100, 200, 500, 1000]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(layout, fontsize=8)
    axes[0].set_ylabel(f"Memory of each of {CARDS} cards (GiB)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, path)


def draw(corpus: str) -> None:
    """Write the picture and the table in words."""
    report(RESULTS / corpus / "larger_than_one.csv", markdown, draw_memory, COLUMNS)
