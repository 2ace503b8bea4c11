"""Every claim of the papers beside what the tables say: results/CORPUS/report.md.

    python -m experiments report draw [CORPUS ...]

reads the tables that are there (by default for every text that has one of them) and computes published value, ours and
verdict of each claim in experiments/claims. A table that is missing or another version's is one line, in the report and
on stderr; the other claims are written all the same.
"""

from __future__ import annotations

import sys

from experiments.claims import SOURCES
from experiments.claims.base import (
    NOT_REPRODUCED,
    NOT_RUN,
    PARTLY,
    REPRODUCED,
    UNTESTABLE,
    Claim,
    Finding,
    Source,
    existing,
)
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.tables import RESULTS

TABLES = ("main_comparison",)  # a text has a report if it has this table
VERDICTS = (REPRODUCED, PARTLY, NOT_REPRODUCED, UNTESTABLE, NOT_RUN)
RULE = (
    "Every number is computed from the tables by `python -m experiments report draw`. A claim is taken apart into "
    "checks, each with its bound; its verdict follows from them: **reproduced** if all are met, **partly** if some "
    "are, **not reproduced** if none is. **Cannot be tested here**: the tables hold nothing that could decide it. "
    "**Not run**: a table is missing or another version's."
)


def report(corpus: str) -> tuple[str, list[str]]:
    """(the report, what was wrong: one line for each claim whose table is missing or another version's)."""
    judged = [(source, [(claim, claim.judged(corpus)) for claim in source.claims]) for source in SOURCES]
    findings = [finding for _, pairs in judged for _, finding in pairs]
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    lines = [f"# The papers' claims and our results on {corpus}", "", RULE, ""]
    lines += [f"{len(findings)} claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".", ""]
    for source, pairs in judged:
        lines += section(source, pairs, corpus)
    problems = [
        f"{claim.where}, {claim.statement}: {finding.problem}"
        for _, pairs in judged
        for claim, finding in pairs
        if finding.problem
    ]
    return "\n".join(lines), problems


def section(source: Source, pairs: list[tuple[Claim, Finding]], corpus: str) -> list[str]:
    """One paper: a line a claim, then the checks behind each verdict."""
    title = f"[{source.title}]({source.link})" if source.link else source.title
    lines = [f"## {title}", "", "| where | claim | published | ours | verdict | evidence |", "|---" * 6 + "|"]
    for claim, finding in pairs:
        cells = [claim.where, claim.statement, claim.published(), finding.ours, f"**{finding.verdict}**"]
        cells.append(f"{links(claim, corpus)} {claim.command}".strip())
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if any(finding.checks for _, finding in pairs):
        lines += ["Checks:", ""]
    for claim, finding in pairs:
        if finding.checks:
            lines.append(f"* {claim.where}: {claim.statement} (**{finding.verdict}**)")
            lines += [f"  * {'met' if check.met else '**not met**'}: {check.asked}; {check.found}"
                      for check in finding.checks]  # fmt: skip
    return [*lines, ""]


def links(claim: Claim, corpus: str) -> str:
    """To the figures and tables that are there, from results/SCALE."""
    found = [(path.suffix[1:], path.relative_to(RESULTS)) for path in existing(claim.evidence, corpus)]
    return " ".join(f"[{kind}](../{path.as_posix()})" for kind, path in found)


def draw(corpus: str) -> None:
    """Write the report on one text. Raises UserError where results/ has no folder of it."""
    if not (RESULTS / corpus).is_dir():
        raise UserError(f"there is no {RESULTS / corpus}: run `make everything` on that text first")
    text, problems = report(corpus)
    for problem in problems:
        print(f"report {corpus}: {problem}", file=sys.stderr)
    path = RESULTS / corpus / "report.md"
    write_text(path, text)
    print(f"wrote {path}")
