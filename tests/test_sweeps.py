"""Every option of conf/ composes, every experiment takes its steps, and sweeps run under every launcher at hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from run_cases import PICTURES, TINY, call, start
from vocabfold import train
from vocabfold.runs import compose
from vocabfold.runs.settings import CONFIG_FOLDER, settings_from

GROUPS = ("size", "budget", "data", "model", "head", "embedding", "start")
HEADS = {("full", 0), ("full", 1), ("paper", 0), ("paper", 1)}
LAUNCHER_CLASSES = {
    "processes": "JoblibLauncher",
    "local_executor": "LocalLauncher",
    "slurm": "SlurmLauncher",
    "ray_local": "RayLauncher",
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    return compose.composed(overrides, with_hydra=True)


def rows_of(folder: Path) -> dict[Path, tuple[str, int]]:
    rows = {path: json.loads(path.read_text()) for path in folder.glob("results/runs/text/single/*/row.json")}
    return {path: (row["head"], row["seed"]) for path, row in rows.items()}


def choices() -> list[dict[str, str]]:
    """As few choices of one option a group as hold every option: those of pictures and of a run to begin from apart."""
    apart = ("cnn", "shapes", "pictures")
    plain = {group: [each for each in options(group) if not each.startswith(apart)] for group in GROUPS}
    plain["start"] = ["none"]
    longest = max(map(len, plain.values()))
    found = [{group: names[number % len(names)] for group, names in plain.items()} for number in range(longest)]
    pictures = [each for each in options("data") if each.startswith("shapes")]
    sizes = [each for each in options("size") if each.startswith("pictures")]
    found += [{"model": "cnn", "data": each, "size": sizes[0]} for each in pictures]
    return found + [{"start": each} for each in options("start") if each != "none"]


def test_every_option_is_chosen() -> None:
    chosen = {pair for choice in choices() for pair in choice.items()}
    assert chosen == {(group, option) for group in GROUPS for option in options(group)}


def each_choice() -> list[ParameterSet]:
    """All of them; those of which only the head was not in an earlier one are slow, and CI runs them."""
    earlier, cases = set[tuple[str, str]](), []
    for choice in choices():
        fresh = set(choice.items()) - earlier
        marks = [pytest.mark.slow] if {group for group, _ in fresh} == {"head"} else []
        cases.append(pytest.param(choice, marks=marks, id="-".join(choice.values())))
        earlier |= fresh
    return cases


@pytest.mark.parametrize("choice", each_choice())
def test_every_option_composes_to_checked_settings(choice: dict[str, str]) -> None:
    begun = ["start.run=FOLDER"] if choice.get("start", "none") != "none" else []
    config = composed(*begun, *(f"{group}={option}" for group, option in choice.items()))
    del config.hydra
    settings = settings_from(config)
    named = {"model": settings.model.name, "head": settings.head.name, "start": settings.start.type}
    named |= {"embedding": settings.embedding.name, "data": settings.data["name"]}
    for group, option in choice.items():
        option = {"folded": "conditioned_tied_wide"}.get(option, option)  # the best head keeps its own name
        assert named.get(group, option) == option or (group == "data" and option.startswith(named["data"]))


def test_a_text_brings_its_size_and_budget_and_the_command_line_has_the_last_word() -> None:
    def chosen(*overrides: str) -> tuple[object, ...]:
        config = composed(*overrides)
        return config.model.hidden_size, config.sequence_length, config.budget.tokens, config.budget.epochs

    assert chosen() == (64, 128, 200_000, None)
    assert chosen("data=text") == (64, 256, None, 2)
    assert chosen("data=tinystories") == (128, 512, None, 1)
    assert chosen("data=tinystories", "size=hidden256", "budget=tokens_100k") == (256, 128, 100_000, None)
    assert chosen("data=tinystories", "experiment=both_ends", "optimizer.learning_rate=1")[0] == 64
    assert chosen("data=text", "experiment=heads_pareto", "optimizer.learning_rate=1")[3] == 1


@pytest.mark.parametrize("name", options("sweep"))
def test_every_sweep_file_belongs_to_an_experiment_and_a_text_and_changes_something(name: str) -> None:
    experiment = max((each for each in options("experiment") if name.startswith(f"{each}_")), key=len)
    chosen = [f"experiment={experiment}", f"data={name.removeprefix(experiment + '_')}"]
    config = composed(*chosen)
    without = composed(f"experiment={experiment}", chosen[1], "~sweep")
    assert config != without
    swept = config.hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in swept.items()])
    first = {
        each.key_or_group: next(iter(each.sweep_string_iterator())) if each.is_sweep_override() else each.value()
        for each in parsed
    }
    words = [f"{key}={value}" for key, value in first.items() if key != "optimizer.learning_rate"]
    # What was chosen on a training text stands in a table that need not be there yet.
    begun = ["start.run=FOLDER"] if experiment == "embedding_compressed" else []
    job = composed(*chosen, "optimizer.learning_rate=1e-3", *begun, *words)
    del job.hydra
    assert settings_from(job).seed == 0


# Those that begin from a finished run are at work in test_fold.py and test_compress_embedding.py.
@pytest.mark.parametrize("experiment", sorted({*options("experiment")} - {"fold", "embedding_compressed"}))
def test_every_experiment_takes_two_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], experiment: str
) -> None:
    first_line, command = (CONFIG_FOLDER / "experiment" / f"{experiment}.yaml").read_text().splitlines()[:2]
    assert first_line == "# @package _global_" and f"experiment={experiment}" in command
    tiny = (
        PICTURES
        if "override /data: shapes" in (CONFIG_FOLDER / "experiment" / f"{experiment}.yaml").read_text()
        else TINY
    )
    status = call(train.main, monkeypatch, *tiny, f"experiment={experiment}", "optimizer.learning_rate=2e-3")
    assert status == 0, capfd.readouterr().err
    (row,) = folder.glob(f"results/runs/*/{experiment}/*/row.json")
    assert json.loads(row.read_text())["steps"] == 2


def test_a_sweep_gives_each_job_a_folder_and_skips_what_has_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ("--multirun", *TINY, "head=full,paper", "seed=0,1")
    assert call(train.main, monkeypatch, *sweep) == 0, capfd.readouterr().err
    rows = rows_of(folder)
    assert set(rows.values()) == HEADS and len(rows) == len(HEADS)
    times = {path: path.stat().st_mtime_ns for path in rows}
    capfd.readouterr()
    assert call(train.main, monkeypatch, *sweep) == 0
    assert capfd.readouterr().err.count("finished before") == len(HEADS)
    assert {path: path.stat().st_mtime_ns for path in rows_of(folder)} == times


def test_a_failing_job_does_not_stop_the_sweep_and_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = call(train.main, monkeypatch, "--multirun", *TINY, "head=paper", "head.partition.group_size=0,225")
    written = capfd.readouterr().err
    assert status == 2
    assert "head.partition.group_size is 0" in written and "Traceback" not in written
    assert set(rows_of(folder).values()) == {("paper", 0)}


@pytest.mark.slow  # CI runs it
@pytest.mark.parametrize("launcher", ["processes", "local_executor"])
def test_launchers_train_in_other_processes(folder: Path, launcher: str) -> None:
    ended = start(folder, "-m", "vocabfold.train", "--multirun", *TINY, f"hydra/launcher={launcher}", "head=full,paper")
    assert ended.returncode == 0, ended.stderr
    assert set(rows_of(folder).values()) == {("full", 0), ("paper", 0)}
    logs = [path.parent for path in folder.glob("results/runs/multirun/submitit/*/*_log.err")]
    assert len(set(logs)) == (2 if launcher == "local_executor" else 0)
    assert {path.name for path in folder.iterdir()} == {"train.txt", "valid.txt", "cache", "results"}


@pytest.mark.parametrize("launcher", options("hydra/launcher"))
def test_every_launcher_names_its_command_and_stands_on_its_plugin(launcher: str) -> None:
    first_line = (CONFIG_FOLDER / "hydra" / "launcher" / f"{launcher}.yaml").read_text().splitlines()[0]
    assert first_line.startswith(f"# python -m vocabfold.train --multirun hydra/launcher={launcher}")
    if launcher == "ray_local" and importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None:
        with pytest.raises(ConfigCompositionException, match="hydra/launcher/ray"):
            composed("hydra/launcher=ray_local")
    else:
        node = composed(f"hydra/launcher={launcher}").hydra.launcher
        assert node["_target_"].endswith(f".{LAUNCHER_CLASSES[launcher]}")


def test_slurm_queues_a_run_again_that_meets_its_time_limit() -> None:
    node = composed("hydra/launcher=slurm", "hydra.launcher.partition=gpu").hydra.launcher
    assert (node.partition, node.gpus_per_node) == ("gpu", 1)
    assert node.max_num_timeout > 0 and node.timeout_min > 60
