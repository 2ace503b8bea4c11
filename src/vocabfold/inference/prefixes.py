"""Beginnings of texts that were read before: their keys and values are kept and reused, exactly.

A radix tree as in SGLang's RadixAttention (Zheng et al. 2023, arXiv 2312.07104): an edge holds a run of tokens with
their keys and values, so the longest common beginning is found token by token, and texts that share one store it once.
Because attention is causal, keys and values of a position depend on the tokens up to it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.models.gpt import KeyValueCache


@dataclass(eq=False)
class Run:
    """Tokens that follow their parent's, with keys and values [layers, 2, heads, T, head size] as a cache stores them.

    The root has neither.
    """

    tokens: tuple[int, ...] = ()
    stored: Tensor | None = None
    parent: Run | None = None
    children: dict[int, Run] = field(default_factory=dict)  # by their first token
    last_used: int = 0


class PrefixCache:
    """Keys and values of at most ``limit_bytes`` for one model and one kind of layer cache; least recently used go
    first.

    Forget it when the weights change. Raises UserError for a negative limit.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise UserError(f"the prefix cache is limited to {limit_bytes} bytes: choose 0 (keeps nothing) or more")
        self.limit_bytes = limit_bytes
        self.stored_bytes = 0
        self.clock = 0
        self.root = Run()

    def restore(self, texts: Sequence[Sequence[int]], cache: KeyValueCache) -> int:
        """Put the longest beginning that is stored of every text into the empty ``cache``; return its length.

        It ends before the last token, whose hidden state somebody wants. Texts are of equal length, one a row of the
        cache; rows that differ in what is stored share the shortest. Raises UserError for other texts or a used cache.
        """
        check(texts, cache)
        if cache.length:
            raise UserError(f"a cache that holds {cache.length} positions cannot begin again: use a new one")
        paths = [self._path(text[:-1]) for text in texts]
        length = min(sum(matched for _, matched in path) for path in paths)
        if length == 0:
            return 0
        rows = [_gather(path, length) for path in paths]
        stored = rows[0].unsqueeze(2) if len(rows) == 1 else torch.stack(rows, dim=2)
        for layer, (keys, values) in zip(cache.layers, stored, strict=True):
            layer.append(keys, values)
        cache.length = length
        return length

    def store(self, texts: Sequence[Sequence[int]], cache: KeyValueCache) -> None:
        """Keep what ``cache`` holds of ``texts``, right after it has read all that ``restore`` did not give.

        A text of more bytes than the limit is not kept. Raises UserError for texts that are not what the cache holds.
        """
        check(texts, cache)
        if any(len(text) != cache.length for text in texts):
            raise UserError(f"the cache holds {cache.length} positions, not the texts' {len(texts[0])}")
        for row, text in enumerate(texts):
            self._store(text, row, cache)

    def _store(self, text: Sequence[int], row: int, cache: KeyValueCache) -> None:
        path = self._path(text)
        known = sum(matched for _, matched in path)
        parent = path[-1][0] if path else self.root
        if known == len(text):
            return
        fresh = [
            layer.stored[:, row, :, layer.end - (len(text) - known) : layer.end]
            for layer in cache.layers
            if layer.stored is not None
        ]
        fresh_bytes = sum(part.nbytes for part in fresh)
        if fresh_bytes + sum(run.stored.nbytes for run, _ in path if run.stored is not None) > self.limit_bytes:
            return
        if path and path[-1][1] < len(parent.tokens):
            parent = _split(parent, path[-1][1])
        run = Run(tuple(text[known:]), torch.stack(fresh), parent, last_used=self.clock)
        parent.children[run.tokens[0]] = run
        self.stored_bytes += fresh_bytes
        while self.stored_bytes > self.limit_bytes:
            self._forget(min((run for run in self._runs() if not run.children), key=lambda run: run.last_used))

    def _path(self, text: Sequence[int]) -> list[tuple[Run, int]]:
        """Runs from the root on, each with how many of its tokens ``text`` goes along with; they count as used now."""
        self.clock += 1
        path: list[tuple[Run, int]] = []
        run, begin = self.root, 0
        while begin < len(text) and (child := run.children.get(text[begin])) is not None:
            rest = text[begin : begin + len(child.tokens)]
            pairs = zip(child.tokens, rest, strict=False)
            matched = next((index for index, (held, wanted) in enumerate(pairs) if held != wanted), len(rest))
            child.last_used = self.clock
            path.append((child, matched))
            if matched < len(child.tokens):
                break
            run, begin = child, begin + matched
        return path

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [run.stored for run in self._runs() if run.stored is not None]

    def _runs(self) -> Iterator[Run]:
        waiting = list(self.root.children.values())
        while waiting:
            run = waiting.pop()
            waiting.extend(run.children.values())
            yield run

    def _forget(self, run: Run) -> None:
        assert run.parent is not None and run.stored is not None
        del run.parent.children[run.tokens[0]]
        self.stored_bytes -= run.stored.nbytes


def check(texts: Sequence[Sequence[int]], cache: KeyValueCache) -> None:
    """Raise UserError unless there is a text for every row of the cache, all of one length, none empty."""
    if len(texts) != cache.batch_size:
        raise UserError(f"{len(texts)} texts do not fill a cache of {cache.batch_size} rows: give one for each row")
    lengths = {len(text) for text in texts}
    if len(lengths) != 1 or lengths == {0}:
        raise UserError(
            f"texts of {', '.join(map(str, sorted(lengths)))} tokens cannot be read side by side: "
            "give texts of one length, at least one token, or read them one after the other"
        )


def _split(run: Run, length: int) -> Run:
    """Cut ``run`` after ``length`` tokens; return its upper part, which takes its place in the tree."""
    assert run.stored is not None and run.parent is not None
    upper = Run(run.tokens[:length], run.stored[..., :length, :].clone(), run.parent, last_used=run.last_used)
    run.parent.children[run.tokens[0]] = upper
    upper.children[run.tokens[length]] = run
    # A copy too: a view would keep the whole run's bytes alive.
    run.tokens, run.stored, run.parent = run.tokens[length:], run.stored[..., length:, :].clone(), upper
    return upper


def _gather(path: list[tuple[Run, int]], length: int) -> Tensor:
    """Keys and values of the first ``length`` tokens along ``path``: [layers, 2, heads, length, head size]."""
    parts = [run.stored[..., :matched, :] for run, matched in path if run.stored is not None]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2))[..., :length, :]
