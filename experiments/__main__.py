"""The only command line of the study: ``python -m experiments NAME measure|draw``; without a name it lists them.
``python -m experiments PART reproduce`` takes all steps of a part of it, see study/parts.py.

An experiment is a module of one of the rooms with a function ``measure(arguments)`` or ``draw(corpus)`` or both, and
perhaps ``add_options(parser)`` for options of ``measure``. Without a corpus ``draw`` draws for the module's
``CORPORA``, or for each that has one of its ``TABLES`` (the table of its own name where it names none).
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its profiler remarks on memory that is older than itself

from experiments.study.parts import PARTS, REPRODUCE, reproduce
from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.errors import UserError

ROOMS = {
    "paper": "The main paper: its tables and figures, and what it compares",
    "heads": "Heads: which one, in which order, at what cost",
    "embeddings": "Compressed embeddings",
    "tokens": "Coded tokens and cached inference",
    "real": "Models that people have",
    "cards": "Graphics cards: one, several, and models that do not fit on one",
    "claims": "What the papers claim, beside what the tables say",
}
ALL = "all"
CONFIGURATIONS = Path(__file__).resolve().parents[1] / "conf" / "experiment"
# In the configuration of an experiment that only trains: whose table its runs are in.
ELSEWHERE = re.compile(r"^# Its runs are measured and drawn by (\w+)\.$", re.MULTILINE)
ACTIONS = ("measure", "draw")
SIGNATURES = {"measure": ["arguments"], "draw": ["corpus"]}
USAGE = "python -m experiments NAME measure|draw [options]        (python -m experiments NAME --help: its options)"


@functools.cache
def experiments() -> dict[str, tuple[str, str]]:
    """(room, first line of the docstring) of each experiment, by name. Nothing is imported to find out."""
    found = {}
    for room in ROOMS:
        for path in sorted((Path(__file__).parent / room).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if not any(f"\ndef {name}(" in text for name in SIGNATURES):
                continue  # parsing takes longer than reading
            tree = ast.parse(text)
            defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
            if any(
                name in defined and [argument.arg for argument in defined[name].args.args] == names
                for name, names in SIGNATURES.items()
            ):
                found[path.stem] = (room, (ast.get_docstring(tree) or "").partition("\n")[0])
    return found


def trained_only(found: Iterable[str]) -> dict[str, str | None]:
    """The experiments that only train, by name, each with the one that measures and draws its runs where it says so."""
    paths = [path for path in sorted(CONFIGURATIONS.glob("*.yaml")) if path.stem not in set(found)]
    said = {path.stem: ELSEWHERE.search(path.read_text(encoding="utf-8")) for path in paths}
    return {name: match[1] if match else None for name, match in said.items()}


def listing(found: dict[str, tuple[str, str]]) -> str:
    """Every experiment with its one line, by room, those that only train, and the parts."""
    lines = [USAGE, f"python -m experiments {ALL} draw        draws all that has its table"]
    lines.append(f"python -m experiments PART {REPRODUCE} [KEY=VALUE ...]        all of a part: {', '.join(PARTS)}")
    for room, title in ROOMS.items():
        lines += ["", title]
        lines += [f"  {name:24} {line}" for name, (its_room, line) in found.items() if its_room == room]
    lines += ["", "Trained only: python -m vocabfold.train --multirun experiment=NAME"]
    for name, elsewhere in trained_only(found).items():
        lines.append(f"  {name:24} {f'Measured and drawn by {elsewhere}.' if elsewhere else ''}".rstrip())
    return "\n".join(lines)


def parser_of(name: str, module: ModuleType) -> ArgumentParser:
    """The command line of one experiment: one action or two, and the options of ``measure``."""
    look = RawDescriptionHelpFormatter
    parser = ArgumentParser(prog=f"python -m experiments {name}", description=module.__doc__, formatter_class=look)
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    if hasattr(module, "measure"):
        measure = actions.add_parser("measure", help="write the table", formatter_class=look)
        if hasattr(module, "add_options"):
            module.add_options(measure)
        parser.epilog = measure.format_help()
    if hasattr(module, "draw"):
        draw = actions.add_parser("draw", help="from the table: the figure, and the table in words")
        draw.add_argument("corpora", nargs="*", metavar="CORPUS", help="results/CORPUS (default: each with the table)")
    return parser


def draw_all(found: dict[str, tuple[str, str]]) -> None:
    """Draw all that has its table; nothing is sent anywhere."""
    from experiments.study.figures import corpora_with

    for name, (room, _) in found.items():
        module = importlib.import_module(f"experiments.{room}.{name}")
        corpora = getattr(module, "CORPORA", None) or corpora_with(*getattr(module, "TABLES", (name,)))
        if hasattr(module, "draw") and corpora and "" not in corpora:
            draw_for(name, module, corpora)


def draw_for(name: str, module: ModuleType, corpora: Sequence[str]) -> None:
    """Draw for the corpora named, or for all that have the table. Raises UserError where none has."""
    from experiments.study.figures import corpora_with, drawing

    tables = getattr(module, "TABLES", (name,))
    corpora = corpora or getattr(module, "CORPORA", ()) or corpora_with(*tables)
    if not corpora:
        raise UserError(
            f"there is no results/*/{tables[0]}.csv to draw: run `python -m experiments {name} measure` first"
        )
    with drawing():
        for corpus in corpora:
            module.draw(corpus)


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    found, words = experiments(), sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(listing(found))
        return
    if words == [ALL, "draw"]:
        draw_all(found)
        return
    if words[1:2] == [REPRODUCE]:
        if words[0] not in PARTS:
            raise UserError(f"there is no part {words[0]}: choose one of {', '.join(PARTS)}")
        reproduce(words[0], words[2:])
        return
    if words[0] not in found:
        near = difflib.get_close_matches(words[0], found, n=1)
        meant = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no experiment {words[0]}{meant} (python -m experiments lists them)")
    module = importlib.import_module(f"experiments.{found[words[0]][0]}.{words[0]}")
    arguments = parser_of(words[0], module).parse_args(words[1:])
    if arguments.action == "draw":
        draw_for(words[0], module, arguments.corpora)
    else:
        module.measure(arguments)


if __name__ == "__main__":
    main()
