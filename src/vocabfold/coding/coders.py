"""Every token coder by its name. Its number in a file is its place here: new ones go to the end."""

from __future__ import annotations

from vocabfold.coding.adaptive import Adaptive, FirstOrder, SecondOrder
from vocabfold.coding.arithmetic import Arithmetic
from vocabfold.coding.base import BitPack, Raw, RunLength, SegmentCoder, Zstandard
from vocabfold.coding.huffman import Huffman
from vocabfold.coding.rans import FoldedRans, Rans

CODERS: dict[str, type[SegmentCoder]] = {
    kind.name: kind
    for kind in (
        Raw,
        BitPack,
        RunLength,
        Huffman,
        Arithmetic,
        Rans,
        FoldedRans,
        Adaptive,
        FirstOrder,
        SecondOrder,
        Zstandard,
    )
}
