"""A model larger than one device: FSDP2 spreads parameters, gradients and optimizer state over the processes of a run.

A block of the backbone is gathered while it computes; embeddings and head are gathered from the forward pass to the end
of the backward pass. Checkpoints are written by all processes together (torch.distributed.checkpoint) and read by any
number of them; their tensors are safetensors and the rest loads with weights_only=True: neither executes code.
"""

from __future__ import annotations

import copy
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from vocabfold.errors import UserError
from vocabfold.files import replacing
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.checkpoint import (
    PROGRESS,
    SHARDED_PREFIX,
    delete_sharded,
    random_states,
    read_state,
    restore_random_states,
    sharded_checkpoints,
)
from vocabfold.runs.distributed import Ranks
from vocabfold.runs.load import AUTOCAST_TYPES

PROGRESS_NAME = "progress.pt"  # in a checkpoint's folder, written last: what has one is complete
READ_BYTES = 1 << 24
# What such a checkpoint holds beside the tensors that are spread.
KEPT = {**PROGRESS, "buffers": dict, "scalars": dict, "checksums": dict}


class ShardedModel:
    """``model``, spread in place over all processes of the run; ``precision``: what is gathered and computed in.
    Parameters, optimizer state and sums of gradients stay in float32."""

    def __init__(self, model: ModelWithHead, precision: str, device: torch.device, ranks: Ranks) -> None:
        self.model, self.ranks, self.device = model, ranks, device
        # The same module without data: what the whole model is made of again when the run ends.
        hollow = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        self.skeleton = copy.deepcopy(model, dict(hollow))
        dtype = AUTOCAST_TYPES[precision] if precision != "fp32" else None
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        }
        # Block by block: a device takes in no more than one whole block, and embeddings and head, at a time.
        for block in model.gpt.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)

    def parallel(self, learner: nn.Module) -> nn.Module:
        """See SharedModel: the model is its own learner."""
        return learner

    def is_late(self, late: bool) -> bool:
        """See SharedModel: the first process decides for all, who write together."""
        return self.ranks.first_decides(late, self.device)

    def parameters(self) -> dict[str, Tensor]:
        """The parts that lie here, as distributed tensors by name; a shared one once."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return dict(self.model.named_parameters())

    def whole(self) -> ModelWithHead:
        """See SharedModel: on the CPU, in every process."""
        parts, memo = self.parameters(), {}
        for name, hollow in self.skeleton.named_parameters():
            part: Any = parts[name]
            memo[id(hollow)] = nn.Parameter(part.detach().full_tensor().cpu().clone(), hollow.requires_grad)
        whole = copy.deepcopy(self.skeleton, memo)
        for target, buffer in zip(whole.buffers(), self.model.buffers(), strict=True):
            target.copy_(buffer)
        return whole

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, **progress: Any) -> None:
        """See SharedModel. Those before it are removed."""
        path = folder / f"{SHARDED_PREFIX}{progress['step']}"
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters().items():
            tensors[f"model.{name}"] = parameter.detach()
            for kind, value in optimizer.state[parameter].items():
                if value.ndim == 0:
                    scalars.setdefault(name, {})[kind] = value.cpu()
                else:
                    tensors[f"optimizer.{kind}.{name}"] = value
        if self.ranks.is_first:
            shutil.rmtree(path, ignore_errors=True)  # what a process that was killed had begun
            path.mkdir(parents=True)
        dist.barrier()
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
        state = {
            **progress,
            **random_states(),
            "buffers": {name: buffer.cpu() for name, buffer in self.model.named_buffers()},
            "scalars": scalars,
            "checksums": self._checksums(path),
        }
        if self.ranks.is_first:
            with replacing(path / PROGRESS_NAME) as beside, beside.open("wb") as file:
                torch.save(state, file)
            delete_sharded(folder, but=path)
        dist.barrier()

    def load(self, folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any] | None:
        """See SharedModel. Any number of processes may have written it."""
        path = latest(folder)
        if path is None:
            return None
        try:
            state = read_state(path / PROGRESS_NAME, torch.device("cpu"), KEPT)
            if self._checksums(path) != state.pop("checksums"):
                raise UserError("wrong checksum")
            self._load(path, optimizer, state, device)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path} cannot be loaded ({reason}): delete it to start this run again") from error
        restore_random_states(state)
        return state

    def _load(self, path: Path, optimizer: torch.optim.Optimizer, state: dict[str, Any], device: torch.device) -> None:
        buffers = dict(self.model.named_buffers())
        if buffers.keys() != state["buffers"].keys():
            raise UserError("it has other buffers than the model")
        scalars, parameters = state.pop("scalars"), self.parameters()
        tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        reader = HuggingFaceStorageReader(str(path))
        names = reader.read_metadata().state_dict_metadata
        for name, parameter in parameters.items():
            own: dict[str, Any] = {kind: value.to(device) for kind, value in scalars.get(name, {}).items()}
            for key in names:
                kind, _, of = key.removeprefix("optimizer.").partition(".")
                if key.startswith("optimizer.") and of == name:
                    own[kind] = tensors[key] = torch.zeros_like(parameter)
            if own:
                optimizer.state[parameter] = own
        if names.keys() != tensors.keys():
            raise UserError("it holds another model")
        dcp.load(tensors, storage_reader=reader)
        for name, value in state.pop("buffers").items():
            buffers[name].copy_(value)

    def _checksums(self, path: Path) -> dict[str, int]:
        """CRC-32 of the content of each file of tensors; every process reads some of them. Collective."""
        dist.barrier()
        files = sorted(path.glob("*.safetensors"))
        own = {file.name: checksum(file) for file in files[self.ranks.rank :: self.ranks.world_size]}
        every: list[dict[str, int]] = [{}] * self.ranks.world_size
        dist.all_gather_object(every, own)
        return {name: value for part in every for name, value in part.items()}


def checksum(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def latest(folder: Path) -> Path | None:
    """The last whole sharded checkpoint in ``folder``."""
    whole = [found for found in sharded_checkpoints(folder) if (found[1] / PROGRESS_NAME).is_file()]
    return max(whole)[1] if whole else None
