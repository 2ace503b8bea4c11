"""A training step as one CUDA graph: the device does all of it at one launch, where a small model would otherwise wait
for the host at each of some hundred kernels.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[tuple[Tensor, ...], bool], dict[str, Tensor]]
CALLS_BEFORE_CAPTURE = 3  # kernels are compiled and chosen, libraries and the optimizer make what they keep


class CapturedStep:
    """``step(inputs, variant)`` -> {name: number}, which must not wait for the device and whose tensors have the same
    shapes in every call. The first calls of each ``variant`` run as they are, then one is captured and replayed on
    whatever ``__call__`` is given.

    Work within ``own_stream``. The variants share their memory: of what a call leaves on the device, nothing but what
    it trained may be read.
    """

    def __init__(self, step: Step, inputs: tuple[Tensor, ...], device: torch.device) -> None:
        self.step = step
        self.inputs = tuple(torch.empty_like(tensor, device=device) for tensor in inputs)
        self.pool = torch.cuda.graph_pool_handle()
        self.calls: Counter[bool] = Counter()
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, list[str], Tensor]] = {}

    def __call__(self, inputs: tuple[Tensor, ...], variant: bool) -> dict[str, float]:
        """One step on ``inputs``, on any device; waits for it."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self.calls[variant] += 1
        if self.calls[variant] <= CALLS_BEFORE_CAPTURE:
            results = self.step(self.inputs, variant)
            return {name: float(value) for name, value in results.items()}
        if variant not in self.graphs:
            self.graphs[variant] = self._capture(variant)
        graph, names, numbers = self.graphs[variant]
        graph.replay()
        return dict(zip(names, numbers.tolist(), strict=True))

    def _capture(self, variant: bool) -> tuple[torch.cuda.CUDAGraph, list[str], Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what other calls have used is not the graph's to use again
        with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
            results = self.step(self.inputs, variant)
            numbers = torch.stack([value.double() for value in results.values()])
        return graph, list(results), numbers


def own_stream(device: torch.device) -> None:
    """From now on this thread's work on ``device``, a GPU, goes to a stream that can be captured. Asked again, it stays
    with that stream: for each one the libraries of matrix products keep memory of their own."""
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)
