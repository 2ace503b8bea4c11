"""The table of one part of what is measured on a card: rows are on disk as soon as they are measured.

Several short runs add up: a case that stands, on the same hardware and torch, is not measured again. A case that
failed or was refused is tried again by another commit, and one whose process died is a row too ("crashed").
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vocabfold.machine import origin
from vocabfold.runs.tables import ORIGIN_COLUMNS

OK, OOM, REFUSED, ERROR, CRASHED = "ok", "oom", "refused", "error", "crashed"
UNTIL_ANOTHER_COMMIT = (REFUSED, ERROR, CRASHED)  # what a change of the code may mend
MEASURED = [
    "round",
    "rounds",
    "calls",
    "milliseconds",
    "peak_memory_gib",
    "peak_above_gib",
    "reserved_memory_gib",
    "status",
    "note",
]


class Rows:
    """The CSV at ``path``: ``keys`` tell cases apart, ``own`` columns are the part's, then MEASURED and the origin."""

    def __init__(self, path: Path, keys: Sequence[str], own: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        self.columns = [*keys, *own, *MEASURED, *ORIGIN_COLUMNS]
        self.marker = path.with_suffix(".under_way")
        self.origin = origin()
        self.on_card = torch.cuda.is_available()
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))
        if self.marker.is_file():
            died = json.loads(self.marker.read_text(encoding="utf-8"))
            self.marker.unlink()
            self.add([died | {"status": CRASHED, "note": "its process died"}])

    def begin(self, key: Mapping[str, Any]) -> None:
        """Remember that a case is under way, should its process die."""
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        self.marker.write_text(json.dumps(dict(key)), encoding="utf-8")

    def end(self) -> None:
        """No case is under way."""
        self.marker.unlink(missing_ok=True)

    def of(self, key: Mapping[str, Any]) -> list[dict[str, str]]:
        """The rows of a case that were measured on this machine with this torch."""
        told = {name: text_of(key[name]) for name in self.keys} | {"torch": self.origin["torch"]}
        same = [row for row in self.rows if all(row.get(name) == value for name, value in told.items())]
        return [row for row in same if self._machine(row) == self._machine(self.origin)]

    def _machine(self, row: Mapping[str, str]) -> str:
        """The card, where there is one: the processor beside it may be another in each run."""
        hardware = row["hardware"]
        return hardware.rpartition(", ")[2] if self.on_card else hardware

    def stands(self, key: Mapping[str, Any]) -> bool:
        """Whether nothing is left to be measured of a case."""
        rows = self.of(key)
        if any(row["status"] == OOM for row in rows):
            return True
        commit = self.origin["commit"]
        if any(row["status"] in UNTIL_ANOTHER_COMMIT and row["commit"] == commit for row in rows):
            return True
        measured = [row for row in rows if row["status"] == OK]
        return bool(measured) and len(measured) >= int(measured[-1]["rounds"])

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; the file with them is whole when this returns, and not synced: that would take longer than to
        measure. What failed before and is measured now is replaced."""
        for row in rows:
            # The rounds of a case that was left before its last are measured again from the first on.
            afresh = row["status"] != OK or row.get("round") == 0
            before = [old for old in self.of(row) if afresh or old["status"] != OK]
            self.rows = [old for old in self.rows if all(old is not gone for gone in before)]
            whole = {**row, **self.origin}
            self.rows.append({name: text_of(whole.get(name)) for name in self.columns})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(text.getvalue(), encoding="utf-8")
        beside.replace(self.path)


def text_of(value: Any) -> str:
    """A value as the table has it; "" is none."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
