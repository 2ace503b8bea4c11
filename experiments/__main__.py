"""The one command line of the study: ``python -m experiments NAME ...`` runs experiments/ROOM/NAME.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from vocabfold.command_line import one_line_errors
from vocabfold.errors import UserError


@one_line_errors
def main() -> None:
    """Find the program and run it with the arguments that follow its name."""
    programs = {path.stem: path for path in Path(__file__).parent.glob("*/*.py") if path.stem != "__init__"}
    if len(sys.argv) < 2 or sys.argv[1] not in programs:
        raise UserError(f"name one of {', '.join(sorted(programs))}")
    path = programs[sys.argv[1]]
    del sys.argv[1]
    runpy.run_module(f"experiments.{path.parent.name}.{path.stem}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
