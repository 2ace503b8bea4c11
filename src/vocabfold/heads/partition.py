"""Token <-> (group, slot): an order of the vocabulary and group boundaries over its positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError


class Partition(nn.Module):
    """``order`` [V]: the token at each position; ``boundaries`` [G + 1]: group g owns the positions
    boundaries[g] .. boundaries[g + 1] - 1, and a token's slot is its position within its group.

    Both are buffers, so they are saved with the weights and loading never depends on the corpus. Raises UserError
    unless ``order`` is a permutation and every group owns a token.
    """

    order: Tensor
    boundaries: Tensor

    def __init__(self, order: Tensor, boundaries: Tensor) -> None:
        super().__init__()
        vocabulary_size = len(order)
        order, boundaries = order.to(torch.int64), boundaries.to(torch.int64)
        if not torch.equal(order.sort().values, torch.arange(vocabulary_size, device=order.device)):
            raise UserError(f"a partition's order must hold each of the {vocabulary_size} tokens exactly once")
        if (
            len(boundaries) < 2
            or boundaries[0] != 0
            or boundaries[-1] != vocabulary_size
            or (boundaries.diff() < 1).any()
        ):
            raise UserError(f"group boundaries must rise from 0 to {vocabulary_size} with at least one token a group")
        self.register_buffer("order", order)
        self.register_buffer("boundaries", boundaries)
        self._derive()
        self.register_load_state_dict_post_hook(_derive_again)

    def _derive(self) -> None:
        sizes = self.boundaries.diff()
        groups = torch.arange(len(sizes), device=self.order.device)
        group_at = groups.repeat_interleave(sizes)
        slot_at = torch.arange(len(self.order), device=self.order.device) - self.boundaries[group_at]
        position_of = torch.empty_like(self.order)
        position_of[self.order] = torch.arange(len(self.order), device=self.order.device)
        for name, value in {
            "sizes": sizes,
            "position_of": position_of,
            "group_of": group_at[position_of],
            "slot_of": slot_at[position_of],
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.num_slots = int(sizes.max())

    sizes: Tensor  # [G] tokens in each group
    position_of: Tensor  # [V] position of each token
    group_of: Tensor  # [V]
    slot_of: Tensor  # [V]
    num_slots: int  # S: slots of the largest group

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return len(self.order)

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.boundaries) - 1

    @property
    def slot_exists(self) -> Tensor:
        """[G, S]: whether a token owns the slot. The others must never be given probability."""
        return torch.arange(self.num_slots, device=self.sizes.device) < self.sizes[:, None]

    def token_at(self, groups: Tensor, slots: Tensor) -> Tensor:
        """The token in each slot of each group (same shapes in and out)."""
        return self.order[self.boundaries[groups] + slots]


def _derive_again(partition: Partition, _incompatible_keys: object) -> None:
    # A named function, not a lambda, so that a module that holds a partition can be pickled.
    partition._derive()


def equal_partition(vocabulary_size: int, group_size: int | None = None, order: Tensor | None = None) -> Partition:
    """The paper's equal groups (arXiv 2411.06371): group g owns positions floor(V g / G) .. floor(V (g + 1) / G) - 1.

    ``group_size`` is the wanted number of slots S; G brings the largest group as near to S as equal groups can, the
    fewer groups where two are equally near. Group sizes differ by at most one. None takes ceil(sqrt(V)), where G + S
    is smallest.
    ``order`` [V] is the token at each position; None keeps token order, which for a BPE vocabulary is merge order.
    Raises UserError unless 1 <= group_size <= V and ``order`` holds V tokens.
    """
    if group_size is None:
        group_size = math.ceil(math.sqrt(vocabulary_size))
    if not 1 <= group_size <= vocabulary_size:
        raise UserError(
            f"head.partition.group_size is {group_size}: choose between 1 and the vocabulary size {vocabulary_size}"
        )
    fewest = vocabulary_size // group_size
    # Equally near: the fewer groups, so that S = 1 does not ask for more groups than tokens.
    num_groups = min(fewest, fewest + 1, key=lambda groups: abs(math.ceil(vocabulary_size / groups) - group_size))
    boundaries = torch.arange(num_groups + 1, dtype=torch.int64) * vocabulary_size // num_groups
    if order is None:
        order = torch.arange(vocabulary_size)
    if len(order) != vocabulary_size:
        raise UserError(f"the order holds {len(order)} tokens: give one of all {vocabulary_size} in the vocabulary")
    return Partition(order, boundaries)
