"""The guide to token compression and caching: less memory, faster inference; on our model and on a finished one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pandas as pd

from experiments.claims.base import Check, Claim, Finding, at_least, at_most, fixed, measured
from experiments.tokens.caching_words import (
    FASTER_CLAIM,
    LEANER_CLAIM,
    LIBRARIES,
    WORKLOAD,
    memory_shares,
    speed_ups,
    unseen,
)
from vocabfold.errors import UserError

BASES = {"none": "no cache", "key/value": "a plain key/value cache"}


@dataclass(frozen=True)
class Tables:
    """Where one model's caches were measured, {corpus} put in: ``name``.csv and ``name``_memory.csv in
    results/``folder``, by what ``command``."""

    folder: str
    name: str
    command: str

    def read(self, corpus: str, suffix: str, *columns: str) -> pd.DataFrame:
        """One of the two. Raises UserError where it is missing or another version's."""
        columns = ("library", "cache", "workload", *columns)
        return measured(self.folder.format(corpus=corpus), f"{self.name}{suffix}", self.command, columns)

    def lacking(self, corpus: str, suffix: str, what: str) -> UserError:
        """What to do about a row that is not there."""
        path = f"results/{self.folder.format(corpus=corpus)}/{self.name}{suffix}.csv"
        return UserError(f"{path} has no {what}: run {self.command} again")


def faster(corpus: str, tables: Tables) -> Finding:
    """25% faster: the best cache of each library, on prompts that it has not seen."""
    table = tables.read(corpus, "", "prompt_tokens", "new_tokens", "round", "seconds")
    not_seen = table.loc[table["workload"] == "distinct", WORKLOAD].drop_duplicates()
    if len(not_seen) < 2:
        raise tables.lacking(corpus, "", "short and long prompts that no cache has seen")
    checks = []
    for library in (name for name in LIBRARIES if name in set(table["library"])):
        for key in not_seen.itertuples(index=False, name=None):
            ratios = speed_ups(table, library, key)
            if not ratios:
                raise tables.lacking(corpus, "", f"cache of {library} on prompts of {key[1]}")
            cache, ratio = max(ratios.items(), key=lambda item: item[1])
            asked = f"{library}, unseen prompts of {key[1]}: speed over no cache"
            checks.append(at_least(asked, ratio, FASTER_CLAIM, "{:.2f}", f"{library}, {key[1]}: {cache} {{}}"))
    return Finding(tuple(checks))


def leaner(corpus: str, tables: Tables) -> Finding:
    """30% less memory: the leanest cache of each library, of the whole peak and of what is above the weights."""
    memory = tables.read(corpus, "_memory", "peak_memory_mib", "weights_mib")
    checks: list[Check] = []
    for library in (name for name in LIBRARIES if name in set(memory["library"])):
        rows = unseen(memory, library)
        if missing := [base for base in BASES if base not in rows.index]:
            raise tables.lacking(corpus, "_memory", f"row of {library} with the cache {missing[0]}")
        for base, name in BASES.items():
            for part, shares in zip(("whole peak", "above the weights"), memory_shares(rows, base), strict=True):
                others = shares.drop(index=list({"none", base}))
                if others.empty:
                    continue
                asked = f"{library}, {part} over that of {name}, at a full context"
                found = f"{library}, {part}, {others.idxmin()} over {name} {{}}"
                checks.append(at_most(asked, float(others.min()), LEANER_CLAIM, "{:.3f}", found))
    return Finding(tuple(checks))


OURS = Tables("{corpus}", "caching", "`make tokens`")
FINISHED = Tables("real", "real_caching", "`python -m experiments real_caching measure`")
CLAIMS = tuple(
    Claim(
        "summary",
        f"{statement}{where}",
        fixed(published),
        partial(judge, tables=tables),
        tuple(f"{tables.folder}/{tables.name}{suffix}" for suffix in (".png", ".md", f"{table}.csv")),
        tables.command,
    )
    for statement, published, judge, table in (
        ("Caching makes inference up to 25% faster", f"{FASTER_CLAIM - 1:.0%} faster", faster, ""),
        ("Token compression and caching take up to 30% less memory", f"{1 - LEANER_CLAIM:.0%} less", leaner, "_memory"),
    )
    for where, tables in (("", OURS), (" (SmolLM2-135M)", FINISHED))
)
