"""The guide to token compression and caching: less memory, faster inference."""

from __future__ import annotations

from experiments.claims.base import Check, Claim, Finding, at_least, at_most, fixed, with_columns
from experiments.tokens.caching import read
from experiments.tokens.caching_words import (
    FASTER_CLAIM,
    LEANER_CLAIM,
    LIBRARIES,
    LONG,
    SHORT,
    memory_shares,
    speed_ups,
    unseen,
)
from vocabfold.errors import UserError

BASES = {"none": "no cache", "key/value": "a plain key/value cache"}


def faster(corpus: str) -> Finding:
    """25% faster: the best cache of each library, on prompts that it has not seen."""
    columns = ("library", "cache", "workload", "prompt_tokens", "new_tokens", "round", "seconds")
    path = f"results/{corpus}/caching.csv"
    table = with_columns(read(corpus, "caching"), path, columns)
    checks = []
    for library in (name for name in LIBRARIES if name in set(table["library"])):
        for key in (SHORT, LONG):
            ratios = speed_ups(table, library, key)
            if not ratios:
                raise UserError(f"{path} has no cache of {library} on prompts of {key[1]}: run `make tokens` again")
            cache, ratio = max(ratios.items(), key=lambda item: item[1])
            asked = f"{library}, unseen prompts of {key[1]}: speed over no cache"
            checks.append(at_least(asked, ratio, FASTER_CLAIM, "{:.2f}", f"{library}, {key[1]}: {cache} {{}}"))
    return Finding(tuple(checks))


def leaner(corpus: str) -> Finding:
    """30% less memory: the leanest cache of each library, of the whole peak and of what is above the weights."""
    columns = ("library", "cache", "workload", "peak_memory_mib", "weights_mib")
    path = f"results/{corpus}/caching_memory.csv"
    memory = with_columns(read(corpus, "caching_memory"), path, columns)
    checks: list[Check] = []
    for library in (name for name in LIBRARIES if name in set(memory["library"])):
        rows = unseen(memory, library)
        if missing := [base for base in BASES if base not in rows.index]:
            raise UserError(f"{path} has no row of {library} with the cache {missing[0]}: run `make tokens` again")
        for base, name in BASES.items():
            for part, shares in zip(("whole peak", "above the weights"), memory_shares(rows, base), strict=True):
                others = shares.drop(index=list({"none", base}))
                if others.empty:
                    continue
                asked = f"{library}, {part} over that of {name}, at a full context"
                found = f"{library}, {part}, {others.idxmin()} over {name} {{}}"
                checks.append(at_most(asked, float(others.min()), LEANER_CLAIM, "{:.3f}", found))
    return Finding(tuple(checks))


EVIDENCE = ("{corpus}/caching.png", "{corpus}/caching.md")
CLAIMS = (
    Claim(
        "summary",
        "Caching makes inference up to 25% faster",
        fixed(f"{FASTER_CLAIM - 1:.0%} faster"),
        faster,
        (*EVIDENCE, "{corpus}/caching.csv"),
        "`make tokens`",
    ),
    Claim(
        "summary",
        "Token compression and caching take up to 30% less memory",
        fixed(f"{1 - LEANER_CLAIM:.0%} less"),
        leaner,
        (*EVIDENCE, "{corpus}/caching_memory.csv"),
        "`make tokens`",
    ),
)
