"""Cases measured on a device: warm-up, peak memory, then interleaved rounds, each timed by the device's own events.

A case that runs out of memory, is refused or fails is a row of its own, and the others go on. Where an error has left
CUDA unusable the process ends with BROKEN, and another one goes on behind the case.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from experiments.cards.rows import ERROR, OK, OOM, REFUSED, Rows
from vocabfold.command_line import is_out_of_memory
from vocabfold.errors import UserError
from vocabfold.machine import (
    BYTES_PER_GIB,
    matrix_rate_flops_per_second,
    memory_bandwidth_bytes_per_second,
    synchronize,
)
from vocabfold.measure.memory import distinct_storages, peak_memory_of

BROKEN = 75  # exit status of a process whose CUDA is unusable
# A graph whose recording failed leaves the allocator in a state of its own, so that it counts as well.
UNUSABLE = ("CUDA error", "illegal memory access", "device-side assert", "launch failure", "captur")
WARM_UP = 3  # runs before one is recorded as a graph
NOTE_LETTERS = 300
MOST_CALLS = 20
SLOW, VERY_SLOW = 50.0, 300.0  # milliseconds of a call, from which on there are fewer rounds


@dataclass(frozen=True)
class Plan:
    """How a part is measured. ``tiny``: to rehearse all of it in seconds, at sizes of a few dozen."""

    part: str
    device: torch.device
    deadline: float  # of time.time()
    tiny: bool
    rounds: int = 5
    round_milliseconds: float = 20.0

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.time()

    def say(self, words: str) -> None:
        """A line of progress with the seconds that are left."""
        print(f"[{self.part}, {self.seconds_left:5.1f} s left] {words}", flush=True)


@dataclass
class Work:
    """What a case has built. ``run`` is timed; ``live``: see peak_memory_of; ``columns`` of its rows. ``divisor``: how
    many units (such as tokens) a call has, and ``peak_of_building``: memory counts from the beginning of building, as
    for a CUDA graph, whose replays allocate nothing."""

    run: Callable[[], object]
    live: Callable[[], list[Tensor]] = list
    columns: dict[str, Any] = field(default_factory=dict)
    divisor: int = 1
    peak_of_building: bool = False


@dataclass(frozen=True)
class Case:
    """``key`` tells its rows apart; ``build`` may raise."""

    key: Mapping[str, Any]
    build: Callable[[], Work]

    @property
    def words(self) -> str:
        """For a line of progress."""
        return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in self.key.values())


@dataclass
class Ready:
    """A case that is warm."""

    case: Case
    work: Work
    columns: dict[str, Any]
    rounds: int


def measure_cases(cases: Sequence[Case], rows: Rows, plan: Plan) -> None:
    """Measure those of the ``cases`` that do not stand, side by side in interleaved rounds; the tensors of all of them
    lie on the device together."""
    ready = []
    for case in cases:
        if rows.stands(case.key):
            continue
        if plan.seconds_left <= 0:
            break
        if (warm := prepare(case, rows, plan)) is not None:
            ready.append(warm)
    for index in range(max((one.rounds for one in ready), default=0)):
        if plan.seconds_left <= 0 and index > 0:
            break
        due = [one for one in ready if index < one.rounds]
        first = index % len(due)
        measured = []
        for one in due[first:] + due[:first]:
            if plan.seconds_left <= 0 and index > 0:
                break
            milliseconds, calls = time_round(one, plan)
            row = {"round": index, "rounds": one.rounds, "calls": calls, "milliseconds": milliseconds, "status": OK}
            measured.append({**one.case.key, **one.columns, **row})
        rows.add(measured)
    ready.clear()
    release(plan.device)


def prepare(case: Case, rows: Rows, plan: Plan) -> Ready | None:
    """Build a case, warm it up and take its peak memory; None, and a row, where that fails."""
    rows.begin(case.key)
    work, failure = None, None
    try:
        work, columns, milliseconds = warmed(case, plan)
    except Exception as error:
        failure = {"status": status_of(error), "note": " ".join(str(error).split())[:NOTE_LETTERS]}
        if failure["status"] == ERROR:
            failure["note"] = f"{type(error).__name__}: {failure['note']}"[:NOTE_LETTERS]
    rows.end()
    if failure is not None or work is None:
        assert failure is not None
        rows.add([{**case.key, **failure}])
        plan.say(f"{case.words}: {failure['status']} {failure['note']}")
        if failure["status"] == ERROR and is_unusable(failure["note"], plan.device):
            raise SystemExit(BROKEN)
        release(plan.device)
        return None
    memory = columns["peak_above_gib"]
    plan.say(f"{case.words}: {milliseconds / work.divisor:.3f} ms, {memory:.3f} GiB above what stood")
    return Ready(case, work, columns, rounds_of(milliseconds, plan))


def is_unusable(note: str, device: torch.device) -> bool:
    """Whether an error has left the device in a state in which nothing more can be measured."""
    if any(words in note for words in UNUSABLE):
        return True
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def warmed(case: Case, plan: Plan) -> tuple[Work, dict[str, Any], float]:
    """(what was built, its columns, milliseconds of a warm call)."""
    device = plan.device
    release(device)
    cuda = device.type == "cuda"
    allocated = torch.cuda.memory_allocated(device) if cuda else 0
    reserved = torch.cuda.memory_reserved(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    work = case.build()
    work.run()
    synchronize(device)
    start = time.perf_counter()
    if work.peak_of_building and cuda:
        work.run()
        synchronize(device)
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        stood = allocated + sum(storage.nbytes() for storage in distinct_storages(work.live()))
        columns = {"peak_memory_gib": (peak - allocated) / BYTES_PER_GIB}
        columns["peak_above_gib"] = (peak - stood) / BYTES_PER_GIB
    else:
        memory = peak_memory_of(work.run, device, work.live())
        held = memory.reserved_bytes or 0
        columns = {
            "peak_memory_gib": (memory.peak_bytes - allocated) / BYTES_PER_GIB,
            "peak_above_gib": (memory.peak_bytes - memory.live_bytes_before) / BYTES_PER_GIB,
        }
    if cuda:
        columns["reserved_memory_gib"] = (held - reserved) / BYTES_PER_GIB
    # Where memory is read from the allocator's counters, the run that it was read of was like any other.
    milliseconds = 1e3 * (time.perf_counter() - start) if cuda else timed(work.run, 1, device)
    return work, {**columns, **work.columns}, milliseconds


def timed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds of a call, over ``calls`` of them that follow each other."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def time_round(one: Ready, plan: Plan) -> tuple[float, int]:
    """(milliseconds of a unit, calls) in one round: as many calls as fill it."""
    least = timed(one.work.run, 1, plan.device)  # what ran before it is out of the caches then
    calls = min(MOST_CALLS, max(1, round(plan.round_milliseconds / max(least, 1e-3))))
    if calls == 1 and least > plan.round_milliseconds:
        return least / one.work.divisor, 1
    return timed(one.work.run, calls, plan.device) / one.work.divisor, calls


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` recorded as a CUDA graph: what is returned replays it. On a CPU, which has none, ``run`` itself after the
    same warm-up. What ``run`` reads and writes must stay where it lies, and nothing in it may wait for the device."""
    if device.type != "cuda":
        for _ in range(WARM_UP):
            run()
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rounds_of(milliseconds: float, plan: Plan) -> int:
    """Fewer of what is slow."""
    if milliseconds >= VERY_SLOW:
        return 1
    return min(3, plan.rounds) if milliseconds >= SLOW else plan.rounds


def status_of(error: Exception) -> str:
    """The word for an error in the table."""
    if is_out_of_memory(error):
        return OOM
    return REFUSED if isinstance(error, UserError) else ERROR


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


Module = TypeVar("Module", bound=nn.Module)


def built_on(device: torch.device, build: Callable[[], Module]) -> Module:
    """A module whose weights are drawn on the device, which takes seconds on the host where there are billions; there
    still, where something of it cannot be made on the device."""
    torch.manual_seed(0)
    if device.type == "cpu":
        return build()
    try:
        with torch.device(device):
            return build().to(device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        print(f"built on the host: {error}", flush=True)
    return build().to(device)


@dataclass(frozen=True)
class Rates:
    """What the device reached: the floors are made of it."""

    flops_per_second: float
    bytes_per_second: float

    def floor_milliseconds(self, flops: float, least_bytes: float) -> float:
        """The least that so many operations and bytes can take."""
        return 1e3 * max(flops / self.flops_per_second, least_bytes / self.bytes_per_second)


def measured_rates(plan: Plan, dtype: torch.dtype) -> Rates:
    """The best rate of a matrix product and of a copy, at sizes that fill a card."""
    card = plan.device.type == "cuda"
    rate = matrix_rate_flops_per_second(plan.device, dtype, (8192,) if card else (256,))
    bandwidth = memory_bandwidth_bytes_per_second(plan.device, 2**31 if card else 2**22)
    plan.say(f"{dtype}: {rate / 1e12:.3g} TFLOP/s, copies {bandwidth / 1e12:.3g} TB/s")
    return Rates(rate, bandwidth)
