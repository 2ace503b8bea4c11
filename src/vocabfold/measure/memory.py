"""Peak memory of one training step: the allocator's own figures, exact to the byte on a CPU as on a GPU."""

from __future__ import annotations

import gc
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError

PROCESS_STATUS = Path("/proc/self/status")
PROCESS_CLEAR_REFERENCES = Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"
RELEASE_MARK = "vocabfold released bytes: "


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of tensor storage on the device before a step and at its peak.

    `reserved_bytes` is what CUDA's caching allocator held at its peak, None on a CPU. `process_high_water_bytes` is the
    largest resident size of the whole host process (interpreter, libraries and profiler included), None where the
    system does not tell.
    """

    live_bytes_before: int
    peak_bytes: int
    reserved_bytes: int | None
    process_high_water_bytes: int | None


def live_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, their gradients, buffers and optimizer state; tensors that share a storage are all listed. Of one
    that is spread over processes the part that lies here."""
    parameters = list(module.parameters())
    parameters += [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    every: list[Any] = [*parameters, *gradients, *module.buffers(), *state]
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in every]


def distinct_storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The non-empty storages under `tensors`, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return list({storage.data_ptr(): storage for storage in storages if storage.nbytes() > 0}.values())


def peak_memory_of(step: Callable[[], Any], device: torch.device, live: Iterable[Tensor] = ()) -> PeakMemory:
    """Peak bytes of live tensors while `step` runs once.

    CUDA: the caching allocator's counters; `live` is not read. CPU: every allocation and release that torch's CPU
    allocator reports while the step runs, operators' own temporaries included, on top of the distinct storages of
    `live` (parameters, gradients, optimizer state, batch). Scratch memory that libraries take from the system is
    only in `process_high_water_bytes`.
    Warm the step up first: the optimizer makes its state in the first one. Write `live` as an expression inside the
    call: a list that the caller keeps holds on to the gradients which the step would have released.
    Raises UserError on a device that is neither.
    """
    gc.collect()
    if device.type == "cuda":
        del live
        return _peak_on_cuda(step, device)
    if device.type != "cpu":
        raise UserError(f"peak memory cannot be measured on device {device}: use cpu or cuda")
    storages = distinct_storages(tensor for tensor in live if tensor.device.type == "cpu")
    live_bytes_before = sum(storage.nbytes() for storage in storages)
    watchers = [_watch_release(storage) for storage in storages]
    del live, storages
    peak = _peak_on_cpu(step, live_bytes_before)
    watchers.clear()
    return peak


def _peak_on_cuda(step: Callable[[], Any], device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    live_bytes_before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _reset_high_water_mark()
    step()
    torch.cuda.synchronize(device)
    return PeakMemory(
        live_bytes_before=live_bytes_before,
        peak_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
        process_high_water_bytes=process_high_water_bytes(),
    )


def _peak_on_cpu(step: Callable[[], Any], live_bytes_before: int) -> PeakMemory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler library writes its start and stop to stderr otherwise
    _reset_high_water_mark()
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    high_water = process_high_water_bytes()

    current = peak = live_bytes_before
    made_by_step: dict[int, int] = {}
    for address, size in _allocator_events(profiler):
        if address is None:
            current += size
        elif size > 0:
            made_by_step[address] = size
            current += size
        else:
            # The release of what the step did not make counts only through its watcher, if it was in `live`.
            current -= made_by_step.pop(address, 0)
        peak = max(peak, current)
    return PeakMemory(
        live_bytes_before=live_bytes_before, peak_bytes=peak, reserved_bytes=None, process_high_water_bytes=high_water
    )


def _watch_release(storage: torch.UntypedStorage) -> weakref.ref[torch.UntypedStorage]:
    # The profiler is silent about the release of memory that is older than itself, hence an event of our own.
    mark = f"{RELEASE_MARK}{storage.nbytes()}"

    def write_down(_: weakref.ref[torch.UntypedStorage]) -> None:
        with torch.autograd.profiler.record_function(mark):
            pass

    return weakref.ref(storage, write_down)


def _allocator_events(profiler: torch.autograd.profiler.profile) -> list[tuple[int | None, int]]:
    """(address, bytes) in order of time; negative bytes are a release; no address: the release of a watched storage."""
    assert profiler.kineto_results is not None
    events: list[tuple[int, int | None, int]] = []
    waiting = list(profiler.kineto_results.experimental_event_tree())
    while waiting:
        node = waiting.pop()
        waiting.extend(node.children)
        fields: Any = node.extra_fields
        if node.tag.name == "Allocation" and fields.device.type == "cpu":
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
        elif node.name.startswith(RELEASE_MARK):
            events.append((node.start_time_ns, None, -int(node.name.removeprefix(RELEASE_MARK))))
    events.sort(key=lambda event: event[0])
    return [(address, size) for _, address, size in events]


def process_high_water_bytes() -> int | None:
    """Largest resident size of this process in bytes since its start or the last reset; None where unknown."""
    if PROCESS_STATUS.exists():
        for line in PROCESS_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return largest * bytes_per_unit or None


def _reset_high_water_mark() -> None:
    # Containers and other systems may refuse; the mark then counts from the start of the process.
    try:
        PROCESS_CLEAR_REFERENCES.write_text(RESET_HIGH_WATER_MARK)
    except OSError:
        return
