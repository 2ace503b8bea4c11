"""Peak memory of a training step at any size on any machine: the real step, run on tensors without data.

Floating point tensors are fake: shape and storage size, nothing behind them. Integers and booleans (tokens, targets,
partitions, masks) are real, so that code which reads them works, as long as they do not come from floating point ones.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vocabfold.errors import UserError
from vocabfold.measure.memory import live_tensors

aten = torch.ops.aten
# Formulas of the C++ backward pass write in place into fresh zeros, but for fake tensors out of place, with twice the
# memory.
_IN_PLACE_IN_BACKWARD = {
    aten.index_add.default: aten.index_add_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.index_put.default: aten.index_put_.default,
}

# The engine sums two gradients of one tensor in place if nothing else holds the first, but never for fake tensors.
# While an operator is dispatched, its first input has these owners when nothing else holds it.
_OWNERS_OF_A_PRIVATE_TENSOR = 4
_OWNERS_OF_A_PRIVATE_STORAGE = 2
_INTEGER_FACTORIES = {aten.arange, aten.randint, aten.randperm}

TrainingParts = tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]


@dataclass(frozen=True)
class SimulatedMemory:
    """Bytes alive at the peak of one training step, by purpose; the five parts sum to `peak_bytes`.

    `activation_bytes` is everything else: activations, logits, the batch, gradients of activations, temporaries. Of
    these the forward pass left `kept_activation_bytes` to the backward pass; the rest is temporary.
    """

    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    activation_bytes: int
    kept_activation_bytes: int
    peak_bytes: int


@dataclass
class _Lifetime:
    bytes: int
    birth: int
    death: int | None = None


class _StorageTracker(TorchDispatchMode):
    """Counts each storage from the operator that first shows it to the moment it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.current_bytes = 0
        self.alive: dict[int, _Lifetime] = {}
        self.references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.start_of_step()

    def start_of_step(self) -> None:
        self.peak_bytes = self.current_bytes
        self.peak_clock = self.clock
        self.kept: list[_Lifetime] = []

    def end_of_forward(self) -> None:
        self.kept = list(self.alive.values())

    def lifetime(self, tensor: Tensor) -> _Lifetime | None:
        return self.alive.get(tensor.untyped_storage()._cdata)

    def bytes_at_peak(self, lifetimes: Iterable[_Lifetime]) -> int:
        distinct = {id(lifetime): lifetime for lifetime in lifetimes}.values()
        return sum(
            life.bytes
            for life in distinct
            if life.birth <= self.peak_clock and (life.death is None or life.death > self.peak_clock)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _IN_PLACE_IN_BACKWARD and _inside_backward_formula():
            func = _IN_PLACE_IN_BACKWARD[func]
        elif (
            func is aten.add.Tensor
            and _inside_backward_formula()
            and all(isinstance(value, FakeTensor) for value in args)
            and args[0].shape == args[1].shape
            and args[0]._use_count() <= _OWNERS_OF_A_PRIVATE_TENSOR
            and torch._C._storage_Use_Count(args[0].untyped_storage()._cdata) <= _OWNERS_OF_A_PRIVATE_STORAGE
        ):
            func = aten.add_.Tensor
        result = _run(func, args, kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        self._raise_peak(_temporary_bytes(func, args, result))
        return result

    def _raise_peak(self, temporary_bytes: int = 0) -> None:
        if self.current_bytes + temporary_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_clock = self.current_bytes + temporary_bytes, self.clock

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or storage.nbytes() == 0:
            return
        self.clock += 1
        life = _Lifetime(storage.nbytes(), self.clock)
        self.alive[key] = life
        self.references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.current_bytes += life.bytes
        self._raise_peak()

    def _forget(self, key: int) -> None:
        life = self.alive.pop(key)
        del self.references[key]
        self.clock += 1
        life.death = self.clock
        self.current_bytes -= life.bytes


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator on real data where all it takes and gives is integers, else on fake tensors."""
    leaves = tree_leaves((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    dtypes = [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
    if dtypes:
        may_be_real = all(map(_is_integer, dtypes))
    else:
        may_be_real = bool(inputs) or (
            func.overloadpacket in _INTEGER_FACTORIES and not any(isinstance(leaf, float) for leaf in leaves)
        )
    if may_be_real and all(not isinstance(value, FakeTensor) and _is_integer(value.dtype) for value in inputs):
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        if all(_is_integer(value.dtype) for value in tree_leaves(result) if isinstance(value, Tensor)):
            return result
    return func(*args, **kwargs)


def _inside_backward_formula() -> bool:
    node = torch._C._current_autograd_node()
    return node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction)


def _temporary_bytes(func: Any, args: Any, result: Any) -> int:
    """Bytes that an operator takes and frees inside itself, out of sight of fake tensors, where found to matter."""
    if func is aten.logsumexp.default:
        return args[0].numel() * result.element_size() + result.numel() * result.element_size()
    return 0


@contextlib.contextmanager
def tensors_without_data() -> Iterator[_StorageTracker]:
    """Floating point tensors made within it are fake: nothing is allocated or computed, at any size."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), _StorageTracker() as tracker:
        yield tracker


def simulated_peak_memory(build: Callable[[], TrainingParts]) -> SimulatedMemory:
    """Peak memory of zero_grad, forward, backward and optimizer step under fake tensors.

    `build` makes the module, its optimizer and a function that returns the loss (on a batch that `build` or the
    function makes). Nothing floating is allocated or computed at any size; torch's random state stays as it was. The
    second of two steps is reported: only then is the optimizer's state there.
    A build of torch without CUDA simulates CPU tensors only, and with them the CPU's optimizer: on CUDA, Adam takes
    temporaries as large as the parameters on top unless foreach=False or fused=True. Autocast too is the CPU's, by
    which cross_entropy copies N V logits of half precision to float32: 2 N V bytes more than CUDA has at its peak.
    Not seen: scratch space per thread of the CPU's attention (about 0.5 MiB a thread).
    Raises UserError where values of a floating point tensor are needed (`.item()`, `nonzero`, boolean indexing).
    """
    with tensors_without_data() as tracker:
        try:
            module, optimizer, compute_loss = build()
            _training_step(optimizer, compute_loss, tracker)
            tracker.start_of_step()
            _training_step(optimizer, compute_loss, tracker)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"memory cannot be simulated: the step reads floating point values through {error.func}; "
                "measure it on a real device, or choose a setting that does not depend on values"
            ) from error
        return _summary(tracker, module, optimizer)


def _training_step(
    optimizer: torch.optim.Optimizer, compute_loss: Callable[[], Tensor], tracker: _StorageTracker
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss = compute_loss()
    tracker.end_of_forward()
    loss.backward()
    del loss
    optimizer.step()


def _summary(tracker: _StorageTracker, module: nn.Module, optimizer: torch.optim.Optimizer) -> SimulatedMemory:
    def at_peak(tensors: Iterable[Tensor]) -> int:
        return tracker.bytes_at_peak(life for life in map(tracker.lifetime, tensors) if life is not None)

    parameters = [*module.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    state = (value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor))
    parameter_bytes = at_peak(parameters)
    buffer_bytes = at_peak(module.buffers())
    gradient_bytes = at_peak(p.grad for p in parameters if p.grad is not None)
    optimizer_state_bytes = at_peak(state)
    named = parameter_bytes + buffer_bytes + gradient_bytes + optimizer_state_bytes
    lasting = {id(tracker.lifetime(tensor)) for tensor in live_tensors(module, optimizer)}
    kept = tracker.bytes_at_peak(life for life in tracker.kept if id(life) not in lasting)
    return SimulatedMemory(
        parameter_bytes,
        buffer_bytes,
        gradient_bytes,
        optimizer_state_bytes,
        tracker.peak_bytes - named,
        kept,
        tracker.peak_bytes,
    )
