"""How the processes of a run share its model: each has it whole (DDP), or all together have it (FSDP2, sharding.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vocabfold.models.build import ModelWithHead
from vocabfold.runs.checkpoint import load_checkpoint, save_checkpoint
from vocabfold.runs.distributed import Ranks


class SharedModel(Protocol):
    """A model that several processes train. All of them call each method at the same time."""

    def parallel(self, learner: nn.Module) -> nn.Module:
        """``learner``, the module that trains the model, so that its gradients are means over the processes."""

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, **progress: Any) -> None:
        """Write a checkpoint of step ``progress["step"]``, as a whole or not at all."""

    def load(self, folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any] | None:
        """Put the folder's checkpoint into the model, ``optimizer`` and the random generators; return its progress.
        None where there is none. Raises UserError where it is damaged, incomplete or of another model."""

    def is_late(self, late: bool) -> bool:
        """Whether a checkpoint is due because of the time, of which each process has its own idea."""

    def whole(self) -> ModelWithHead:
        """The model in one piece."""


class ReplicatedModel:
    """The whole ``model`` in each process, which the first one writes for all."""

    def __init__(self, model: ModelWithHead, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    def parallel(self, learner: nn.Module) -> nn.Module:
        """See SharedModel."""
        return learner if self.ranks.world_size == 1 else DistributedDataParallel(learner)

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, **progress: Any) -> None:
        """See SharedModel."""
        if self.ranks.is_first:
            save_checkpoint(folder, self.model, optimizer, **progress)

    def load(self, folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any] | None:
        """See SharedModel."""
        return load_checkpoint(folder, self.model, optimizer, device)

    def is_late(self, late: bool) -> bool:
        """See SharedModel: the first process alone writes."""
        return late

    def whole(self) -> ModelWithHead:
        """See SharedModel."""
        return self.model


def share_model(kind: str, model: ModelWithHead, precision: str, device: torch.device, ranks: Ranks) -> SharedModel:
    """``model``, which computes on ``device``, shared as settings.parallel says."""
    if kind == "fsdp":
        from vocabfold.runs.sharding import ShardedModel  # a second of imports, of which a run seldom has need

        return ShardedModel(model, precision, device, ranks)
    return ReplicatedModel(model, ranks)


@contextlib.contextmanager
def gradients_shared(learner: nn.Module, now: bool) -> Iterator[None]:
    """Whether a backward pass within it shares its gradients with the other processes, or keeps them for the next."""
    if (share := getattr(learner, "set_requires_gradient_sync", None)) is not None:  # FSDP2's
        share(now)
    with contextlib.nullcontext() if now or not isinstance(learner, DistributedDataParallel) else learner.no_sync():
        yield


def number(value: Tensor) -> float:
    """The number that ``value`` is, of a tensor that is spread over processes too, in each of them."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return float(whole)
