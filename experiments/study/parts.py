"""The parts of the study, each an order of steps: what is trained, measured and drawn, and with which text.

``python -m experiments PART reproduce [KEY=VALUE ...] [--second KEY=VALUE ...]`` takes them one after the other, each
in a program of its own, and stops at the first that fails. The programs themselves skip what has finished.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from vocabfold.command_line import ArgumentParser
from vocabfold.errors import UserError

if TYPE_CHECKING:
    from vocabfold.runs.settings import Settings

REPRODUCE = "reproduce"
SECOND = "--second"
FEWER_GROUP_SIZES = "28,104,225,728,3864"  # on a second text
FULL_GPT2 = ("main_comparison", "gpt2-full-seed")


@dataclass(frozen=True)
class Step:
    """``action`` (train, measure or draw) of the experiment ``name``, with ``words`` behind those that choose the text.

    text: the ``first`` or the ``second``, whose steps are left out where there is none, or ``own``, which the
    experiment itself chooses. only_on: the data.name of the first text without which the step is left out.
    begun_from: (experiment, beginning of a folder's name) of the finished runs that a sweep begins from.
    """

    action: str
    name: str
    words: tuple[str, ...] = ()
    text: str = "first"
    only_on: str | None = None
    begun_from: tuple[str, str] | None = None

    def is_taken(self, first: Sequence[str], second: Sequence[str]) -> bool:
        """Whether these texts want it."""
        if self.text == "second" and not second:
            return False
        return self.only_on is None or _settings(first).data["name"] == self.only_on

    def command(self, first: Sequence[str], second: Sequence[str]) -> list[str]:
        """What follows ``python -m``. Raises UserError where the runs to begin from are not there."""
        text = {"first": first, "second": second, "own": ()}[self.text]
        if self.action == "draw":
            return ["experiments", self.name, "draw"]
        if self.action == "measure":
            return ["experiments", self.name, "measure", *text, *self.words]
        begun = () if self.begun_from is None else (runs_to_begin_from(_settings(text).corpus, *self.begun_from),)
        return ["vocabfold.train", "--multirun", *text, f"experiment={self.name}", *self.words, *begun]


def train(name: str, *words: str, text: str = "first", only_on: str | None = None) -> Step:
    """The sweep of an experiment."""
    return Step("train", name, words, text, only_on)


def train_on(begun_from: tuple[str, str], name: str, *words: str) -> Step:
    """The sweep of an experiment over finished runs of another."""
    return Step("train", name, words, begun_from=begun_from)


def measure(name: str, text: str = "first") -> Step:
    """The table of an experiment."""
    return Step("measure", name, text=text)


def draw(*names: str) -> list[Step]:
    """The pictures of experiments, and their tables in words."""
    return [Step("draw", name) for name in names]


PARTS: dict[str, list[Step]] = {
    "smoke": [train("first_look", text="own"), measure("first_look", text="own"), *draw("first_look")],
    "paper": [
        train("main_comparison"),
        measure("main_comparison"),
        measure("document_losses"),
        train("figure3_group_size"),
        measure("figure3_group_size"),
        train("figure3_group_size", f"head.partition.group_size={FEWER_GROUP_SIZES}", text="second"),
        train("figure3_baseline", text="second"),
        measure("figure3_group_size", text="second"),
        measure("training_step"),
        measure("figure45_loop_or_shared"),
        measure("figure3_simulated_memory", text="own"),
        measure("table2_memory", text="own"),
        train("table1_story_quality", only_on="stories"),
        measure("table1_story_quality"),
        *draw("main_comparison", "figure3_group_size", "training_step", "figure45_loop_or_shared"),
        *draw("table1_story_quality", "table2_memory"),
    ],
    "pictures": [
        train("shapes", text="own"),
        measure("shapes", text="own"),
        measure("figure1_shapes", text="own"),
        *draw("figure1_shapes", "shapes"),
    ],
    "heads": [
        train("learning_rates"),
        measure("learning_rates"),
        train("heads_pareto"),
        measure("heads_pareto"),
        train("order_matters"),
        measure("order_matters"),
        train("vocabulary_scaling", text="own"),
        train("vocabulary_scaling", "head=full_untied", "data.vocabulary_size=10000,50257,100277", text="own"),
        train("larger_vocabulary", only_on="text"),
        measure("vocabulary_scaling", text="own"),
        measure("heads_cost"),
        measure("vocabulary_cost", text="own"),
        measure("table3_speed", text="own"),
        measure("head_memory", text="own"),
        measure("rare_tokens"),
        train("decode"),
        measure("decode"),
        train("main_comparison", "model=gpt2", "head=full"),
        train_on(FULL_GPT2, "fold"),
        train_on(FULL_GPT2, "fold", "head.partition.order=frequency", "head.partition.shortlist=2048"),
        measure("fold"),
        *draw("heads_pareto", "order_matters", "vocabulary_scaling", "vocabulary_cost", "table3_speed"),
        *draw("head_memory", "rare_tokens", "decode", "fold"),
    ],
    "embeddings": [
        train("embedding_compression"),
        train_on(("embedding_compression", "gpt2-shortlist_frequency-seed"), "embedding_compressed"),
        measure("embedding_compression"),
        train("main_comparison", "model=gpt2", "head=full"),
        train("both_ends"),
        train("both_ends", "embedding=tt_matrix", "embedding.compression=16"),
        measure("both_ends"),
        measure("embedding_speed", text="own"),
        measure("embedding_tables"),
        *draw("embedding_compression", "both_ends", "embedding_speed", "embedding_tables"),
    ],
    "tokens": [
        train("heads_pareto", "head=full_untied,scale_shift_bpe,linear_clustered,shortlist_frequency", "seed=0"),
        measure("token_coding"),
        measure("token_store"),
        measure("model_coding"),
        train("caching"),
        measure("caching"),
        *draw("token_coding", "token_store", "model_coding", "caching"),
    ],
    "report": draw("audit", "report"),
}


def _settings(words: Sequence[str]) -> Settings:
    from vocabfold.runs.compose import composed_settings  # torch, which a program that only waits need not load

    return composed_settings(words)


def runs_to_begin_from(corpus: str, experiment: str, beginning: str) -> str:
    """start.run=.. with every finished run whose folder's name begins so, quoted as Hydra reads it."""
    from vocabfold.runs.record import finished_runs

    folders = sorted(folder for folder, _ in finished_runs(experiment, corpus) if folder.name.startswith(beginning))
    if not folders:
        raise UserError(f"results/runs/{corpus}/{experiment} holds no finished run {beginning}*: train it first")
    return "start.run=" + ",".join('"' + str(folder).replace('"', '\\"') + '"' for folder in folders)


def reproduce(part: str, words: Iterable[str]) -> None:
    """Take the steps of a part. Raises UserError for unknown words, SystemExit with the status of a step that fails."""
    parser = ArgumentParser(prog=f"python -m experiments {part} {REPRODUCE}", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="the text (default: the embedded stories)")
    parser.add_argument(SECOND, nargs="+", default=[], metavar="KEY=VALUE", help="the same for a second text")
    options = parser.parse_args(list(words))
    first, second = options.settings, options.second
    steps = [step for step in PARTS[part] if step.is_taken(first, second)]
    for number, step in enumerate(steps, 1):
        command = step.command(first, second)
        print(f"{part}, step {number} of {len(steps)}: python -m {shlex.join(command)}", file=sys.stderr, flush=True)
        if status := status_of([sys.executable, "-m", *command]):
            raise SystemExit(status)


def status_of(command: Sequence[str]) -> int:
    """Run a program to its end and return its exit status, 128 and more for a signal's. An interrupt is left to the
    program, which the terminal has told too: it may have a checkpoint to write. SIGTERM is handed on to it."""
    running: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM:
            for program in running:
                program.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with subprocess.Popen(command) as process:
            running.append(process)
            status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
