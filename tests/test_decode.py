"""The decoding benchmark on tiny trained runs, its table by hand, and its one-line complaints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch
from experiments.heads import decode

from run_cases import TEXT, TINY, call, experiment, write_corpus
from vocabfold import train
from vocabfold.generate import generate, load_run

HEADS = ("full", "scale_shift_bpe", "shortlist_frequency")
QUICK = [*TEXT, "--rounds", "2", "--prompt-tokens", "8", "--new-tokens", "3", "--batch-sizes", "1", "2"]


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return experiment(monkeypatch, "decode", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs of experiment decode on a tiny text."""
    folder = tmp_path_factory.mktemp("decode")
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        for head in HEADS:
            assert call(train.main, patch, *TINY, "experiment=decode", f"head={head}") == 0
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
    return folder


def test_the_benchmark_writes_its_table_and_draws_it_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(monkeypatch, "measure", *QUICK) == 0, capfd.readouterr().err
    assert benchmark(monkeypatch, "draw", "text") == 0
    results = here / "results" / "text"
    table = pd.read_csv(results / "decode.csv")
    methods = {"full", "full, sorted", "scale_shift_bpe", "shortlist_frequency", "no_head"}
    assert set(table["method"]) == methods
    # 4 strategies of 3 heads, the sort and no head, at 2 batch sizes, 2 rounds each
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
    assert benchmark(monkeypatch, "draw", "text") == 0
    assert {path: path.read_bytes() for path in results.iterdir()} == written


def test_the_table_beside_the_figure_holds_medians_of_ratios() -> None:
    seconds = {
        "full": [2.0, 4.0, 6.0],
        "full, sorted": [8.0, 8.0, 8.0],
        "fast": [1.0, 1.0, 1.0],
        "no_head": [0.5, 0.5, 0.5],
    }
    known: dict[str, Any] = {"batch_size": 2, "new_tokens": 10, "prompt_tokens": 4, "hidden_size": 8, "num_layers": 1}
    known |= {"corpus": "stories", "hardware": "none", "torch": "2", "groups_visited": None, "num_groups": None}
    rows = [
        {**known, "method": method, "strategy": strategy, "round": index, "seconds": value}
        | {"entropy_nats": None if method == "no_head" else 4.0, "validation_loss_nats": 4.0}
        | ({"groups_visited": 7.25, "num_groups": 99} if method == "fast" else {})
        for strategy in ("greedy", "top-k 50", "top-p 0.95", "temperature 1")
        for method, values in seconds.items()
        for index, value in enumerate(values)
        if method != "full, sorted" or strategy == "top-p 0.95"
    ]
    for row in rows:
        if row["method"] == "no_head":
            row["strategy"] = None
    words = decode.markdown(pd.DataFrame(rows).drop_duplicates())
    (line,) = [line for line in words.splitlines() if line.startswith("| 2 | top-p 0.95 | fast |")]
    assert line.split(" | ")[3] == "20" and "4.00 (2.10 to 5.90)" in line and "8.00 (8.00 to 8.00)" in line
    assert line.endswith("| 50% | 7.2 of 99 |")
    assert "* fast, batch 2: 8.00x the full softmax with its sort (goal 3x: reached), 4.00x without" in words


def test_decoding_in_a_batch_is_decoding_one_by_one(here: Path) -> None:
    for path in here.glob("results/runs/text/decode/*"):
        model = load_run(path, torch.device("cpu"))
        prompts = decode.prompts_of(path, 3, 8)
        together = decode.decode(model, prompts, 5, lambda hidden, _, head=model.head: head.sample(hidden, 0.0))
        for prompt, tokens in zip(prompts.tolist(), together.tolist(), strict=True):
            assert tokens == list(generate(model, prompt, 5, temperature=0.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["measure"], "holds no finished run"),
        (["draw", "nowhere"], "decode.csv is missing"),
        (["measure", *TEXT, "--run", "no/such/run"], "no/such/run holds no finished run"),
        (["measure", *QUICK[:-3], "--batch-sizes", "0"], "--batch-sizes is 0"),
        (["measure", *QUICK, "--new-tokens", "0"], "--new-tokens is 0"),
        (["measure", *QUICK, "--prompt-tokens", "100000"], "choose a --prompt-tokens up to that"),
        (["measure", *QUICK, "--new-tokens", "1000"], "positions do not fit"),
        (["measure", *TEXT, "--rounds", "1", "--run", "FOLDED"], "none of the runs has the full softmax"),
        (["measure", *TEXT, "--run", "FOLDED", "FOLDED"], "two of the runs are both scale_shift_bpe"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (folded,) = [
        path
        for path in here.glob("results/runs/text/decode/*")
        if '"scale_shift_bpe"' in (path / "row.json").read_text()
    ]
    before = sorted(here.rglob("*"))
    assert benchmark(monkeypatch, *[str(folded) if word == "FOLDED" else word for word in arguments]) == 2
    written = capfd.readouterr().err
    assert written.strip().splitlines()[-1].count("\n") == 0 and words in written and "Traceback" not in written
    assert sorted(here.rglob("*")) == before
