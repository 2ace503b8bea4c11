"""The programs that measure coding: a table, a figure and words from a tiny text, and one-line refusals."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from run_cases import TINY, experiment_path, start, write_corpus

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coding")
    write_corpus(folder)
    return folder


def test_token_coding_measures_every_coder(folder: Path) -> None:
    program = str(experiment_path("token_coding"))
    scale = ("--scale", "smoke", "--rounds", "1", "--speed-tokens", "5000")
    done = start(folder, program, *scale, "--text", "tiny=train.txt")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "results" / "smoke" / "token_coding.csv")
    assert set(table["tokenizer"]) == {"gpt2", "wordpiece"} and {"rans", "blosc2"} < set(table["coder"])
    assert (table["decode_million_tokens_per_second"] > 0).all() and list(table.columns)[-1] == "command"
    assert "not met" in (folder / "results" / "smoke" / "token_coding.md").read_text()
    assert start(folder, program, "--draw", "--scale", "smoke").returncode == 0
    refused = start(folder, program, "--text", "tiny=nowhere.txt")
    assert refused.returncode == 2 and "there is no file 'nowhere.txt'" in refused.stderr


def test_token_store_sees_the_same_losses(folder: Path) -> None:
    done = start(folder, str(experiment_path("token_store")), "--scale", "smoke", "--steps", "2", "--stories", "40")
    assert done.returncode == 0, done.stderr
    assert "losses of all 2 steps: the same" in done.stdout


def test_model_coding_compares_a_run_with_general_compressors(folder: Path) -> None:
    for head in ("full", "grouped"):
        trained = start(folder, "-m", "vocabfold.train", *TINY, f"head={head}", f"run_dir={head}")
        assert trained.returncode == 0, trained.stderr
    program = str(experiment_path("model_coding"))
    runs = ("--run", "full=full", "--run", "grouped=grouped", "--scale", "smoke", "--rounds", "1")
    done = start(folder, program, *runs, "--text", "valid.txt", "--excerpt-bytes", "200")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "results" / "smoke" / "model_coding.csv").set_index("coder")
    assert {"xz -9e", "zstd -19", "brotli -11", "bzip2 -9", "model, full", "model, grouped"} < set(table.index)
    assert abs(table.loc["model, grouped", "excess_over_own_bits"]) < 0.2
    assert table.loc["model, grouped", "decode_speed_over_full"] > 0
    assert (folder / "results" / "smoke" / "model_coding.png").stat().st_size > 1000
    assert start(folder, program, "--draw", "--scale", "smoke").returncode == 0
    missing = start(folder, program, "--scale", "laptop")
    assert missing.returncode == 2 and "no finished run of scale laptop" in missing.stderr
