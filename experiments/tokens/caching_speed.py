"""Decoding with each cache, in one interleaved run: tokens per second and time to first token.

    python -m experiments caching_speed [--scale laptop] [--rounds 5] [--run FOLDER]

needs a run of experiment=caching and writes results/SCALE/caching.csv, one row a workload, cache and round;
caching_memory.py measures bytes, caching_perplexity.py what rounding costs, caching.py draws and judges.
Peers: transformers' caches around a GPT-2 of the same size with random weights, since published ones need a network;
speeds of the two libraries stand side by side, and only ratios within one are concluded from.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.study.program import measuring_parser
from experiments.tokens.caching_perplexity import finished_runs
from vocabfold.command_line import one_line_errors
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.generate import generate
from vocabfold.inference import PrefixCache, ResponseCache, fingerprint
from vocabfold.machine import BYTES_PER_MIB, origin
from vocabfold.measure.allocator import keep_freed_memory
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.load import load_run
from vocabfold.runs.record import RESULTS, finished_row
from vocabfold.runs.settings import load_settings

LIMIT_BYTES = 256 * BYTES_PER_MIB  # of each prefix and each response cache: nothing is evicted here
# Ours: (keys and values, prefix cache, response cache). The last one is the guide's last step, coding and caching
# combined: int8 keys and values, beginnings kept as the same int8 rows, answers deflated on disk.
OURS = {
    "none": ("none", False, False),
    "key/value": ("exact", False, False),
    "bf16": ("bf16", False, False),
    "int8": ("int8", False, False),
    "int4": ("int4", False, False),
    "prefix": ("exact", True, False),
    "response": ("exact", False, True),
    "all exact": ("exact", True, True),
    "all coded": ("int8", True, True),
}
PEERS = {"none": "none", "key/value": "dynamic", "static": "static", "fp8": "fp8", "int4": "int4", "prefix": "dynamic"}
REUSE = ("key/value", "prefix", "response", "all exact", "all coded")  # what a prompt seen before can be read with


@dataclass(frozen=True)
class Workload:
    """Prompts of ``prompt_tokens``, the first ``shared_tokens`` the same in all; ``new_tokens`` are generated."""

    name: str
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    caches: tuple[str, ...] = tuple({**OURS, **PEERS})

    def prompts(self, tokens: np.ndarray) -> Iterator[list[int]]:
        """Prompts cut from a token stream, one after the other, again from its beginning at its end."""
        own = self.prompt_tokens - self.shared_tokens
        shared = tokens[: self.shared_tokens].tolist()
        for index in itertools.count():
            start = self.shared_tokens + index * own % (len(tokens) - self.prompt_tokens)
            yield shared + tokens[start : start + own].tolist()


WORKLOADS = (
    Workload("distinct", 32, 0, 64),
    Workload("distinct", 448, 0, 64),
    Workload("repeated", 448, 448, 64, REUSE),
    Workload("shared beginning", 512, 448, 1),
)


@dataclass
class Side:
    """One library and cache under one workload, with caches of its own."""

    module: nn.Module
    library: str
    cache: str
    workload: Workload
    prompts: Iterator[list[int]]
    answer: Callable[[list[int], int], Iterator[int]]
    held: Callable[[], list[Tensor]] = list  # the tensors that stay between answers
    responses: ResponseCache | None = None
    first_seconds: list[float] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)

    def step(self) -> None:
        """Answer the next prompt."""
        prompt = next(self.prompts)
        start = time.perf_counter()
        tokens: list[int] = []
        for token in self.answer(prompt, self.workload.new_tokens):
            if not tokens:
                self.first_seconds.append(time.perf_counter() - start)
            tokens.append(token)
        self.written.append(tokens)


def our_side(model: ModelWithHead, cache: str, workload: Workload, tokens: np.ndarray, folder: Path) -> Side:
    """Greedy decoding with our caches; ``folder`` takes the answers."""
    key_values, with_prefixes, with_responses = OURS[cache]
    prefixes = PrefixCache(LIMIT_BYTES) if with_prefixes else None
    responses = ResponseCache(folder, LIMIT_BYTES) if with_responses else None
    weights = fingerprint(model) if with_responses else ""

    def compute(prompt: list[int], count: int) -> Iterator[int]:
        return generate(model, prompt, count, temperature=0.0, key_values=key_values, prefixes=prefixes)

    def answer(prompt: list[int], count: int) -> Iterator[int]:
        if responses is None:
            return compute(prompt, count)
        request = {"weights": weights, "prompt": prompt, "max_tokens": count, "key_values": key_values}
        return responses.answer(request, lambda: compute(prompt, count))

    held = list if prefixes is None else prefixes.tensors
    return Side(model, "vocabfold", cache, workload, workload.prompts(tokens), answer, held, responses)


def peer_sides(model: ModelWithHead, workload: Workload, tokens: np.ndarray) -> dict[str, Side]:
    """Greedy decoding of transformers' GPT-2 with transformers' caches; none where transformers is not installed."""
    try:
        from experiments.tokens import hugging_face
    except ImportError:
        tqdm.write("transformers is left out: pip install 'vocabfold[hf]' to measure its caches too", file=sys.stderr)
        return {}
    torch.manual_seed(0)
    peer = hugging_face.random_gpt2(model.gpt.config)
    sides = {}
    for cache in [name for name in PEERS if name in workload.caches]:
        kind, beginning = PEERS[cache], None
        held: Callable[[], list[Tensor]] = list
        if kind not in hugging_face.available_caches():
            continue
        if cache == "prefix" and workload.shared_tokens:
            # One token of a repeated prompt must be read again, for its logits.
            shared = tokens[: min(workload.shared_tokens, workload.prompt_tokens - 1)].tolist()
            reader = hugging_face.HuggingFaceReader(peer, kind)
            reader.read(shared)
            assert reader.cache is not None
            beginning = (shared, reader.cache)
            held = partial(keys_and_values, reader.cache)

        def answer(prompt: list[int], count: int, kind: str = kind, beginning: Any = beginning) -> Iterator[int]:
            reader = hugging_face.HuggingFaceReader(peer, kind, beginning)
            text = list(prompt)
            for _ in range(count):
                text.append(int(reader.read(text).argmax()))
                yield text[-1]

        sides[cache] = Side(peer, "transformers", cache, workload, workload.prompts(tokens), answer, held)
    return sides


def keys_and_values(cache: Any) -> list[Tensor]:
    """The tensors of a dynamic cache of transformers."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def build_sides(model: ModelWithHead, workload: Workload, tokens: np.ndarray, folder: Path) -> dict[str, Side]:
    """All that take turns under one workload; ``folder`` takes the answers of each."""
    sides = {}
    for cache in [name for name in OURS if name in workload.caches]:
        sides[f"vocabfold {cache}"] = our_side(model, cache, workload, tokens, folder / cache.replace("/", "-"))
    for cache, side in peer_sides(model, workload, tokens).items():
        sides[f"transformers {cache}"] = side
    return sides


def measure(model: ModelWithHead, tokens: np.ndarray, rounds: int, folder: Path) -> pd.DataFrame:
    """Every workload, one after the other; within one, all sides take turns. One row a side and round."""
    rows = []
    for number, workload in enumerate(tqdm(WORKLOADS, desc="workloads")):
        sides = build_sides(model, workload, tokens, folder / str(number))
        steps = {name: side.step for name, side in sides.items()}
        seconds = interleaved_seconds(steps, rounds, 1, torch.device("cpu"), progress=True)
        for name, side in sides.items():
            baseline = sides.get(f"{side.library} none", sides[f"{side.library} key/value"])
            rows += side_rows(side, seconds[name], baseline)
    return pd.DataFrame(rows)


def side_rows(side: Side, seconds: list[float], baseline: Side) -> list[dict[str, Any]]:
    """One row a timed round; what holds for all rounds stands in each."""
    pairs = [pair for texts in zip(baseline.written, side.written, strict=True) for pair in zip(*texts, strict=True)]
    row: dict[str, Any] = identity(side) | {
        "kept_between_answers_mib": sum(tensor.nbytes for tensor in side.held()) / BYTES_PER_MIB,
        "same_tokens_share": float(np.mean([ours == theirs for ours, theirs in pairs])),
    }
    if side.responses is not None:
        answers = len(list(side.responses.folder.iterdir()))
        row["answer_bytes_a_token"] = side.responses.stored_bytes / (answers * side.workload.new_tokens)
    return [
        row | {"round": index, "seconds": whole, "seconds_to_first_token": first}
        for index, (whole, first) in enumerate(zip(seconds, side.first_seconds[-len(seconds) :], strict=True))
    ]


def identity(side: Side) -> dict[str, Any]:
    """What a row is about."""
    return {
        "library": side.library,
        "cache": side.cache,
        "workload": side.workload.name,
        "prompt_tokens": side.workload.prompt_tokens,
        "shared_tokens": side.workload.shared_tokens,
        "new_tokens": side.workload.new_tokens,
    }


def trained_model(run: Path, needed: int) -> tuple[ModelWithHead, np.ndarray]:
    """The run's model and its validation tokens. Raises UserError where it has not ``needed`` positions and tokens."""
    model = load_run(run, torch.device("cpu"))
    tokens = np.asarray(load_corpus(load_settings(run).data).valid.tokens)
    if model.gpt.config.max_positions < needed or len(tokens) <= needed:
        raise UserError(f"{run} has too few positions or validation tokens: {needed} are needed")
    return model, tokens


def write(rows: pd.DataFrame, run: Path, scale: str, name: str) -> None:
    """results/SCALE/NAME.csv with what was measured on which run, machine and code."""
    trained = finished_row(run) or {}
    names = ("corpus", "seed", "model", "hidden_size", "num_layers", "head", "scorer", "tokens", "num_parameters")
    first = {"experiment": "caching", "scale": scale} | {name: trained.get(name) for name in names}
    table = pd.DataFrame([first | row for row in rows.to_dict("records")]).assign(
        threads=torch.get_num_threads(),
        **origin(f"experiments/{Path(sys.argv[0]).name}"),
    )
    path = RESULTS / scale / f"{name}.csv"
    write_text(path, table.to_csv(index=False))
    print(f"wrote {path}")


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    parser = measuring_parser(__doc__, rounds=5)
    parser.add_argument("--run", type=Path, help="folder of the trained run; default: the newest of experiment=caching")
    arguments = parser.parse_args()
    keep_freed_memory()
    run = arguments.run or finished_runs(arguments.scale)[-1]
    model, tokens = trained_model(run, max(workload.prompt_tokens + workload.new_tokens for workload in WORKLOADS) - 1)
    with tempfile.TemporaryDirectory() as answers:
        table = measure(model, tokens, arguments.rounds, Path(answers))
    write(table, run, arguments.scale, "caching")


if __name__ == "__main__":
    main()
