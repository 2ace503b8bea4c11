"""README and docs: every command is one that the programs take, every link and file is there, and the README stays
short and explains its words before it uses them."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from experiments.__main__ import experiments, parser_of
from experiments.study.parts import PARTS, REPRODUCE

from run_cases import call
from vocabfold.runs.compose import composed
from vocabfold.runs.settings import settings_from

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES, MOST_COLUMNS = 120, 120
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(make \w|python -m |torchrun |pip install |wandb )")
FORBIDDEN = ("as usual", "not done again", "that no loss has", "needs nobody", "contender", "grouped head", "free rows")
# The first place of each of these words in the README has to be the one that says what it means.
DEFINITIONS = {"head": '("head")', "folded": "*folded*", "clustered": '("clustered")'}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def commands_of(page: Path) -> Iterator[str]:
    """The commands in fenced blocks and between backticks, a line each, without comments."""
    text = text_of(page)
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0].strip()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


COMMANDS = sorted({command for page in PAGES for command in commands_of(page) if COMMAND.match(command)})


def of(*beginnings: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(beginnings)]


def check_training(overrides: list[str]) -> None:
    """The command line composes to settings that a run can have; of a sweep, its first run."""
    firsts = [override.partition(",")[0] for override in overrides if not override.startswith("--")]
    config = composed(firsts, with_hydra=True)
    if swept := config.hydra.sweeper.params or {}:
        firsts += [f"{key}={str(values).split(',')[0]}" for key, values in swept.items()]
        config = composed(firsts, with_hydra=True)
    del config.hydra
    settings_from(config)


@pytest.mark.parametrize("command", of("python -m vocabfold.train", "torchrun"))
def test_training_commands_compose(command: str) -> None:
    words = shlex.split(command)
    check_training(words[words.index("vocabfold.train") + 1 :])


@pytest.mark.parametrize("command", of("python -m vocabfold.generate", "python -m vocabfold.compress"))
def test_commands_on_a_run_get_as_far_as_its_folder(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The folder RUN, which is not there; all before it is taken."""
    (tmp_path / ("story.txt.vftm" if "--decompress" in command else "story.txt")).touch()
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)[2:]
    assert call(import_module(program).main, monkeypatch, *words) == 2
    assert "RUN holds no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", of("python -m experiments"))
def test_experiments_take_their_command(command: str) -> None:
    name, *words = shlex.split(command)[3:] or [""]
    if words[:1] == [REPRODUCE]:
        assert all(step.command(words[1:], ()) for step in PARTS[name] if step.begun_from is None)
    elif name:  # without one they are listed
        room, _ = experiments()[name]
        parser_of(name, import_module(f"experiments.{room}.{name}")).parse_args(words)


@pytest.mark.parametrize("command", of("make"))
def test_make_knows_the_target(command: str) -> None:
    asked = [word for word in shlex.split(command)[1:] if not word.endswith("=...")]
    assert asked
    done = subprocess.run(["make", "-n", *asked], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("pip"))
def test_extras_are_there(command: str) -> None:
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for named in re.findall(r"\[([\w,]+)\]", command):
        assert set(named.split(",")) <= set(extras)


def test_commands_are_found_and_all_are_of_a_kind_that_is_checked() -> None:
    assert len(of("python -m vocabfold.train")) > 5 and len(of("python -m experiments")) > 3 and len(of("make")) > 3
    checked = of("python -m vocabfold.", "python -m experiments", "torchrun", "make", "pip", "wandb")
    assert checked == COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page: Path) -> None:
    text = text_of(page)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).is_file(), target
    for name in re.findall(r"`((?:src|experiments|conf|tests|notebooks|results)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).is_file() or "NAME" in name or "EXPERIMENT" in name, name
    for name in re.findall(r"\bdocs/\w+\.md", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_and_plain(page: Path) -> None:
    text = text_of(page)
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= MOST_COLUMNS or line.startswith(("|", "![")), f"{page.name}:{number}"
    for phrase in FORBIDDEN:
        assert phrase not in text.lower(), phrase
    assert not re.search(r"(?<![\w.])/(?:home|tmp|work|root|Users)/", text)


def test_the_readme_is_short_and_explains_its_words() -> None:
    text = text_of(README)
    assert len(text.splitlines()) <= MOST_LINES
    plain = without_code(text)
    assert not re.search(r"\b[NVDSGKT]\b", plain)  # the symbols of docs/ are not explained here
    assert "slot" not in plain
    for word, definition in DEFINITIONS.items():
        first = re.search(rf"\b{word}\b", plain)
        assert first and definition in plain and plain.index(definition) <= first.start(), word
    tables = [block for block in re.split(r"\n(?!\|)", text) if "\n|---" in block]
    assert len(tables) == 2  # which head, and what to use for a model that one has
    assert all(table.count("\n|") - 2 <= 8 for table in tables)


def test_every_text_of_a_committed_table_is_described() -> None:
    """By its SHA-256, in docs/data.md; sequences and pictures that are drawn have none to list."""
    described = text_of(ROOT / "docs" / "data.md")
    named = set()
    for path in ROOT.glob("results/*/*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            first = next(csv.DictReader(file), {})
        if first.get("corpus_sha256") and first["corpus"] not in ("zipf", "shapes"):
            named.add((first["corpus"], first["corpus_sha256"]))
    assert {corpus for corpus, _ in named} >= {"stories", "tinystories"}
    for corpus, digest in named:
        assert f"| {corpus} |" in described and digest in described, corpus


def test_the_table_of_training_steps_keeps_sizes_apart() -> None:
    """A ratio over rounds of two sizes is the speed of neither."""
    with (ROOT / "results/cost/training_step.csv").open(encoding="utf-8", newline="") as file:
        measured = {(row["run"], row["hidden_size"]) for row in csv.DictReader(file)}
    words = text_of(ROOT / "results/cost/training_step.md")
    assert sorted(re.findall(r"^Hidden (\d+)", words, flags=re.MULTILINE)) == sorted(size for _, size in measured)


def test_the_headline_leads_to_the_line_that_computes_it() -> None:
    """README -> table -> what it compares -> the statistics: four files, the number in the first two."""
    text = text_of(README)
    claim = "0.986"
    (table,) = re.findall(r"`(results/[\w/]+heads_scaling\.md)`", text)
    measured = text_of(ROOT / table)
    assert claim in text and claim in measured
    for number in re.findall(r"\d+\.\d+ ± \d+\.\d+|\d\.\d+ \(\d\.\d+ to \d\.\d+\)", text):
        assert number in measured, number
    (compares,) = re.findall(r"`(experiments/heads/\w+\.py)`", text)
    compared = text_of(ROOT / compares)
    assert "def gap" in compared and "experiments.study.statistics" in compared
