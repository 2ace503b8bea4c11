"""The processes of one training run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from vocabfold.errors import UserError
from vocabfold.heads import HeadLoss


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``world_size`` processes; ``local_rank`` is its device on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def progress_bar(self, **options: Any) -> tqdm[NoReturn]:
        """tqdm's, on stderr, of the first process alone; none where there is nothing to do."""
        disable = not self.is_first or options.get("total") == 0
        # a log file wants few lines
        return tqdm(**options, disable=disable, mininterval=0.5 if sys.stderr.isatty() else 20.0)

    def sum_of(self, values: Tensor) -> Tensor:
        """``values`` summed over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def total(self, number: float, device: torch.device) -> float:
        """A ``number`` summed over all processes."""
        return number if self.world_size == 1 else float(self.sum_of(torch.tensor(number, device=device)))

    def first_decides(self, decision: bool, device: torch.device) -> bool:
        """The first process's ``decision``, in every process (clocks differ, and all must stop at the same step)."""
        if self.world_size == 1:
            return decision
        told = torch.tensor([decision], device=device, dtype=torch.uint8)
        dist.broadcast(told, src=0)
        return bool(told.item())

    def any_of(self, told: bool, device: torch.device) -> bool:
        """Whether any process was told, in every process: all must stop at the same step."""
        if self.world_size == 1:
            return told
        return bool(self.sum_of(torch.tensor(float(told), device=device)) > 0)


def take_ranks_from_submitit() -> None:
    """Where submitit started this process beside others (hydra.launcher.tasks_per_node), on Slurm or here, put its
    place among them into the environment, as torchrun does."""
    if "WORLD_SIZE" in os.environ or "submitit" not in sys.modules:
        return
    from submitit.helpers import TorchDistributedEnvironment

    try:
        place = TorchDistributedEnvironment()
    except RuntimeError:  # no job of submitit's
        return
    if place.world_size > 1:
        place.export(set_cuda_visible_devices=False)


def join_ranks(device_name: str, even_alone: bool = False) -> Ranks:
    """Read torchrun's environment and join its process group (NCCL on CUDA, gloo elsewhere); ``even_alone``: also where
    there is one process, which torchrun need not have started."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    backend = "nccl" if device_name == "cuda" else "gloo"
    if world_size == 1:
        if even_alone and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group(backend)
    return Ranks(dist.get_rank(), world_size, int(os.environ.get("LOCAL_RANK", "0")))


class MeanLosses:
    """Means of head losses over batches and processes in which every counted target weighs the same."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, output: HeadLoss) -> None:
        """Take in one batch."""
        count = output.num_targets.double()
        for name, value in {"loss": output.loss.detach(), **output.parts}.items():
            self.totals[name] = self.totals.get(name, 0) + value.double() * count
        self.totals["count"] = self.totals.get("count", 0) + count

    def means(self, ranks: Ranks, prefix: str) -> dict[str, float]:
        """The means over all batches and processes, each name behind ``prefix``."""
        names = sorted(self.totals)
        totals = ranks.sum_of(torch.stack([self.totals[name] for name in names])).tolist()
        return means_of(dict(zip(names, totals, strict=True)), prefix)


def means_of(totals: dict[str, float], prefix: str) -> dict[str, float]:
    """``MeanLosses.totals``, read from the device and summed over the processes, as means."""
    count = max(1.0, totals["count"])
    return {prefix + name: value / count for name, value in totals.items() if name != "count"}


def choose_device(name: str, precision: str, local_rank: int) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU. Raises UserError for a device or precision not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: choose auto, cpu or cuda")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine or this build of torch has no CUDA: use device=cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use precision=fp16")
    return device
