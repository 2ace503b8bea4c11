"""The seeded faults fit this tree; trying them takes minutes: python tests/mutations.py."""

from __future__ import annotations

from pathlib import Path

from faults import FAULTS, place_of, sources_of

REPOSITORY = Path(__file__).resolve().parents[1]


def test_each_fault_has_its_place_and_tests_that_should_notice() -> None:
    sources = sources_of(REPOSITORY)
    for fault in FAULTS:
        path = place_of(fault, sources)
        assert path is not None, f"of {fault.file} the text {fault.old!r} stands nowhere, or twice: say it as it is now"
        compile(sources[path].replace(fault.old, fault.new), path, "exec")
        assert all((REPOSITORY / "tests" / name).is_file() for name in fault.tests.split()), fault
