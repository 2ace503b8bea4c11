"""A coded token stream that reads like an array: what batches ask for is decoded, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vocabfold.coding.container import Container


class StoredTokens:
    """The tokens of a container file, by slice or by positions; the file is memory-mapped.

    Raises DamagedStream on opening, or where a block that is read fails its checksum.
    """

    def __init__(self, path: Path, vocabulary_size: int) -> None:
        self._container = Container(np.memmap(path, np.uint8, "r"), vocabulary_size)
        self.dtype = self._container.coder.dtype

    def __len__(self) -> int:
        return len(self._container)

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        """``wanted``: a slice with step 1, or positions of any shape, each from 0 to n - 1."""
        size = self._container.segment_tokens
        if isinstance(wanted, slice):
            start, stop, _ = wanted.indices(len(self))
            first = start // size
            numbers = np.arange(first, max(first, -(-stop // size)))
            return self._decoded(numbers).reshape(-1)[start - first * size : max(start, stop) - first * size]
        numbers, rows = np.unique(wanted // size, return_inverse=True)
        return self._decoded(numbers)[rows.reshape(wanted.shape), wanted % size]

    def _decoded(self, numbers: np.ndarray) -> np.ndarray:
        """[len(numbers), segment tokens]."""
        rows = np.empty((len(numbers), self._container.segment_tokens), self.dtype)
        at_once = self._container.coder.segments_at_once
        for start in range(0, len(numbers), at_once):
            part = slice(start, start + at_once)
            rows[part] = self._container.segments(numbers[part])
        return rows
