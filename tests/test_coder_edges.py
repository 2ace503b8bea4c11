"""Where coders go wrong quietly: the end of a segment, which a decoder sees without a checksum; decisions that are all
but sure; sizes, which no round trip shows."""

from __future__ import annotations

import numpy as np
import pytest

from vocabfold.coding.container import decode, encode
from vocabfold.coding.damage import DamagedStream
from vocabfold.coding.huffman import Huffman
from vocabfold.coding.rans import FoldedRans, Rans

TOKENS = np.random.default_rng(0).zipf(1.3, (3, 200)).clip(1, 50) - 1


@pytest.mark.parametrize("kind", [Huffman, Rans, FoldedRans])
def test_a_segment_that_is_shorter_or_longer_than_its_tokens_is_refused(
    kind: type[Huffman | Rans | FoldedRans],
) -> None:
    coder = kind.fit(TOKENS.ravel(), 50)
    data, sizes = coder.encode(TOKENS)
    payload, offsets = np.frombuffer(data, np.uint8), np.concatenate([[0], sizes.cumsum()])
    assert np.array_equal(coder.decode(payload, offsets, 200), TOKENS)
    longer, longer_offsets = np.frombuffer(data + bytes(4), np.uint8), offsets + np.array([0, 0, 0, 4])
    for damaged in ((payload, offsets, 150), (payload, offsets, 250), (longer, longer_offsets, 200)):
        with pytest.raises(DamagedStream, match="does not end where it must"):
            coder.decode(*damaged)


@pytest.mark.parametrize("coder", ["adaptive", "order1", "order2"])
def test_a_decision_that_is_all_but_sure_still_leaves_room_for_the_other(coder: str) -> None:
    tokens = np.ones(40_000, np.int64)
    tokens[-3] = 0
    assert np.array_equal(decode(encode(tokens, 2, coder), 2), tokens)


def test_a_context_pays_where_it_tells_something_and_costs_little_where_not() -> None:
    generator = np.random.default_rng(0)
    following, is_noise = generator.integers(8, size=(8, 8)), generator.random(12_000) < 0.1
    alone = np.where(is_noise, generator.integers(8, size=12_000), 5)
    after_two = generator.integers(8, size=12_000)
    for place in range(2, 12_000):
        if not is_noise[place]:
            after_two[place] = following[after_two[place - 1], after_two[place - 2]]
    coders = ("adaptive", "order1", "order2")
    sizes = [[len(encode(tokens, 8, coder)) for coder in coders] for tokens in (alone, after_two)]
    assert sizes[0][0] < sizes[0][1] < sizes[0][2] < 1.02 * sizes[0][0]
    assert sizes[1][2] < 0.6 * sizes[1][1] < 0.6 * sizes[1][0]
