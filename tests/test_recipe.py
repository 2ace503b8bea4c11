"""What each part of the recipe is worth: pairs of runs that differ in it alone."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
from experiments.heads.recipe import ENDS, effects_of, recipe_columns, runs_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from run_cases import experiment
from scaling_cases import scaling_row
from vocabfold.runs.settings import CONFIG_FOLDER, settings_from
from vocabfold.runs.tables import write_table

HEADS = {(False, False): "full_untied", (True, False): "full_untied_counts", (True, True): "full_counts"}
WORTH = {"warm_up": -0.01, "short_memory": 0.2, "middle_memory": 0.05, "decay": 0.03, "counts": -0.04, "tied": 0.5}
BETAS = {0.999: None, 0.99: "middle_memory", 0.95: "short_memory"}


def row(warm_up: bool, beta2: float, decay: bool, counts: bool, tied: bool, seed: int) -> dict[str, Any]:
    """A run whose loss is the sum of its parts' worth, and 0.1 more where both warm-up and decay are there."""
    flags = {"warm_up": warm_up, "decay": decay, "counts": counts, "tied": tied, BETAS[beta2]: True}
    loss = 6 + 0.2 * seed + sum(WORTH[name] for name in WORTH if flags.get(name)) + 0.1 * (warm_up and decay)
    settings = {"warmup_steps": 12 * warm_up, "beta2": beta2, "weight_decay": 0.1 * decay}
    made = scaling_row(HEADS[counts, tied], 0.5e6, seed, loss, count_biases=counts, tied=tied, **settings)
    return made | {"experiment": "recipe", "run": f"{flags}{seed}"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    flags = product((False, True), BETAS, (False, True), (True,), (False,), (0, 1))
    rows = [row(*flag) for flag in flags] + [row(True, 0.999, True, True, True, 0)]
    write_table(pd.DataFrame(rows), tmp_path / "results" / "text" / "recipe.csv")
    return tmp_path / "results"


def test_a_part_is_worth_what_pairs_that_differ_in_it_alone_say(results: Path) -> None:
    effects = {(one.part, one.end): one.difference for one in effects_of(runs_of("text"))}
    left_out, everywhere = ENDS
    assert not any(part == "counts" for part, _ in effects)  # no two runs differ in them alone
    assert effects["warm_up", left_out].mean == pytest.approx(-0.01 + 0.1)
    assert effects["short_memory", left_out].mean == pytest.approx(0.2)
    assert effects["middle_memory", left_out].mean == pytest.approx(0.05)
    assert effects["warm_up", everywhere].count == 12
    assert effects["warm_up", everywhere].mean == pytest.approx(-0.01 + 0.1 / 2)
    assert effects["tied", left_out].mean == pytest.approx(0.5) and effects["tied", left_out].count == 1
    assert {one.group for one in effects_of(runs_of("text"))} == {"full softmax, 0.5 M tokens"}


def test_runs_that_differ_in_something_else_are_refused_in_one_line(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = results / "text" / "recipe.csv"
    table = pd.read_csv(path)
    pd.concat([table, table.iloc[:1].assign(run="another")]).to_csv(path, index=False)
    assert experiment(monkeypatch, "recipe", "draw", "text") == 2
    assert capfd.readouterr().err.count("\n") == 1
    path.unlink()
    pd.concat([table, table.assign(hidden_size=128, run=table["run"] + "wide")]).to_csv(path, index=False)
    assert {one.group.rpartition(", ")[2] for one in effects_of(runs_of("text"))} == {"hidden 64", "hidden 128"}


def test_words_and_picture(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment(monkeypatch, "recipe", "draw", "text") == 0
    words = (results / "text" / "recipe.md").read_text()
    assert "| warm-up over 5% of the steps | +0.090 ± 0.000 (2) | +0.040 ±" in words
    assert "| tied rows instead of free ones | +0.500 (1) | +0.500 (1) |" in words
    assert "| biases from counts |" not in words
    assert matplotlib.image.imread(results / "text" / "recipe.png")[..., :3].std() > 0.05


def columns_of(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return recipe_columns(settings_from(compose("train", ["experiment=recipe", "data=text", *overrides])))


def test_the_columns_of_a_run_are_its_settings() -> None:
    whole = {"warmup_steps": 12, "beta2": 0.999, "weight_decay": 0.1, "count_biases": True}
    assert columns_of("head=full_counts") == {"training_tokens": 500_000, "epochs": 1, **whole}
    old = ("head=full", "optimizer.betas.1=0.95", "optimizer.warmup_steps=0", "training_tokens=2_000_000")
    assert columns_of(*old) == {
        "training_tokens": 2_000_000, "epochs": 1, "warmup_steps": 0, "beta2": 0.95, "weight_decay": 0.1,
        "count_biases": False,
    }  # fmt: skip
