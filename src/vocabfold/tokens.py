"""Token ids as everybody reads them: streams, their numbers, and the target that is no token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# torch's own default ignore_index: a target of this value is not predicted and not averaged over
IGNORE_INDEX = -100
BLOCK_TOKENS = 1 << 22  # of a token stream read at a time


class TokenStream(Protocol):
    """Token ids [n]: an array, a TokenFile's memory map or its coded tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: slice, /) -> np.ndarray: ...


def token_counts(tokens: TokenStream, vocabulary_size: int) -> Tensor:
    """How often each of the V tokens stands in a stream, such as a TokenFile's memory map: [V] int64."""
    import torch  # which the tokenising processes need not load

    counts = np.zeros(vocabulary_size, dtype=np.int64)
    for start in range(0, len(tokens), BLOCK_TOKENS):
        counts += np.bincount(tokens[start : start + BLOCK_TOKENS], minlength=vocabulary_size)
    return torch.from_numpy(counts)


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest dtype of a token file that holds every id below V."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")
