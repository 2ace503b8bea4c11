"""Arithmetic coding by constriction's range coder (Bamler, arXiv 2201.01741), with the counts of the whole stream."""

from __future__ import annotations

import numpy as np

from vocabfold.coding.base import EachSegment
from vocabfold.coding.damage import DamagedStream
from vocabfold.coding.frequencies import Frequencies, index_of
from vocabfold.coding.rans import StaticCoder
from vocabfold.errors import needed


class Arithmetic(EachSegment, StaticCoder):
    """Each token one symbol of a static model."""

    name = "arithmetic"
    segments_at_once = 64

    def __init__(self, vocabulary_size: int, model: Frequencies) -> None:
        super().__init__(vocabulary_size, model)
        self._stream = needed("constriction", "arithmetic coding").stream
        # Multiples of 2^-24 at least, which constriction takes over as they are. It knows no alphabet of one symbol.
        shares = model.frequencies / float(1 << model.bits)
        self._distribution = None
        if len(shares) > 1:
            self._distribution = self._stream.model.Categorical(shares, perfect=False)

    def encode_one(self, tokens: np.ndarray) -> bytes:
        """See EachSegment.encode_one."""
        if self._distribution is None:
            return b""
        encoder = self._stream.queue.RangeEncoder()
        encoder.encode(index_of(self.model.tokens, tokens).astype(np.int32), self._distribution)
        return encoder.get_compressed().astype("<u4").tobytes()

    def decode_one(self, data: np.ndarray, num_tokens: int) -> np.ndarray:
        """See EachSegment.decode_one."""
        if self._distribution is None:
            if len(data):
                raise DamagedStream("a segment of one repeated token has bytes")
            return np.full(num_tokens, self.model.tokens[0])
        if len(data) % 4:
            raise DamagedStream("a segment has an impossible length")
        decoder = self._stream.queue.RangeDecoder(np.frombuffer(data.tobytes(), "<u4").astype(np.uint32))
        try:
            symbols = decoder.decode(self._distribution, num_tokens)
        except (AssertionError, ValueError) as error:
            raise DamagedStream(f"a segment is not what the range coder wrote ({error})") from error
        if not decoder.maybe_exhausted():
            raise DamagedStream("a segment does not end where it must")
        return self.model.tokens[symbols]
