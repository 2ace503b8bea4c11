"""The decoding benchmark on tiny trained runs, its table by hand, and its one-line complaints."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import train
from vocabfold.generate import generate, load_run

PROGRAM = Path(__file__).resolve().parents[1] / "experiments" / "heads" / "decode.py"
CONTENDERS = ("full_tied", "scale_shift_bpe", "shortlist_frequency")
QUICK = ["--scale", "smoke", "--rounds", "2", "--prompt-tokens", "8", "--new-tokens", "3", "--batch-sizes", "1", "2"]


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return call(lambda: runpy.run_path(str(PROGRAM), run_name="__main__") and None, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs of experiment decode at scale smoke."""
    folder = tmp_path_factory.mktemp("decode")
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        for contender in CONTENDERS:
            assert call(train.main, patch, *TINY, "experiment=decode", f"contender={contender}") == 0
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
    return folder


def test_the_benchmark_writes_its_table_and_draws_it_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(monkeypatch, *QUICK) == 0, capfd.readouterr().err
    results = here / "results" / "smoke"
    table = pd.read_csv(results / "decode.csv")
    sides = {"full", "full, sorted", "scale_shift_sorted, bpe", "linear_sorted, frequency, shortlist 2,048", "free"}
    assert set(table["side"]) == sides
    # 4 strategies of 3 heads, the sort and the free head, at 2 batch sizes, 2 rounds each
    assert len(table) == (4 * 3 + 1 + 1) * 2 * 2
    assert (table["seconds"] > 0).all()
    folded = table[table["scorer"].notna()]
    assert (folded["groups_visited"] >= 0).all() and (folded["groups_visited"] > 0).any()
    assert table[table["scorer"].isna()]["groups_visited"].isna().all()
    assert table["entropy_nats"].dropna().between(0, 10.9).all()
    words = (results / "decode.md").read_text(encoding="utf-8")
    assert "| 2 | top-p 0.95 | full, sorted |" in words and "goal 3x" in words
    pixels = matplotlib.image.imread(results / "decode.png")
    assert pixels[..., :3].std() > 0.05
    written = {path: path.read_bytes() for path in results.iterdir()}
    for suffix in (".md", ".png"):
        (results / "decode.csv").with_suffix(suffix).unlink()
    assert benchmark(monkeypatch, "--scale", "smoke", "--redraw") == 0
    assert {path: path.read_bytes() for path in results.iterdir()} == written


def test_the_table_beside_the_figure_holds_medians_of_ratios() -> None:
    program = runpy.run_path(str(PROGRAM))
    seconds = {
        "full": [2.0, 4.0, 6.0],
        "full, sorted": [8.0, 8.0, 8.0],
        "fast": [1.0, 1.0, 1.0],
        "free": [0.5, 0.5, 0.5],
    }
    known: dict[str, Any] = {"batch_size": 2, "new_tokens": 10, "prompt_tokens": 4, "hidden_size": 8, "num_layers": 1}
    known |= {"corpus": "stories", "hardware": "none", "torch": "2", "groups_visited": None, "num_groups": None}
    rows = [
        {**known, "side": side, "strategy": strategy, "round": index, "seconds": value}
        | {"entropy_nats": None if side == "free" else 4.0, "validation_loss_nats": 4.0}
        | ({"groups_visited": 7.25, "num_groups": 99} if side == "fast" else {})
        for strategy in ("greedy", "top-k 50", "top-p 0.95", "temperature 1")
        for side, values in seconds.items()
        for index, value in enumerate(values)
        if side != "full, sorted" or strategy == "top-p 0.95"
    ]
    for row in rows:
        if row["side"] == "free":
            row["strategy"] = None
    words = program["markdown"](pd.DataFrame(rows).drop_duplicates())
    (line,) = [line for line in words.splitlines() if line.startswith("| 2 | top-p 0.95 | fast |")]
    assert line.split(" | ")[3] == "20" and "4.00 (2.10 to 5.90)" in line and "8.00 (8.00 to 8.00)" in line
    assert line.endswith("| 50% | 7.2 of 99 |")
    assert "* fast, batch 2: 8.00x the full softmax with its sort (goal 3x: reached), 4.00x without" in words


def test_decoding_in_a_batch_is_decoding_one_by_one(here: Path) -> None:
    program = runpy.run_path(str(PROGRAM))
    for path in here.glob("results/runs/smoke/decode/*"):
        model = load_run(path, torch.device("cpu"))
        prompts = program["prompts_of"](path, 3, 8)
        together = program["decode"](model, prompts, 5, lambda hidden, _, head=model.head: head.sample(hidden, 0.0))
        for prompt, tokens in zip(prompts.tolist(), together.tolist(), strict=True):
            assert tokens == list(generate(model, prompt, 5, temperature=0.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scale", "nowhere"], "holds no finished run: run python -m vocabfold.train"),
        (["--scale", "nowhere", "--redraw"], "decode.csv is missing"),
        (["no/such/run"], "no/such/run holds no finished run"),
        ([*QUICK[:-3], "--batch-sizes", "0"], "--batch-sizes holds 0"),
        ([*QUICK, "--new-tokens", "0"], "--new-tokens is 0"),
        ([*QUICK, "--prompt-tokens", "100000"], "choose a --prompt-tokens up to that"),
        ([*QUICK, "--new-tokens", "10"], "positions do not fit"),
        (["GROUPED", "--rounds", "1"], "none of the runs has the full softmax"),
        (["GROUPED", "GROUPED"], "two of the runs are both scale_shift_sorted, bpe"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (grouped,) = [
        path
        for path in here.glob("results/runs/smoke/decode/*")
        if '"scale_shift_sorted"' in (path / "row.json").read_text()
    ]
    before = sorted(here.rglob("*"))
    assert benchmark(monkeypatch, *[str(grouped) if word == "GROUPED" else word for word in arguments]) == 2
    written = capfd.readouterr().err
    assert written.strip().splitlines()[-1].count("\n") == 0 and words in written and "Traceback" not in written
    assert sorted(here.rglob("*")) == before
