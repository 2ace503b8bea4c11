"""Token <-> (group, slot): an order of the vocabulary and group boundaries over its positions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from vocabfold.errors import UserError

LEAST_RISING = 8  # tokens of the first of rising groups, where all groups are several times as large


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
        multi_groups = (sizes > 1).nonzero().squeeze(-1)
        multi_index = torch.full_like(sizes, -1)
        multi_index[multi_groups] = torch.arange(len(multi_groups), device=self.order.device)
        multi_starts = torch.zeros(len(multi_groups) + 1, dtype=torch.int64, device=self.order.device)
        multi_starts[1:] = sizes[multi_groups].cumsum(0)
        multi_positions = (multi_index[group_at] >= 0).nonzero().squeeze(-1)
        for name, value in {
            "sizes": sizes,
            "position_of": position_of,
            "group_of": group_at[position_of],
            "slot_of": slot_at[position_of],
            "multi_groups": multi_groups,
            "multi_index": multi_index,
            "multi_starts": multi_starts,
            "multi_positions": multi_positions,
            "multi_tokens": self.order[multi_positions],
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.num_slots = int(sizes.max())
        self.has_single_groups = len(multi_groups) < len(sizes)
        # On the host: a loop over groups must not wait for the device at each of them.
        self.multi_bounds = multi_starts.tolist()
        self.first_multi_token = None
        if len(multi_positions) > 0 and (self.multi_tokens.diff() == 1).all():
            self.first_multi_token = int(self.multi_tokens[0])

    sizes: Tensor  # [G] tokens in each group
    position_of: Tensor  # [V] position of each token
    group_of: Tensor  # [V]
    slot_of: Tensor  # [V]
    num_slots: int  # S: slots of the largest group
    has_single_groups: bool  # groups of one token

    # A group of one token leaves nothing to score: token scorers have parameters for the others alone.
    multi_groups: Tensor  # [M] the groups with more than one token
    multi_index: Tensor  # [G] place of each group in multi_groups, -1 where it has one token
    multi_starts: Tensor  # [M + 1] where each of their tokens begin in multi_positions
    multi_positions: Tensor  # the positions that they own, rising
    multi_tokens: Tensor  # the tokens there
    multi_bounds: list[int]  # multi_starts
    first_multi_token: int | None  # of multi_tokens, where each of them is the one before plus 1

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

    @property
    def multi_slot_exists(self) -> Tensor:
        """[M, S]: slot_exists of the groups with more than one token."""
        return torch.arange(self.num_slots, device=self.sizes.device) < self.sizes[self.multi_groups, None]

    def places_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """``index`` [...] among the M groups -> (the places of their slots in multi_tokens, whether a token owns the
        slot), [..., S] each. Any place stands in a slot that none owns."""
        starts, stops = self.multi_starts.take(index), self.multi_starts.take(index + 1)
        places = starts.unsqueeze(-1) + torch.arange(self.num_slots, device=index.device)
        return places.clamp(max=len(self.multi_tokens) - 1), places < stops.unsqueeze(-1)

    def exists_in(self, index: Tensor) -> Tensor:
        """``index`` [...] among the M groups -> whether a token owns each of their slots, [..., S]."""
        sizes = self.sizes.take(self.multi_groups.take(index))
        return torch.arange(self.num_slots, device=index.device) < sizes.unsqueeze(-1)

    def index_of(self, groups: Tensor) -> Tensor:
        """``groups`` [...] -> their places among the M of several tokens, -1 of one that has one."""
        return self.multi_index.take(groups) if self.has_single_groups else groups

    @property
    def single_groups(self) -> Tensor:
        """The groups of one token, [G - M]."""
        return (self.sizes == 1).nonzero().squeeze(-1)

    def token_at(self, groups: Tensor, slots: Tensor) -> Tensor:
        """The token in each slot of each group (same shapes in and out)."""
        return self.order.take(self.boundaries.take(groups) + slots)


def _derive_again(partition: Partition, _incompatible_keys: object) -> None:
    # A named function, not a lambda, so that a module that holds a partition can be pickled.
    partition._derive()


def equal_partition(
    vocabulary_size: int, group_size: int | None = None, order: Tensor | None = None, shortlist: int = 0
) -> Partition:
    """The paper's equal groups (arXiv 2411.06371), after a shortlist of groups of one token.

    The first ``shortlist`` K positions are a group each. Over the R = V - K others, G groups: group g owns the
    positions K + floor(R g / G) .. K + floor(R (g + 1) / G) - 1.
    ``group_size`` is the wanted number of slots S; G brings the largest group as near to S as equal groups can, the
    fewer groups where two are equally near. Group sizes differ by at most one. None takes ceil(sqrt(R)), where G + S
    is smallest.
    ``order`` [V] is the token at each position; None keeps token order, which for a BPE vocabulary is merge order.
    Raises UserError unless 0 <= shortlist < V, 1 <= group_size <= R and ``order`` holds V tokens.
    """
    return partition_over(equal_boundaries(vocabulary_size, group_size, shortlist), order)


def partition_over(boundaries: Tensor, order: Tensor | None = None) -> Partition:
    """The groups of ``boundaries`` [G + 1] over ``order`` [V]; None: token order. Raises UserError where ``order`` does
    not hold each of as many tokens once."""
    vocabulary_size = int(boundaries[-1])
    if order is None:
        order = torch.arange(vocabulary_size)
    if len(order) != vocabulary_size:
        raise UserError(f"the order holds {len(order)} tokens: give one of all {vocabulary_size} in the vocabulary")
    return Partition(order, boundaries)


def equal_boundaries(vocabulary_size: int, group_size: int | None = None, shortlist: int = 0) -> Tensor:
    """The group boundaries [G + 1] of ``equal_partition``."""
    if not 0 <= shortlist < vocabulary_size:
        raise UserError(
            f"head.partition.shortlist is {shortlist}: choose 0 or more, below the vocabulary size {vocabulary_size}"
        )
    rest = vocabulary_size - shortlist
    if group_size is None:
        group_size = math.ceil(math.sqrt(rest))
    if not 1 <= group_size <= rest:
        room = f"the vocabulary size {rest}" if shortlist == 0 else f"the {rest} tokens outside the shortlist"
        raise UserError(f"head.partition.group_size is {group_size}: choose between 1 and {room}")
    fewest = rest // group_size
    # Equally near: the fewer groups, so that S = 1 does not ask for more groups than tokens.
    num_groups = min(fewest, fewest + 1, key=lambda groups: abs(math.ceil(rest / groups) - group_size))
    boundaries = shortlist + torch.arange(num_groups + 1, dtype=torch.int64) * rest // num_groups
    return torch.cat([torch.arange(shortlist), boundaries])


def rising_boundaries(vocabulary_size: int, group_size: int | None = None, shortlist: int = 0) -> Tensor:
    """The boundaries [G + 1] of as many groups as ``equal_boundaries`` makes, for an order by frequency.

    A token is looked up at the price of its group's rows. With probabilities p(r) that fall as 1 / (r + q) over the
    rank r, the sum of p(r) times the size of r's group is least, for a given number of groups, where sizes rise with
    the root of r + q: their starts are equally far apart in that root. q is such that the first group holds about
    LEAST_RISING tokens, or half of the equal size where that is less. Raises UserError as ``equal_boundaries`` does.
    """
    num_groups = len(equal_boundaries(vocabulary_size, group_size, shortlist)) - 1 - shortlist
    rest = vocabulary_size - shortlist
    least = min(LEAST_RISING, rest / num_groups / 2)
    # The shortlist has the first ranks; a size of the root's slope, 2 sqrt(q) (sqrt(R + q) - sqrt(q)) / G, at rank 0.
    offset = max(float(shortlist), (least * num_groups / 2) ** 2 / rest)
    roots = np.linspace(math.sqrt(offset), math.sqrt(rest + offset), num_groups + 1)
    starts = np.rint(roots**2 - offset).astype(np.int64)
    numbered = np.arange(num_groups + 1)
    starts = np.minimum(np.maximum(starts, numbered), rest - num_groups + numbered)  # at least one token each
    return torch.cat([torch.arange(shortlist), shortlist + torch.from_numpy(starts)])


def bands_of(boundaries: Tensor, shortlist: int = 0) -> Tensor:
    """[G - K]: which octave of the ranks after the ``shortlist`` K each group begins in, rising. Tokens that stay
    in their band are nearly as often looked up as the cost of rising groups supposes."""
    starts = boundaries[shortlist:-1] - shortlist
    return starts.clamp(min=1).double().log2().floor().to(torch.int64)
