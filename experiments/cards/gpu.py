"""What the heads cost on one graphics card: alone, in whole training steps, and in decoding.

    python -m experiments gpu measure [--part heads steps decoding simulated] [--seconds 130]
    python -m experiments gpu measure --device cpu --tiny      (a rehearsal of all of it, into results/cards_tiny)
    python -m experiments gpu draw [cards_tiny]

Each part runs in a process of its own, in the order of its value, within its share of the seconds, and adds its rows to
results/cards/gpu_PART.csv as they are measured; rows that stand are not measured again, so that several short runs add
up. ``simulated`` is the memory of the same training steps on tensors without data, and needs no card.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS

if TYPE_CHECKING:
    from experiments.cards.bench import Plan
    from experiments.cards.rows import Rows

PARTS = {"heads": 60.0, "steps": 50.0, "decoding": 20.0, "simulated": 600.0}  # seconds, in the order of their value
ON_CARD = ("heads", "steps", "decoding")
TABLES = tuple(f"gpu_{part}" for part in ON_CARD)
GRACE_SECONDS = 5.0  # beyond its limit, after which a part is ended
FAILED, LAST_PLACES = 2, 6
MOST_PROCESSES = 8  # of a part whose process dies


def folder_of(tiny: bool) -> Path:
    """Where the tables lie."""
    return RESULTS / ("cards_tiny" if tiny else "cards")


def measure_rows(part: str, device: str, tiny: bool, deadline: float) -> None:
    """Measure one part in this process, until the ``deadline`` of time.time()."""
    import torch

    from experiments.cards.bench import Plan
    from experiments.cards.rows import Rows

    room = import_module(f"experiments.cards.gpu_{part}")
    measure_part: Callable[[Rows, Plan], None] = room.measure_part
    if device == "cuda":
        torch.cuda.init()
    gc.collect()
    gc.freeze()  # what was imported stays: memory is collected before each case
    plan = Plan(part, torch.device(device), deadline, tiny, *((2, 0.0) if tiny else ()))
    measure_part(Rows(folder_of(tiny) / f"gpu_{part}.csv", room.KEYS, room.OWN), plan)


def run_part(part: str, device: str, tiny: bool, deadline: float) -> None:
    """The same in a process that is there for it: what fails is one line, and the other parts go on."""
    from vocabfold.measure.allocator import keep_freed_memory

    if device == "cpu":
        keep_freed_memory()
    try:
        measure_rows(part, device, tiny, deadline)
    except Exception as error:
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        words = " ".join(str(error).split())
        print(f"{part}: {type(error).__name__}: {words} ({', '.join(places[-LAST_PLACES:])})", flush=True)
        raise SystemExit(FAILED) from None


def run_within(part: str, device: str, tiny: bool, seconds: float) -> str:
    """Measure one part in processes of its own; what to say of it. Where one dies another goes on behind the case that
    it died of."""
    context = multiprocessing.get_context("spawn")
    deadline = time.time() + seconds
    status: int | None = None
    for _ in range(MOST_PROCESSES):
        process = context.Process(target=run_part, args=(part, device, tiny, deadline))
        process.start()
        process.join(max(0.0, deadline + GRACE_SECONDS - time.time()))
        if process.is_alive():
            process.kill()
            process.join()
            (folder_of(tiny) / f"gpu_{part}.under_way").unlink(missing_ok=True)  # slow, and not at fault
            return "ended at its limit"
        status = process.exitcode
        if status in (0, FAILED) or time.time() >= deadline:
            break
    return "done" if status == 0 else f"failed with status {status}"


def forget(names: Sequence[str], parts: Sequence[str], tiny: bool) -> None:
    """Drop the rows of these methods and sides, so that they are measured again: after a change of their code."""
    import pandas as pd

    for path in (folder_of(tiny) / f"gpu_{part}.csv" for part in parts):
        if path.is_file():
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            named = table["method" if "method" in table else "side"].isin(names)
            write_text(path, table[~named].to_csv(index=False))
            print(f"{path}: {named.sum()} rows are measured again")


def add_options(parser: ArgumentParser) -> None:
    """Parts, limit, device."""
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), help=f"default: {', '.join(ON_CARD)}")
    parser.add_argument("--seconds", type=float, help="limit of all parts together (default: a limit for each)")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="NAME", help="methods or sides whose rows are dropped"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a few dozen, to rehearse every line in seconds")


def measure(arguments: Namespace) -> None:
    """Run the parts and say of each how it went. Raises UserError where CUDA is wanted and missing, and where the limit
    is no time."""
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA here: rehearse with --device cpu --tiny")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise UserError(f"--seconds is {arguments.seconds}: choose more than 0")
    parts = [part for part in PARTS if part in (arguments.part or ON_CARD)]
    wanted = sum(PARTS[part] for part in parts)
    forget(arguments.again, parts if arguments.again else (), arguments.tiny)
    start = time.time()
    for index, part in enumerate(parts):
        seconds = PARTS[part]
        if arguments.seconds is not None:  # what earlier parts left goes to later ones
            left = arguments.seconds - (time.time() - start)
            seconds = left * PARTS[part] / sum(PARTS[later] for later in parts[index:])
        print(f"{part}: at most {seconds:.0f} s", flush=True)
        said = run_within(part, arguments.device, arguments.tiny, seconds)
        print(f"{part}: {said}, {time.time() - start:.1f} s since the beginning", flush=True)
    print(f"{len(parts)} parts in {time.time() - start:.1f} s of {arguments.seconds or wanted:.0f}")


def draw(corpus: str) -> None:
    """Write gpu.md and a picture for each part that has a table. ``corpus``: the folder of results/."""
    from experiments.cards import gpu_pictures, gpu_words
    from experiments.cards.gpu_summary import read_part

    folder = RESULTS / corpus
    tables = {part: table for part in ON_CARD if (table := read_part(folder / f"gpu_{part}.csv")) is not None}
    simulated = read_part(folder / "gpu_simulated.csv")
    if not tables:
        raise UserError(f"{folder} has no table of gpu: run `python -m experiments gpu measure` first")
    words = ["# One graphics card", "", gpu_words.goals_words(tables)]
    if "heads" in tables:
        words.append(gpu_words.heads_words(tables["heads"]))
        gpu_pictures.draw_heads(tables["heads"], folder / "gpu_heads.png")
    if "steps" in tables:
        words.append(gpu_words.steps_words(tables["steps"], simulated))
        gpu_pictures.draw_steps(tables["steps"], folder / "gpu_steps.png")
    if "decoding" in tables:
        words.append(gpu_words.decoding_words(tables["decoding"]))
        gpu_pictures.draw_decoding(tables["decoding"], folder / "gpu_decoding.png")
    write_text(folder / "gpu.md", "\n".join(words))
    print("\n".join(words))
    print(f"wrote {folder / 'gpu.md'}")
