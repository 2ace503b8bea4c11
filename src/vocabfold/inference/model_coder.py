"""Tokens coded with what a trained model expects of them: two symbols a token, its group and its slot.

Coder and decoder must compute the very same probabilities. Both therefore run the same steps: the text's rows side by
side, one token of each row a step through the model's key and value cache, with the same shapes, on one thread; and
both turn the weights into integers before anything is coded. A row is a stretch of the text; where the model has no
position left, it reads the later half of its context in again, as ``vocabfold.generate`` does.

Memory, beside the model: CACHE_BYTES of keys and values, and 16 bytes a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vocabfold.coding.damage import DamagedStream
from vocabfold.coding.lanes import STATE_BYTES, LaneDecoder, LaneEncoder
from vocabfold.errors import UserError
from vocabfold.inference.symbols import symbols_of
from vocabfold.models.build import ModelWithHead

BITS = 24  # of the integer probabilities of a step's groups, or slots
ROWS = 64  # more would be faster a little, but each begins without a context
CACHE_BYTES = 256 << 20  # a model with more keys and values than that codes fewer rows side by side
LANES = 8  # which take turns coding the rows: each costs about 8 bytes
_SIZE_BYTES = 4
_FLOAT_BYTES = 4
_PART_POSITIONS = 64  # of a context that is read in again at a time
Progress = Callable[[int], object]  # is told how many tokens are done


class TooLongError(Exception):
    """The code would be longer than its reader has use for."""


def encode_tokens(
    model: ModelWithHead,
    tokens: np.ndarray,
    end_token: int,
    most_bytes: float = math.inf,
    progress: Progress = lambda _: None,
    num_rows: int | None = None,
) -> bytes:
    """``tokens`` [n >= 1] as bytes; a row's context begins with ``end_token``. Raises TooLongError, as soon as that is
    certain, where these are more than ``most_bytes``.

    ``num_rows``: at most so many side by side (default ``most_rows``); whoever decodes has to know it.
    """
    rows = Rows(len(tokens), num_rows or most_rows(model))
    # start and frequency of each row's two symbols in each step: what is coded last is decoded first
    intervals = np.empty((rows.length, 2, 2, rows.count), np.uint32)
    bits = 0.0
    with one_thread():
        steps = ModelSteps(model, rows.count, end_token)
        for step, places in enumerate(rows.steps()):
            current = torch.from_numpy(tokens[places].astype(np.int64))
            symbols = list(steps.symbols.of(current))
            for taken, cumulative, symbol in zip(intervals[step], steps.cumulatives(symbols), symbols, strict=True):
                start, frequency = interval(cumulative[: len(places)], symbol.numpy())
                taken[:, : len(places)] = start, frequency
                bits += BITS * len(places) - float(np.log2(frequency).sum())
            if bits > 8 * most_bytes:
                raise TooLongError
            steps.advance(current)
            progress(rows.done(step))
    encoder, lanes = LaneEncoder(rows.num_lanes, rows.most_pushes), rows.lanes()
    for step in reversed(range(rows.length)):
        parts = rows.turns(rows.num_live(step))
        for start, frequency in intervals[step, ::-1].astype(np.uint64):
            for part in reversed(parts):
                encoder.push(start[part], frequency[part], BITS, lanes[part])
    data, sizes = encoder.finish()
    code = sizes.astype("<u4").tobytes() + data
    if len(code) > most_bytes:
        raise TooLongError
    return code


def decode_tokens(
    model: ModelWithHead,
    data: bytes,
    num_tokens: int,
    end_token: int,
    progress: Progress = lambda _: None,
    num_rows: int | None = None,
) -> np.ndarray:
    """The inverse of ``encode_tokens``, int64. Raises DamagedStream."""
    rows = Rows(num_tokens, num_rows or most_rows(model))
    lanes, head = rows.lanes(), rows.num_lanes * _SIZE_BYTES
    if len(data) < head + rows.num_lanes * STATE_BYTES:
        raise DamagedStream("a segment is too short")
    sizes = np.frombuffer(data, "<u4", rows.num_lanes)
    decoder = LaneDecoder(np.frombuffer(data, np.uint8, offset=head), np.append(0, sizes.cumsum(dtype=np.int64)))
    tokens = np.empty(num_tokens, np.int64)
    with one_thread():
        steps = ModelSteps(model, rows.count, end_token)
        for step, places in enumerate(rows.steps()):
            symbols: list[Tensor] = []
            for cumulative in steps.cumulatives(symbols):
                found = np.empty(len(places), np.int64)
                for part in rows.turns(len(places)):
                    wanted = decoder.peek(BITS, lanes[part])
                    found[part] = (cumulative[part] <= wanted[:, None]).sum(axis=1)
                    decoder.pop(*interval(cumulative[part], found[part]), BITS, lanes[part])
                symbols.append(torch.from_numpy(found))
            decoder.check()
            current = steps.symbols.tokens(*symbols)
            if int(current.max()) >= steps.model.head.vocabulary_size:
                raise DamagedStream("a segment holds a token that the model does not have")
            tokens[places] = current.numpy()
            steps.advance(current)
            progress(rows.done(step))
    decoder.finish()
    return tokens


def most_rows(model: ModelWithHead) -> int:
    """How many rows side by side keep their keys and values within CACHE_BYTES, at most ROWS; at least 1."""
    config = model.gpt.config
    row_bytes = 2 * config.num_layers * config.max_positions * config.hidden_size * _FLOAT_BYTES
    return max(1, min(ROWS, CACHE_BYTES // row_bytes))


class Rows:
    """How n tokens lie in at most ``most`` rows: stretches of equal length but for the last, coded by lanes in turn."""

    def __init__(self, num_tokens: int, most: int = ROWS) -> None:
        self.num_tokens = num_tokens
        self.length = -(-num_tokens // most)
        self._starts = np.arange(0, num_tokens, self.length)
        self.count = len(self._starts)
        self.num_lanes = min(LANES, self.count)

    @property
    def most_pushes(self) -> int:
        """Of one lane."""
        return 2 * self.length * -(-self.count // self.num_lanes)

    def steps(self) -> Iterator[np.ndarray]:
        """The position of each row's next token; the last row ends first."""
        for step in range(self.length):
            yield self._starts[: self.num_live(step)] + step

    def num_live(self, step: int) -> int:
        """Rows that have a token in ``step``."""
        return self.count - int(self._starts[-1] + step >= self.num_tokens)

    def done(self, step: int) -> int:
        """Tokens of all steps up to ``step``."""
        return (step + 1) * (self.count - 1) + min(step + 1, self.num_tokens - int(self._starts[-1]))

    def lanes(self) -> np.ndarray:
        """The lane of each row."""
        return np.arange(self.count) % self.num_lanes

    def turns(self, num_rows: int) -> list[slice]:
        """The first ``num_rows`` rows in parts in which no lane comes twice."""
        return [slice(i, min(i + self.num_lanes, num_rows)) for i in range(0, num_rows, self.num_lanes)]


class ModelSteps:
    """The model as both directions run it: the same products of the same shapes in the same order."""

    def __init__(self, model: ModelWithHead, num_rows: int, end_token: int) -> None:
        self.model, self._num_rows = model, num_rows
        self.symbols = symbols_of(model.head)
        self._max_positions = model.gpt.config.max_positions
        self._context = torch.full((num_rows, 1), end_token)
        self._restart(self._context)

    @torch.inference_mode()
    def _restart(self, context: Tensor) -> None:
        self._cache = self.model.gpt.new_cache(self._num_rows)
        for part in context.split(_PART_POSITIONS, dim=1):
            self._hidden = self.model.gpt(part, self._cache)[:, -1]

    @torch.inference_mode()
    def cumulatives(self, symbols: Sequence[Tensor]) -> Iterator[np.ndarray]:
        """[rows, G] of the groups and then, when ``symbols[0]`` holds each row's group, [rows, S] of their slots."""
        both = self.symbols.weights(self._hidden)
        yield cumulative_integers(both.groups)
        yield cumulative_integers(both.slots(self._all_rows(symbols[0])))

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> None:
        """Take in each row's token; a row that has ended takes token 0."""
        current = self._all_rows(tokens).unsqueeze(1)
        self._context = torch.cat([self._context, current], dim=1)[:, -self._max_positions :]
        if self._cache.length == self._max_positions:
            self._restart(self._context[:, -max(1, self._max_positions // 2) :])
        else:
            self._hidden = self.model.gpt(current, self._cache)[:, -1]

    def _all_rows(self, values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(self._num_rows - len(values))])


def cumulative_integers(weights: Tensor) -> np.ndarray:
    """[rows, A] -> int64, rising to 2^BITS by at least 1 in each step and nearly in proportion to the weights.

    Raises UserError where weights are no numbers.
    """
    sums = weights.double().cumsum(dim=-1)
    total = sums[:, -1:]
    if not bool((total.isfinite() & (total > 0)).all()):
        raise UserError("the model's probabilities are not finite: train it again")
    size = weights.shape[-1]
    scaled = (sums / total * ((1 << BITS) - size)).long()
    return (scaled + torch.arange(1, size + 1)).numpy()


def interval(cumulative: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start, frequency), uint64, of one symbol in each row."""
    rows = np.arange(len(symbols))
    stop = cumulative[rows, symbols]
    start = np.where(symbols > 0, cumulative[rows, symbols - 1], 0)
    return start.astype(np.uint64), (stop - start).astype(np.uint64)


@contextmanager
def one_thread() -> Iterator[None]:
    """The same order of additions whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
