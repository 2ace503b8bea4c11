"""Every option of conf/ composes, every experiment takes its steps, and sweeps run under every launcher at hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from run_cases import PICTURES, TINY, call, start, write_corpus
from vocabfold import train
from vocabfold.runs.settings import CONFIG_FOLDER, settings_from

ARMS = {("full", 0), ("full", 1), ("paper", 0), ("paper", 1)}
LAUNCHER_CLASSES = {
    "processes": "JoblibLauncher",
    "local_executor": "LocalLauncher",
    "slurm": "SlurmLauncher",
    "ray_local": "RayLauncher",
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)


def rows_of(folder: Path) -> dict[Path, tuple[str, int]]:
    rows = {path: json.loads(path.read_text()) for path in folder.glob("results/runs/smoke/single/*/row.json")}
    return {path: (row["head"], row["seed"]) for path, row in rows.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in ("scale", "data", "model", "head", "embedding") for option in options(group)],
)
def test_every_option_composes_to_checked_settings(group: str, option: str) -> None:
    pictures = {"shapes": ["model=cnn"], "cnn": ["data=shapes"]}  # each needs the other
    config = composed(f"{group}={option}", *pictures.get(option, []))
    del config.hydra
    settings = settings_from(config)
    named = {"scale": settings.scale, "data": settings.data["name"], "model": settings.model.name}
    assert {**named, "head": settings.head.name, "embedding": settings.embedding.name}[group] == option


@pytest.mark.parametrize("name", options("sweep"))
def test_every_sweep_file_belongs_to_an_experiment_and_a_scale_and_sweeps_known_keys(name: str) -> None:
    experiment, scale = name.rsplit("_", 1)
    assert experiment in options("experiment")
    config = composed(f"experiment={experiment}", f"scale={scale}")
    swept = config.hydra.sweeper.params
    first = [f"{key}={str(values).split(',')[0]}" for key, values in swept.items() if key != "optimizer.learning_rate"]
    # What was chosen on a training text stands in a table that need not be there yet.
    job = composed(f"experiment={experiment}", f"scale={scale}", "optimizer.learning_rate=1e-3", *first)
    del job.hydra
    assert settings_from(job).experiment == experiment
    assert "seed" in swept


@pytest.mark.parametrize("experiment", options("experiment"))
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
    status = call(train.main, monkeypatch, *tiny, f"experiment={experiment}")
    assert status == 0, capfd.readouterr().err
    (row,) = folder.glob(f"results/runs/smoke/{experiment}/*/row.json")
    assert json.loads(row.read_text())["steps"] == 2


def test_a_sweep_gives_each_job_a_folder_and_skips_what_has_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ("-m", "vocabfold.train", "--multirun", *TINY, "head=full,grouped", "seed=0,1")
    first = start(folder, *sweep)
    assert first.returncode == 0, first.stderr
    rows = rows_of(folder)
    assert set(rows.values()) == ARMS and len(rows) == len(ARMS)
    times = {path: path.stat().st_mtime_ns for path in rows}
    assert call(train.main, monkeypatch, *sweep[2:]) == 0
    assert capfd.readouterr().err.count("finished before") == len(ARMS)
    assert {path: path.stat().st_mtime_ns for path in rows_of(folder)} == times


def test_a_failing_job_does_not_stop_the_sweep_and_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = call(train.main, monkeypatch, "--multirun", *TINY, "head=paper", "head.partition.group_size=0,225")
    written = capfd.readouterr().err
    assert status == 2
    assert "head.partition.group_size is 0" in written and "Traceback" not in written
    assert set(rows_of(folder).values()) == {("paper", 0)}


@pytest.mark.parametrize("launcher", ["processes", "local_executor"])
def test_launchers_train_in_other_processes(folder: Path, launcher: str) -> None:
    ended = start(
        folder, "-m", "vocabfold.train", "--multirun", *TINY, f"hydra/launcher={launcher}", "head=full,grouped"
    )
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
