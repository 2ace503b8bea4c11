"""What an exact reproduction of arXiv 2411.06371 must know about the paper: results/paper/audit.md.

    python -m experiments audit draw

Each point in our own words, with the computation that shows it, from the published values in results/paper and our
tables in results/cost and of one text. A point whose table is missing is one line, there and on stderr; the others are
written all the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from experiments.cards.gpu_steps import FORWARD, FP32, STEP
from experiments.cards.gpu_summary import ratio, ratio_words
from experiments.claims.base import measured, reference, rows_where
from experiments.claims.card import card_memory, card_name, card_steps, step_of
from experiments.claims.cost import is_printed, parameter_millions, simulated_peaks, speed_columns
from experiments.paper.paper_tables import MODELS
from experiments.paper.table2_memory import SETTINGS, saving
from experiments.paper.table3_speed import PASSES, WITH_ATTENTION, seconds_of
from experiments.study.statistics import difference_over_seeds
from vocabfold.data.stories import stories
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.heads import FoldedHead, ScaleShiftScorer, equal_partition
from vocabfold.measure.speed import ratio_summary
from vocabfold.runs.tables import RESULTS, read_table

CORPORA = ("paper",)  # beside the published values
TEXT = "tinystories"  # whose heads are compared
VOCABULARY_SIZE = 50_258  # the paper's: GPT-2's tokens and one for padding
SEQUENCE_LENGTH = 512
NUM_STORIES = 500
PADDING_SHARES = (0.0, 0.25, 0.5, 0.75)
TRUE_LOSS_NATS = 2.0  # an example
HIDDEN_SIZE, NUM_HIDDEN = 128, 1024


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table."""
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def flops() -> list[str]:
    """Point 1."""
    columns = ("model", "hidden_size", "forward_gflops", "attention_forward_gflops", "published_convention_gmacs")
    counts = measured("cost", "table3_flops", "python -m experiments table3_speed measure", columns)
    printed = reference("table3_speed").set_index("hidden_size")
    rows, wrong = [], []
    for _, row in counts.iterrows():
        published = float(printed.loc[row["hidden_size"], f"{row['model']}_gflops"])
        whole, attention = row["forward_gflops"] / 2, row["attention_forward_gflops"] / 2
        ours = row["published_convention_gmacs"]
        name = f"{MODELS[row['model']]}, {row['hidden_size']}"
        comes_out = "yes" if is_printed(ours, published) else "**no**"
        if not is_printed(ours, published):
            wrong.append(f"{name} ({published:g} printed, {ours:.3g} by the rule)")
        counted = "with" if WITH_ATTENTION[row["model"]] else "without"
        cells = [f"{published:g}", f"{whole - attention:.2f}", f"{whole:.2f}", f"{2 * whole:.2f}"]
        rows.append([name, *cells, counted, comes_out])
    header = ["model, hidden size", "printed GFLOPs", "10⁹ multiply-accumulates without attention products"]
    header += ["with them", "FLOPs (two each)", "rule", "comes out"]
    return [
        f"The column counts multiply-accumulates, not FLOPs, and those of one forward pass over one sequence of "
        f"{SEQUENCE_LENGTH} tokens, not of a training step over a batch. The products of attention are left out for "
        "GPT-2 and the grouped model and counted for GPT-Neo, so that the rows of a size cannot be compared.",
        "",
        *table(header, rows),
        "",
        f"Of {len(rows)} values {len(rows) - len(wrong)} come out. Not: {', '.join(wrong)}.",
    ]


def parameters() -> list[str]:
    """Point 2."""
    millions = parameter_millions("lean", "gpt2")
    printed = reference("table2_memory").drop_duplicates("hidden_size").set_index("hidden_size")["model_size_m"]
    rows = []
    for size in printed.index:
        untied = millions[size] + (VOCABULARY_SIZE - 1) * size / 1e6
        comes_out = "yes" if is_printed(millions[size], printed[size]) else "**no**"
        rows.append([str(size), f"{printed[size]:g}", f"{millions[size]:.2f}", f"{untied:.2f}", comes_out])
    return [
        "The model sizes are those of a GPT-2 with 8 layers whose head shares the rows of the embedding, but for the "
        "largest.",
        "",
        *table(["hidden size", "printed (M)", "tied, 8 layers (M)", "untied (M)", "tied comes out"], rows),
    ]


def efficiency() -> list[str]:
    """Point 3."""
    published = reference("table2_memory")
    rows = []
    for (millions, size), cells in published.groupby(["model_size_m", "hidden_size"]):
        known = {
            model: [float(value) for value in cells[f"{model}_gb"] if value != "oom"] for model in MODELS
        }  # the same on every card where it fits
        if not all(known.values()):
            continue
        neo, gpt2 = (known[model][0] / known["grouped"][0] for model in ("gpt_neo", "gpt2"))
        rows.append([f"{millions:g} M, {size}", f"{neo:.2f}", f"{gpt2:.2f}"])
    return [
        "The efficiency column of Table 2 is GPT-Neo's memory over the grouped model's, not GPT-2's. The headline is "
        "the first line; the larger model saves less.",
        "",
        *table(["model", "GPT-Neo over grouped", "GPT-2 over grouped"], rows),
    ]


def timer() -> list[str]:
    """Point 4."""
    timings = speed_columns()
    rows = []
    for (setting, size), part in timings.groupby(["setting", "hidden_size"]):
        step, forward = (seconds_of(part, name) for name in PASSES)
        for model in MODELS:
            share = ratio_summary({"forward": forward[model], "step": step[model]}, "forward", "step")
            cells = [f"{share.median:.0%} ({share.low:.0%} to {share.high:.0%})"]
            for seconds in (forward, step):
                faster = ratio_summary(seconds, model, "grouped")
                cells.append(f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})")
            rows.append([f"{MODELS[model]}, {size}, {SETTINGS[str(setting)]}", *cells])
    rows += timer_on_a_card()
    header = ["model, hidden size, setting", "share of a step that the forward pass takes"]
    header += ["grouped is faster by: forward only", "whole step"]
    return [
        "The timer of the training loop stops after the forward pass, before the backward pass and the optimizer, and "
        "on a GPU before the device has finished. What it divides tokens by is a part of a step (ours, on a CPU, every "
        "call waited for, and on the card that is named, in float32 by its own events):",
        "",
        *table(header, rows),
    ]


def timer_on_a_card() -> list[list[str]]:
    """The same of our models on one card, at the sizes measured there."""
    steps = card_steps()
    rows = []
    for size in sorted(set(steps["hidden_size"])):
        for model, title in MODELS.items():
            step, forward = step_of(steps, model, size, FP32), step_of(steps, model, size, FP32, FORWARD)
            share = ratio(forward, step)
            if share is None:
                continue
            cells = [f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})"]
            for part, own in ((FORWARD, forward), (STEP, step)):
                cells.append(ratio_words(ratio(own, step_of(steps, "grouped", size, FP32, part))))
            rows.append([f"{title}, {size}, {SETTINGS['lean']}, {card_name(steps)}", *cells])
    return rows


def padding() -> list[str]:
    """Point 5."""
    encode = load_tokenizer("gpt2").encode
    lengths = [min(SEQUENCE_LENGTH, len(encode(text))) for text in stories(0, 0, NUM_STORIES)]
    share_here = 1 - sum(lengths) / (SEQUENCE_LENGTH * len(lengths))
    rows = []
    for share in (*PADDING_SHARES, share_here):
        loss = (1 - share) * TRUE_LOSS_NATS
        rows.append([f"{share:.1%}", f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{math.exp(TRUE_LOSS_NATS):.2f}"])
    return [
        "The loss of the full-softmax models is a mean over all positions, padding too; the grouped model leaves "
        "padding out. Padding after padding is certain, so a model that has learned it pays nothing there: with a "
        "share p of padding the mean is (1 - p) times the loss of the text. The two perplexities cannot be compared.",
        f"Say the text costs {TRUE_LOSS_NATS:g} nats a token:",
        "",
        *table(["share of padding", "mean loss (nats)", "perplexity shown", "perplexity of the text"], rows),
        "",
        f"The last line: {NUM_STORIES} stories of our embedded corpus, one a row of {SEQUENCE_LENGTH} tokens.",
    ]


def slots() -> list[str]:
    """Point 6."""
    size = math.ceil(math.sqrt(VOCABULARY_SIZE))
    groups = math.ceil(VOCABULARY_SIZE / size)
    last = VOCABULARY_SIZE - (groups - 1) * size
    torch.manual_seed(0)
    hidden = torch.randn(NUM_HIDDEN, HIDDEN_SIZE)
    group_scores, slot_scores = (torch.nn.Linear(HIDDEN_SIZE, number)(hidden).softmax(-1) for number in (groups, size))
    within = slot_scores[:, last:].sum(-1)
    lost = (group_scores[:, -1] * within).mean().item()
    equal = equal_partition(VOCABULARY_SIZE, size)
    unowned = int((~equal.slot_exists).sum())
    head = FoldedHead(HIDDEN_SIZE, equal, ScaleShiftScorer(HIDDEN_SIZE, equal))
    total = head.log_prob(hidden[:8]).exp().sum(-1)
    return [
        f"The code cuts the {VOCABULARY_SIZE:,} ids by id // {size}, which makes {groups} groups; the last owns {last} "
        f"tokens, and {size - last} of its {size} slots belong to none. They are in the softmax all the same. In an "
        f"untrained head ({NUM_HIDDEN:,} random hidden states of size {HIDDEN_SIZE}) they take "
        f"{within.mean().item():.1%} of the last group and {lost:.3%} of everything: a token of the last group costs "
        f"{-(1 - within).log().mean().item():.2f} nats more than it should until the head has learned to avoid them, "
        "and sampling can draw what is no token.",
        "",
        f"The paper's own formula, floor(V g / G), leaves {unowned} such slots over all {equal.num_groups} groups, at "
        f"most one in each ({int((~equal.slot_exists).sum(-1).max())}). Here they are masked: the probabilities of the "
        f"{VOCABULARY_SIZE:,} tokens sum to {total.min().item():.6f} to {total.max().item():.6f}.",
    ]


def another_model() -> list[str]:
    """Point 7."""
    rows = []
    lean, released = (parameter_millions(setting, "grouped") for setting in ("lean", "paper_code"))
    positions = {size: SEQUENCE_LENGTH * size / 1e6 for size in lean.index}
    for size in lean.index:
        cells = [f"{lean[size]:.3f}", f"{released[size]:.3f}", f"{lean[size] - released[size]:.3f}"]
        rows.append([str(size), *cells, f"{positions[size]:.3f}"])
    peak, _ = simulated_peaks()
    memory = ", ".join(
        f"{SETTINGS[setting]} {peak[setting, 'grouped', HIDDEN_SIZE]:.2f} GiB" for setting in ("lean", "paper_code")
    )
    return [
        "The text says that the grouped model is GPT-2 with another head. The released code builds it of encoder "
        "layers that normalise after each block, with sinusoidal positions and dropout 0.1: it has no learned "
        "positions and no last normalisation, hence other parameter counts, and keeps dropout's masks. So the "
        "published comparison changes the head and the backbone at once. `experiments/paper/paper_code.py` builds it; "
        "everything else here follows the text.",
        "",
        *table(["hidden size", "GPT-2, grouped (M)", "released code (M)", "difference", "learned positions (M)"], rows),
        "",
        f"Simulated memory of a step at hidden {HIDDEN_SIZE}, 32 x {SEQUENCE_LENGTH}: {memory}.",
    ]


def unread_size() -> list[str]:
    """Point 8."""
    return [
        "The shell script behind Figure 3 passes the group size as an option that the training program never reads: "
        "run as it stands it changes nothing from point to point. This is a fact of files that are not part of "
        "this repository; nothing can be computed for it. Our sweep (`conf/experiment/figure3_group_size.yaml`) sets "
        "`head.partition.group_size`, which stands in every row of its table beside the number of groups that came of "
        "it.",
    ]


def choices() -> list[str]:
    """What follows for a comparison of heads."""
    heads = read_table("heads_pareto", TEXT)
    pairs = {
        "rows of its own instead of the embedding's, full softmax": ("full_untied", "full"),
        "random order instead of token ids, scale and shift": ("scale_shift_random", "scale_shift_bpe"),
        "frequency order instead of token ids, scale and shift": ("scale_shift_frequency", "scale_shift_bpe"),
        "clustered order instead of token ids, scale and shift": ("scale_shift_clustered", "scale_shift_bpe"),
        "a layer a group instead of scale and shift, token ids": ("linear_bpe", "scale_shift_bpe"),
        "the grouped head instead of GPT-2's full softmax": ("scale_shift_bpe", "full"),
    }
    rows = []
    for change, (new, old) in pairs.items():
        if not {new, old} <= set(heads["head"]):
            continue
        found = difference_over_seeds(heads, "head", new, old)
        rows.append([change, f"{found.mean:+.3f} ± {found.half_width:.3f}", f"{found.p_value:.2g}", str(found.count)])
    return [
        "The paper compares one grouped head with full softmaxes at one learning rate. What it leaves fixed, order, "
        "token scorer and sharing of rows, moves the loss as much as the head itself (each at its own best learning "
        f"rate, {TEXT}, results/{TEXT}/heads_pareto.csv):",
        "",
        *table(["change", "loss (nats), 95%", "p", "seeds"], rows),
    ]


def simulation() -> list[str]:
    """What follows for Table 2."""
    peak, _ = simulated_peaks()
    printed = rows_where(reference("table2_memory"), "table2_memory.csv", hidden_size=HIDDEN_SIZE, gpu="L40S").iloc[0]
    rows = [["published", *(str(printed[f"{model}_gb"]) for model in MODELS),
             f"{float(printed['gpt_neo_gb']) / float(printed['grouped_gb']):.1f}"]]  # fmt: skip
    for setting, title in SETTINGS.items():
        values = [peak.get((setting, model, HIDDEN_SIZE)) for model in MODELS]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        rows.append([title, *cells, f"{saving(peak, setting, HIDDEN_SIZE):.1f}"])
    steps = card_steps()
    if (gib := card_memory(steps, HIDDEN_SIZE)) is not None:
        cells = [f"{gib[model]:.2f}" for model in MODELS]
        rows.append([f"{SETTINGS['lean']}, measured ({card_name(steps)})", *cells,
                     f"{gib['gpt_neo'] / gib['grouped']:.1f}"])  # fmt: skip
    return [
        "Memory can be simulated without the card, so the table can be taken apart. The saving is a ratio of two whole "
        "models: with the same head it is large over a lean backbone and small where attention keeps its T x T "
        "tensors. The published ratio says as much about the backbone as about the head.",
        "",
        *table([f"GiB at hidden {HIDDEN_SIZE}", *MODELS.values(), "GPT-Neo over grouped"], rows),
    ]


POINTS: dict[str, Callable[[], list[str]]] = {
    "GFLOPs in Table 3 are multiply-accumulates of one sequence, not all counted alike": flops,
    "The largest model has fewer parameters than printed": parameters,
    "Efficiency is against GPT-Neo": efficiency,
    "Tokens a second are those of a part of a step": timer,
    "Padding is in one loss and not in the other": padding,
    "Slots that no token owns take probability": slots,
    "The grouped model released is not GPT-2": another_model,
    "The sweep's size is not read": unread_size,
    "What is held fixed matters as much as what is compared": choices,
    "The saving depends on the backbone": simulation,
}


def draw(corpus: str) -> None:
    """Write the list; ``corpus`` is the folder that takes it, paper."""
    lines = ["# Slips of arXiv 2411.06371 that a reproduction must know", ""]
    lines += ["Written by `python -m experiments audit draw`; every number is computed when it runs.", ""]
    for number, (title, point) in enumerate(POINTS.items(), 1):
        try:
            words = point()
        except UserError as error:
            print(f"audit: point {number}: {error}", file=sys.stderr)
            words = [f"Not computed: {error}"]
        lines += [f"## {number}. {title}", "", *words, ""]
    text = "\n".join(lines)
    path = RESULTS / corpus / "audit.md"
    write_text(path, text)
    print(f"wrote {path}")
