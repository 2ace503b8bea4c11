"""A run's state on disk. Checkpoints load with weights_only=True and weights as safetensors: neither executes code."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.files import replacing

MISSING = object()
CHECKPOINT_NAME = "checkpoint.pt"
SHARDED_PREFIX = "checkpoint-"  # and the step
# What a training run keeps in a checkpoint beside model, optimizer and random states, with its types.
PROGRESS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "tokens": int,
    "timed_tokens": int,
    "timed_seconds": (int, float),
    "measured": dict,
    "scaler": dict,
}
WEIGHTS_NAME = "model.safetensors"


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **progress: Any) -> None:
    """Write everything that the next step depends on, as a whole or not at all. ``progress`` holds plain values."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        **random_states(),
        **progress,
    }
    # through a Python file: of one that it opens itself, torch does not tell why it could not be written
    with replacing(folder / CHECKPOINT_NAME) as beside, beside.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    progress: Mapping[str, type | tuple[type, ...]] = PROGRESS,
) -> dict[str, Any] | None:
    """Put the folder's checkpoint into ``model``, ``optimizer`` and the random generators; return the rest of it, which
    is ``progress``: what its values are called and of which type they are.

    None where there is no checkpoint. Raises UserError where the file is damaged, incomplete or of another model.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        state = read_state(path, device, progress)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be loaded ({reason}): delete it to start this run again") from error
    restore_random_states(state)
    return state


def random_states() -> dict[str, Tensor | None]:
    """The states of torch's random generators, to go into a checkpoint."""
    return {
        "cpu_random_state": torch.get_rng_state(),
        "cuda_random_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(state: dict[str, Any]) -> None:
    """Take the random generators' states out of a checkpoint and go on from them."""
    torch.set_rng_state(state.pop("cpu_random_state").cpu())
    cuda_random_state = state.pop("cuda_random_state")
    if cuda_random_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_random_state.cpu())


def read_state(path: Path, device: torch.device, kept: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """What torch.save wrote to ``path``, which must hold random states and what is ``kept``. Executes no code; raises
    UserError, and torch's own errors, where that is not there."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
        if (part := archive.testzip()) is not None:
            raise UserError(f"wrong checksum in {part}")
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    wanted = {**kept, "cpu_random_state": torch.Tensor, "cuda_random_state": (torch.Tensor, NoneType)}
    for name, kind in wanted.items():
        if not isinstance(state.get(name, MISSING), kind):
            raise UserError(f"it has no {name}, or one of another type")
    return state


def delete_checkpoint(folder: Path) -> None:
    """Remove what a finished run no longer needs."""
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    delete_sharded(folder)


def sharded_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """The folders of checkpoints that several processes wrote (sharding.py), whole or not, each with its step."""
    for path in folder.glob(f"{SHARDED_PREFIX}*"):
        step = path.name.removeprefix(SHARDED_PREFIX)
        if step.isdecimal() and path.is_dir():
            yield int(step), path


def delete_sharded(folder: Path, but: Path | None = None) -> None:
    """Remove them all, or all but one."""
    for _, path in sharded_checkpoints(folder):
        if path != but:
            shutil.rmtree(path)


def save_weights(folder: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the model's weights (a tied weight once) and its partition as safetensors, with a checksum."""
    metadata = {**metadata, "crc32": checksum(model)}
    with replacing(folder / WEIGHTS_NAME) as beside:
        safetensors.torch.save_model(model, str(beside), metadata)
        sort_metadata(beside)


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's words in the order of their keys, which safetensors leaves to chance: the same weights
    are the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"the header of {path} does not fit its place")
        file.seek(8)
        file.write(text.ljust(length))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the folder's weights into ``model``. Raises UserError where they are missing, damaged or of other shapes."""
    path = folder / WEIGHTS_NAME
    try:
        safetensors.torch.load_model(model, path)
        if (expected := weights_metadata(folder).get("crc32")) is not None and expected != checksum(model):
            raise UserError(f"{path} is damaged (checksum): delete the run folder and train again")
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise UserError(f"{path} holds weights that are no finite numbers: train again, with a lower learning rate")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded: {reason}") from error


def checksum(model: nn.Module) -> str:
    """CRC-32 of the state's bytes in the order of its names: safetensors itself notices a damaged header only."""
    value = 0
    for _, tensor in sorted(model.state_dict().items()):
        value = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def weights_metadata(folder: Path) -> dict[str, str]:
    """The words saved beside the weights. Raises UserError where there are no whole weights."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS_NAME}: the run has not finished; run its command again first")
    try:
        with safetensors.safe_open(path, framework="pt") as weights:
            return dict(weights.metadata() or {})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete the run folder and train again") from error
