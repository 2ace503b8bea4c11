"""Every claim of the papers beside what the tables say: results/SCALE/report.md.

    python -m experiments report [SCALE ...]

reads the tables that are there (by default for every scale that has one of them) and computes published value, ours and
verdict of each claim in experiments/claims. A table that is missing or another version's is one line, in the report and
on stderr; the other claims are written all the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

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
from vocabfold.command_line import one_line_errors
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.runs.record import RESULTS

SCALE_TABLE = "main_comparison"  # a scale is there if it has this table
VERDICTS = (REPRODUCED, PARTLY, NOT_REPRODUCED, UNTESTABLE, NOT_RUN)
RULE = (
    "Every number is computed from the tables by `python -m experiments report {scale}`. A claim is taken apart into "
    "checks, each with its bound; its verdict follows from them: **reproduced** if all are met, **partly** if some "
    "are, **not reproduced** if none is. **Cannot be tested here**: the tables hold nothing that could decide it. "
    "**Not run**: a table is missing or another version's."
)


def report(scale: str) -> tuple[str, list[str]]:
    """(the report, what was wrong: one line for each claim whose table is missing or another version's)."""
    judged = [(source, [(claim, claim.judged(scale)) for claim in source.claims]) for source in SOURCES]
    findings = [finding for _, pairs in judged for _, finding in pairs]
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    lines = [f"# The papers' claims and our results, scale {scale}", "", RULE.format(scale=scale), ""]
    lines += [f"{len(findings)} claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".", ""]
    for source, pairs in judged:
        lines += section(source, pairs, scale)
    problems = [
        f"{claim.where}, {claim.statement}: {finding.problem}"
        for _, pairs in judged
        for claim, finding in pairs
        if finding.problem
    ]
    return "\n".join(lines), problems


def section(source: Source, pairs: list[tuple[Claim, Finding]], scale: str) -> list[str]:
    """One paper: a line a claim, then the checks behind each verdict."""
    title = f"[{source.title}]({source.link})" if source.link else source.title
    lines = [f"## {title}", "", "| where | claim | published | ours | verdict | evidence |", "|---" * 6 + "|"]
    for claim, finding in pairs:
        cells = [claim.where, claim.statement, claim.published(), finding.ours, f"**{finding.verdict}**"]
        cells.append(f"{links(claim, scale)} {claim.command.format(scale=scale)}".strip())
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


def links(claim: Claim, scale: str) -> str:
    """To the figures and tables that are there, from results/SCALE."""
    found = [(path.suffix[1:], path.relative_to(RESULTS)) for path in existing(claim.evidence, scale)]
    return " ".join(f"[{kind}](../{path.as_posix()})" for kind, path in found)


def scales_here() -> list[str]:
    """Those that have tables to report on."""
    return sorted(path.parent.name for path in RESULTS.glob(f"*/{SCALE_TABLE}.csv"))


@one_line_errors
def main() -> None:
    """Command line: scales."""
    scales = sys.argv[1:] or scales_here()
    if not scales:
        raise UserError(f"there is no results/*/{SCALE_TABLE}.csv to report on: run `make everything` first")
    if unknown := [scale for scale in scales if not (RESULTS / scale).is_dir()]:
        raise UserError(f"there is no {RESULTS / unknown[0]}: run `make everything SCALE={unknown[0]}` first")
    for scale in scales:
        text, problems = report(scale)
        for problem in problems:
            print(f"{Path(sys.argv[0]).name} {scale}: {problem}", file=sys.stderr)
        path = RESULTS / scale / "report.md"
        write_text(path, text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
