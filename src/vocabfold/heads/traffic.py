"""What a head that is spread over R processes sends: bytes for each token, counted from shapes.

Counted is what leaves a process under the usual ring and pairwise algorithms, of a result of B bytes in each process:
(R - 1) / R x B for an all-gather, a reduce-scatter or an all-to-all, twice that for an all-reduce. The tests count what
the heads' collectives really get.
"""

from __future__ import annotations

from dataclasses import dataclass

INTEGER_BYTES = 4  # a target or a place, as it travels
COUNT_BYTES = 8  # a number of rows


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends for each of its own tokens in a forward and in a backward pass, and in each step
    however many tokens there are."""

    forward_bytes: float
    backward_bytes: float
    bytes_per_step: float

    @property
    def bytes_per_token(self) -> float:
        """Forward and backward."""
        return self.forward_bytes + self.backward_bytes


def full_traffic(hidden_size: int, num_ranks: int, hidden_bytes: int, sum_bytes: int = 4) -> Traffic:
    """Of ShardedFullHead's loss, all processes having as many tokens. ``hidden_bytes`` and ``sum_bytes``: of a number
    in hidden states and in log-probabilities.

    Megatron-LM, where all processes begin with the same hidden states, sends as much: for each token of the batch an
    all-reduce of the gradient of hidden instead of this all-gather and reduce-scatter, and the same three of numbers.
    """
    others = num_ranks - 1
    row = hidden_size * hidden_bytes
    return Traffic(
        # the hidden state and the target to everybody; the largest logit, the sum and the target's logit
        forward_bytes=others * (row + INTEGER_BYTES) + 3 * 2 * others * sum_bytes,
        backward_bytes=others * row + others * 2 * sum_bytes,
        bytes_per_step=others * COUNT_BYTES,
    )


def folded_traffic(
    hidden_size: int, num_ranks: int, hidden_bytes: int, sum_bytes: int = 4, routed_share: float | None = None
) -> Traffic:
    """Of ShardedFoldedHead's loss. ``routed_share``: of a process's tokens whose group another one holds; None: all
    have rows and are spread evenly, (R - 1) / R."""
    share = (num_ranks - 1) / num_ranks if routed_share is None else routed_share
    row = hidden_size * hidden_bytes
    return Traffic(
        # the hidden state and its place there, a log-probability back
        forward_bytes=share * (row + INTEGER_BYTES + sum_bytes),
        backward_bytes=share * (row + sum_bytes),
        bytes_per_step=(num_ranks - 1) * COUNT_BYTES,
    )


def gradient_bytes(num_parameters: int, num_ranks: int, number_bytes: int = 4) -> float:
    """Bytes that a process sends in each step for the gradient of parameters that all processes have: an all-reduce."""
    return 2 * (num_ranks - 1) / num_ranks * num_parameters * number_bytes
