"""The one command line of the experiments, the identity of what they measure, and the values that make hands on."""

from __future__ import annotations

import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
from experiments.__main__ import ROOMS, experiments, trained_only
from experiments.judging import Endpoint
from experiments.study.measuring import composed, identity, is_measured, text_of, write_measured
from experiments.study.parts import PARTS
from hydra.core.override_parser.overrides_parser import OverridesParser

from run_cases import REPOSITORY, TEXT, experiment, write_corpus
from vocabfold.errors import UserError
from vocabfold.machine import hardware


def made(*values: str) -> subprocess.CompletedProcess[str]:
    """What ``make -n paper`` with these values would run."""
    return subprocess.run(["make", "-n", "paper", *values], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_every_experiment_is_listed_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = experiments()
    assert experiment(monkeypatch) == 0
    listed = capfd.readouterr().out
    for name, (room, line) in found.items():
        assert room in ROOMS and line.endswith(".") | line.endswith("?") and f"{name} " in listed and line in listed
    assert {"main_comparison", "report", "audit", "first_look"} < set(found)
    assert not {"base", "figures", "measuring", "text_judge", "caching_speed"} & set(found)
    only_trained = {"embedding_compressed": "embedding_compression", "figure3_baseline": "figure3_group_size"}
    only_trained |= {"larger_vocabulary": "vocabulary_scaling", "shapes_full": "shapes"}
    assert only_trained.items() <= trained_only(found).items() and set(only_trained.values()) < set(found)
    for name, elsewhere in only_trained.items():
        assert re.search(rf"^  {name} +Measured and drawn by {elsewhere}\.$", listed, re.M)
    for path in (REPOSITORY / "experiments").rglob("*.py"):
        assert path.name == "__main__.py" or "__main__" not in path.read_text(), path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonesuch"], "there is no experiment nonesuch"),
        (["decod", "draw"], "did you mean decode?"),
        (["decode", "shout"], "invalid choice"),
        (["decode"], "required"),
        (["decode", "draw", "nowhere"], "run `python -m experiments decode measure` first"),
        (["heads_cost", "measure", "data=nonesuch"], "there is no data=nonesuch"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert experiment(monkeypatch, *arguments) == 2
    written = capfd.readouterr().err
    assert written.count("\n") == 1 and words in written


def test_a_measurement_is_its_options_and_the_content_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    options = Namespace(action="measure", rounds=3, settings=TEXT)
    first = identity("decode", options, text_of(composed(TEXT)))
    (tmp_path / "moved.txt").write_bytes((tmp_path / "train.txt").read_bytes())
    assert identity("decode", options, text_of(composed([*TEXT, "data.train=moved.txt"]))) == first
    (tmp_path / "train.txt").write_text("another text", encoding="utf-8")
    assert identity("decode", options, text_of(composed(TEXT))) != first
    assert identity("decode", Namespace(rounds=4), text_of(composed([*TEXT, "data.train=moved.txt"]))) != first


@pytest.mark.parametrize("column", ["run", "measurement"])
def test_only_what_this_machine_timed_counts_as_timed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], column: str
) -> None:
    path = tmp_path / "table.csv"
    assert not is_measured(path, "a", column)
    pd.DataFrame(
        {column: ["a", "a", "b", "c", "c"], "hardware": [hardware(), hardware(), "a card", "a card", hardware()]}
    ).to_csv(path)
    measured = [name for name in "abcd" if is_measured(path, name, column)]
    timed = [name for name in "abcd" if is_measured(path, name, column, timed=True)]
    assert (measured, timed) == (["a", "b", "c"], ["a"])
    written = capfd.readouterr().err
    assert written.count("measured before on a card, now measured on this machine") == 2
    pd.DataFrame({column: ["a"]}).to_csv(path)
    assert is_measured(path, "a", column) and not is_measured(path, "a", column, timed=True)


def test_rows_beside_the_measured_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_measured(pd.DataFrame({"size": [1, 2], "seconds": [3.0, 4.0]}), path, "old", beside="size")
    write_measured(pd.DataFrame({"size": [2, 3], "seconds": [5.0, 6.0]}), path, "new", beside="size")
    table = pd.read_csv(path)
    assert table.to_dict("list") == {"run": ["old", "new", "new"], "size": [1, 2, 3], "seconds": [3.0, 5.0, 6.0]}
    write_measured(pd.DataFrame({"size": [1]}), path, "newest")
    assert pd.read_csv(path).to_dict("list") == {"run": ["newest"], "size": [1]}
    with pytest.raises(UserError, match="has no column seconds: another version wrote it"):
        write_measured(pd.DataFrame({"seconds": [1.0]}), path, "newest", beside="seconds")


@pytest.mark.parametrize("value", ["a b.txt", "a,b.txt", "x;touch f", "it's", 'say "a"', "$(touch f)", "[1]", "a=b"])
def test_make_hands_a_value_on_whole(value: str) -> None:
    done = made(f"TRAIN={value}", "VALID=v.txt", "CORPUS=Tiny Stories")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "paper reproduce" in line]
    words = shlex.split(line)[5:]
    commands = [step.command(words, ()) for step in PARTS["paper"] if step.text == "first" and step.action != "draw"]
    for command in (words, *commands):  # each step gets them as they are
        overrides = [word for word in command if word.startswith("data.")]
        values = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(overrides)}
        assert values == {"data.train": value, "data.valid": "v.txt", "data.label": "Tiny Stories"}


@pytest.mark.parametrize("values", [["TRAIN=a"], ["TRAIN=a", "VALID=b", "TRAIN2=c"]])
def test_a_text_without_its_validation_text_is_one_line(values: list[str]) -> None:
    done = made(*values)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "without VALID" in done.stderr


def test_every_target_is_in_the_help() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.M)
    assert set(phony.split()) == set(re.findall(r"^([a-z-]+):[^=\n]*## ", text, flags=re.M))
    assert not re.search(r"\|\| true|test -f|\.done", text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host:8/v1", "https://***@host:8/v1"),
        ("http://token@host", "http://***@host"),
        ("http://host/a@b", "http://host/a@b"),
    ],
)
def test_a_password_in_an_address_is_not_shown(url: str, shown: str) -> None:
    assert Endpoint("m", url).address == shown
