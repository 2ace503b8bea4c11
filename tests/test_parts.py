"""The parts of the study: their steps are there and in an order that works, and the first that fails ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiments.__main__ import experiments
from experiments.study import parts
from experiments.study.parts import PARTS, Step, runs_to_begin_from, status_of
from hydra.core.override_parser.overrides_parser import OverridesParser

from run_cases import REPOSITORY, experiment
from vocabfold.errors import UserError

FOUND = experiments()
SECOND = ["data=text", "data.train=other.txt", "data.valid=valid.txt", "data.label=second_text"]
LOCAL = ["data=text", "data.train=train.txt", "data.valid=valid.txt"]
WAIT = "import signal, sys, time; print('ready', flush=True); time.sleep(60)"
KEEP_AN_INTERRUPT = """
import signal, sys
from experiments.study.parts import status_of
print(status_of([sys.executable, "-S", "-c", sys.argv[1]]), flush=True)
"""


def commands(part: str, first: list[str], second: list[str]) -> list[list[str]]:
    return [step.command(first, second) for step in PARTS[part] if step.is_taken(first, second)]


@pytest.mark.parametrize("part", PARTS)
def test_every_step_is_there_and_comes_after_what_it_needs(part: str) -> None:
    done: set[tuple[str, str]] = set()
    for step in PARTS[part]:
        if step.action == "train":
            assert (REPOSITORY / "conf" / "experiment" / f"{step.name}.yaml").is_file()
            assert step.begun_from is None or ("train", step.begun_from[0]) in done
        else:
            room, _ = FOUND[step.name]
            text = (REPOSITORY / "experiments" / room / f"{step.name}.py").read_text(encoding="utf-8")
            assert f"\ndef {step.action}(" in text
            if step.action == "measure" and f'collect_runs("{step.name}"' in text:
                assert ("train", step.name) in done
            if step.action == "draw" and "\ndef measure(" in text:
                assert ("measure", step.name) in done
        done.add((step.action, step.name))
    # what a part measures it also draws, where there is something to draw
    measured = {name for action, name in done if action == "measure"}
    for name in measured - {name for action, name in done if action == "draw"}:
        assert name in {"document_losses", "figure3_simulated_memory", "heads_cost", "learning_rates"}


def test_texts_decide_what_is_trained() -> None:
    trained = {
        name: [command[-1] for command in commands("paper", *texts) if command[0] == "vocabfold.train"]
        for name, texts in {"stories": (["data=stories"], []), "local": (LOCAL, []), "two": (LOCAL, SECOND)}.items()
    }
    local = ["experiment=main_comparison", "experiment=figure3_group_size"]
    assert trained["local"] == local
    assert trained["stories"] == [*local, "experiment=table1_story_quality"]
    assert trained["two"] == [
        *local,
        "head.partition.group_size=28,104,225,728,3864",
        "experiment=figure3_baseline",
    ]
    measured = [
        command[3:] for command in commands("paper", LOCAL, SECOND) if command[1:3] == ["figure3_group_size", "measure"]
    ]
    assert measured == [LOCAL, SECOND]
    assert ["experiments", "table2_memory", "measure"] in commands("paper", LOCAL, [])
    assert commands("report", LOCAL, []) == [["experiments", "audit", "draw"], ["experiments", "report", "draw"]]


def finish(folder: Path, run: str) -> None:
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps({"run": run}))


def test_a_sweep_begins_from_every_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = Path('results/runs/it\'s "a, b"/main_comparison')
    for name in ("gpt2-full-seed1-b", "gpt2-full-seed0-a", "gpt2-paper-seed0-c"):
        finish(trained / name, run=name[-1])
    (trained / "gpt2-full-seed2-d").mkdir()
    (step,) = [step for step in PARTS["heads"] if step.name == "fold" and step.action == "train" and not step.words]
    words = [*LOCAL, 'data.label="it\'s \\"a, b\\""']
    (override,) = OverridesParser.create().parse_overrides([step.command(words, [])[-1]])
    assert override.key_or_group == "start.run"
    chosen = [each.text for each in override.value().list]
    assert chosen == [str(trained / "gpt2-full-seed0-a"), str(trained / "gpt2-full-seed1-b")]
    with pytest.raises(UserError, match="holds no finished run gpt2-nothing"):
        runs_to_begin_from('it\'s "a, b"', "main_comparison", "gpt2-nothing")


def test_the_first_step_that_fails_ends_a_part_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def program(command: list[str]) -> int:
        started.append(command[2:])
        return 3 if len(started) == 2 else 0

    monkeypatch.setattr(parts, "status_of", program)
    assert experiment(monkeypatch, "smoke", "reproduce") == 3
    assert started == [
        ["vocabfold.train", "--multirun", "experiment=first_look"],
        ["experiments", "first_look", "measure"],
    ]
    lines = capfd.readouterr().err.splitlines()
    assert lines[1] == "smoke, step 2 of 3: python -m experiments first_look measure" and len(lines) == 2
    started.clear()
    monkeypatch.setitem(PARTS, "one", [Step("draw", "audit")])
    assert experiment(monkeypatch, "one", "reproduce", "data=stories", "--second", "data=zipf") == 0
    assert started == [["experiments", "audit", "draw"]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nonesuch", "reproduce"], "there is no part nonesuch: choose one of smoke, paper"),
        (["paper", "reproduce", "data=null"], "there is no data=null: choose one of"),
        (["paper", "reproduce", "--third", "x"], "--third"),
    ],
)
def test_what_is_no_part_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert experiment(monkeypatch, *words) == 2
    written = capfd.readouterr().err
    assert written.count("\n") == 1 and told in written


def test_a_program_ends_with_its_own_status_and_gets_the_signals() -> None:
    assert status_of([sys.executable, "-S", "-c", "raise SystemExit(5)"]) == 5
    assert status_of([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]) == 137
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    for number, status in ((signal.SIGTERM, "143\n"), (signal.SIGINT, "0\n")):
        # an interrupt reaches the program through its terminal, which is not there: it goes on to its end
        program = WAIT if number == signal.SIGTERM else WAIT.replace("60", "0.3")
        command = [sys.executable, "-c", KEEP_AN_INTERRUPT, program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(number)
            started = time.monotonic()
            assert process.stdout.read() == status and time.monotonic() - started < 30
