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
WORTH = {"warm_up": -0.01, "short_memory": -0.02, "decay": 0.03, "counts": -0.04, "tied": 0.5}


def row(warm_up: bool, short: bool, decay: bool, counts: bool, tied: bool, seed: int) -> dict[str, Any]:
    """A run whose loss is the sum of its parts' worth, and 0.1 more where both warm-up and decay are there."""
    flags = dict(zip(WORTH, (warm_up, short, decay, counts, tied), strict=True))
    loss = 6 + 0.2 * seed + sum(WORTH[name] for name, flag in flags.items() if flag) + 0.1 * (warm_up and decay)
    settings = {"warmup_steps": 12 * warm_up, "beta2": 0.95 if short else 0.999, "weight_decay": 0.1 * decay}
    made = scaling_row(HEADS[counts, tied], 0.5e6, seed, loss, count_biases=counts, tied=tied, **settings)
    return made | {"experiment": "recipe", "run": f"{flags}{seed}"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [row(*flags, counts, False, seed) for flags in product((False, True), repeat=3) for counts in (0, 1)
            for seed in (0, 1) if counts or not any(flags)]  # fmt: skip
    whole = [
        one
        for one in rows
        if one["warmup_steps"] and one["beta2"] == 0.95 and one["weight_decay"] and one["count_biases"]
    ]
    rows = [one for one in rows if one not in whole]
    write_table(pd.DataFrame(rows), tmp_path / "results" / "text" / "recipe.csv")
    whole += [row(True, True, True, True, True, 0)]
    scaling = [one | {"experiment": "heads_scaling"} for one in whole]
    scaling += [one | {"training_tokens": 1e6, "run": f"other{one['run']}"} for one in scaling]
    own = ["warmup_steps", "beta2", "weight_decay", "count_biases"]
    write_table(pd.DataFrame(scaling).drop(columns=own), tmp_path / "results" / "text" / "heads_scaling.csv")
    return tmp_path / "results"


def test_a_part_is_worth_what_pairs_that_differ_in_it_alone_say(results: Path) -> None:
    effects = {(one.part, one.end): one.difference for one in effects_of(runs_of("text"))}
    added, left_out, everywhere = ENDS
    assert ("warm_up", added) not in effects  # no run has it alone without counts
    assert effects["counts", added].mean == pytest.approx(-0.04) and effects["counts", added].count == 2
    assert effects["warm_up", left_out].mean == pytest.approx(-0.01 + 0.1)
    assert effects["short_memory", left_out].mean == pytest.approx(-0.02)
    assert effects["warm_up", everywhere].count == 8
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
    assert "| warm-up over 5% of the steps | not run | +0.090 ± 0.000 (2) | +0.040 ±" in words
    assert "| tied rows instead of free ones | not run | +0.500 (1) | +0.500 (1) |" in words
    assert matplotlib.image.imread(results / "text" / "recipe.png")[..., :3].std() > 0.05


def columns_of(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return recipe_columns(settings_from(compose("train", ["experiment=recipe", "data=text", *overrides])))


def test_the_columns_of_a_run_are_its_settings() -> None:
    whole = {"warmup_steps": 12, "beta2": 0.95, "weight_decay": 0.1, "count_biases": True}
    assert columns_of("head=full_counts") == {"training_tokens": 500_000, "epochs": 1, **whole}
    old = ("head=full", "optimizer.betas.1=0.999", "optimizer.warmup_steps=0", "training_tokens=2_000_000")
    assert columns_of(*old) == {
        "training_tokens": 2_000_000, "epochs": 1, "warmup_steps": 0, "beta2": 0.999, "weight_decay": 0.1,
        "count_biases": False,
    }  # fmt: skip
