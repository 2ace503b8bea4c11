"""The statistics of the figures, and each figure program on a small table."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from experiments.study.figures import STYLE
from experiments.study.statistics import mean_and_interval, summarise
from scipy import stats

from figure_cases import caching_tables, embedding_columns, run_row, write_documents
from run_cases import experiment
from vocabfold.runs.tables import write_table

ORDERS = ("bpe", "frequency", "random", "clustered")
REPOSITORY = Path(__file__).resolve().parents[1]
# Every experiment that draws a picture from tables that the fixture makes, with the pictures that it draws.
PICTURES = {
    name: [name]
    for name in (
        "both_ends",
        "caching",
        "embedding_compression",
        "figure3_group_size",
        "first_look",
        "fold",
        "heads_pareto",
    )
}
PICTURES |= {name: [name] for name in ("heads_pareto", "main_comparison", "rare_tokens", "table1_story_quality")}
PICTURES |= {
    "order_matters": ["order_matters", "order_matters_group_accuracy"],
    "vocabulary_scaling": ["vocabulary_scaling", "larger_vocabulary"],
    "shapes": ["shapes_figure2", "shapes_figure6", "shapes_figure7"],
}
# Models and heads of two seeds and more, and one of a single seed: an interval that does not exist stops no figure.
MODELS = [
    ("gpt2", "full", None, 3),
    ("gpt2", "paper", 225, 2),
    ("gpt_neo", "full", None, 2),
    ("gpt_neo", "paper", 225, 1),
]


def tables() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(experiment, its rows): what the programs read."""
    yield (
        "main_comparison",
        [run_row(model, head, size, seed) for model, head, size, seeds in MODELS for seed in range(seeds)],
    )
    yield (
        "figure3_group_size",
        [run_row("gpt2", "paper", group_size, seed) for group_size in (14, 225, 3864) for seed in range(3)],
    )
    foldings = [("bpe", 0, 3), ("clustered", 0, 1), ("frequency", 2048, 2)]
    yield (
        "fold",
        [
            run_row(
                "gpt2",
                "paper",
                225,
                seed,
                partition_order=order,
                shortlist=shortlist,
                distillation_tokens=tokens,
                start_tokens=4096,
                teacher_loss_nats=3.9 + 0.1 * seed,
                teacher_perplexity=55.0 + seed,
                at_once_loss_nats=4.5 + 0.1 * seed,
                at_once_perplexity=90.0 + seed,
            )
            for order, shortlist, seeds in foldings
            for seed in range(seeds)
            for tokens in (1000, 2000)
        ],
    )

    folded = [
        run_row("gpt2", "paper", 225, seed, tokens=tokens, **embedding_columns(name, tokens))
        for name in ("dense", "int4", "tensor_train")
        for seed in range(2)
        for tokens in (200_000, 0, 20_000)
    ]
    yield "embedding_compression", folded
    yield "both_ends", [row for row in folded if row["tokens"] == 200_000]
    heads = ["full", "full_untied", "linear_clustered", "shortlist_frequency"]
    heads += [f"scale_shift_{order}" for order in ORDERS]
    pareto = [head_row(name, 225, seed) for name in heads for seed in range(2)]
    yield "heads_pareto", pareto
    yield (
        "shapes",
        [
            run_row("cnn", head, None, seed, learning_rate=rate, vocabulary_size=256)
            for head in ("full", "paper")
            for seed in (0, 1)
            for rate in (1e-3, 3e-3)
        ],
    )
    yield "first_look", [run_row("gpt2", head, 225, 0) for head in ("full", "linear_clustered")]
    yield (
        "order_matters",
        [head_row(f"scale_shift_{order}", size, seed) for order in ORDERS for size in (56, 897) for seed in (0, 1)],
    )
    yield (
        "vocabulary_scaling",
        [
            head_row(name, 225, seed) | {"vocabulary_size": size, "excess_loss_nats": size / 1e5 + seed}
            for name in ("full_untied", "linear_clustered")
            for size in (10_000, 50_257)
            for seed in (0, 1)
        ],
    )
    yield (
        "larger_vocabulary",
        [
            head_row(name, 225, seed) | {"vocabulary_size": size, "validation_bits_per_byte": 1.5 + 0.1 * seed}
            for name in ("full_untied", "linear_clustered")
            for size in (50_257, 100_277)
            for seed in (0, 1)
        ],
    )
    yield "table1_story_quality", judged_rows()
    classes = {"rank": 6, "decile": 10}
    yield (
        "rare_tokens",
        [
            row | {"sorted_by": sorting, "class": number, "targets": 100}
            for row in pareto
            for sorting, count in classes.items()
            for number in range(count)
        ],
    )


def judged_rows() -> list[dict[str, Any]]:
    """Two judges' rows of table1_story_quality: runs, half-trained runs and references, which are of no run."""
    judges = {
        "grammar": ("words_told_share", "new_sentences_share", "consistency_share", "plot_words_share"),
        "language model m": ("grammar_of_10", "creativity_of_10", "consistency_of_10", "plot_of_10", "age_years"),
    }
    writers = [
        (run_row(model, head, size, seed), "trained") for model, head, size, seeds in MODELS for seed in range(seeds)
    ]
    writers += [(run_row("gpt2", "full", None, 0), "half-trained")]
    reference = {"run": None, "corpus": "stories", "seed": 0, "hardware": "test machine", "torch": "2"}
    writers += [(reference, name) for name in ("the stories' own endings", "words mixed between stories")]
    return [
        row
        | {"writer": writer, "judge": judge, "stories": 40}
        | {name: 0.1 * index + 0.05 * row["seed"] for index, name in enumerate(names)}
        | {f"{name}_half_width": 0.02 for name in names}
        for row, writer in writers
        for judge, names in judges.items()
    ]


def head_row(head: str, size: int, seed: int) -> dict[str, Any]:
    return run_row(
        "gpt2", head, size, seed, scorer=head, partition_order=head.rpartition("_")[2], group_accuracy=0.4 + 0.1 * seed
    )


def write_side_tables(folder: Path) -> None:
    """What heads_pareto reads besides its own table: curves of its runs, and the seconds of a training step."""
    curves = []
    for head in ("full", "full_untied", "linear_clustered", "scale_shift_bpe"):
        for step, loss in ((50, 6.0), (100, 4.0)):
            line = {
                "experiment": "heads_pareto",
                "head": head,
                "seed": 0,
                "step": step,
                "tokens": 2000 * step,
                "train_loss": loss,
            }
            curves.append(line | {"validation_loss_nats": loss, "validation_group_accuracy": 0.01 * step})
    pd.DataFrame(curves).to_csv(folder / "heads_pareto_curves.csv", index=False)
    steps = [
        {
            "method": method,
            "round": number,
            "seconds": seconds,
            "tokens": 4096,
            "peak_memory_gib": seconds,
            "flops_per_token": 9,
        }
        for method, seconds in (("no_head", 0.1), ("full", 0.9), ("full_untied", 0.9), ("linear_clustered", 0.2))
        for number in range(2)
    ]
    pd.DataFrame(steps).to_csv(folder / "heads_cost.csv", index=False)
    pictures = [
        {
            "experiment": "shapes",
            "run": run_row("cnn", head, None, seed, learning_rate=rate, vocabulary_size=256)["run"],
            "head": head,
            "learning_rate": rate,
            "seed": seed,
            "step": step,
            "train_loss": 5.0 - step / 50,
        }
        | {"validation_accuracy": step / 100, "validation_group_accuracy": 0.5, "validation_loss_nats": 3.0 + seed}
        for head in ("full", "paper")
        for rate in (1e-3, 3e-3)
        for seed in (0, 1)
        for step in (10, 20)
    ]
    pd.DataFrame(pictures).to_csv(folder / "shapes_curves.csv", index=False)
    looks = [
        {"experiment": "first_look", "run": head, "head": head, "seed": 0, "step": step, "tokens": 2000 * step}
        | {"train_loss": 1.0, "tokens_per_second": 100.0 if step else None, "validation_loss_nats": 6.0 - step / 20}
        for head in ("full", "linear_clustered")
        for step in (10, 20)
    ]
    pd.DataFrame(looks).to_csv(folder / "first_look_curves.csv", index=False)
    ceilings = [{"quantity": f"best {kind}", "value": 0.9, "classes": 256} for kind in ("accuracy", "group accuracy")]
    pd.DataFrame(ceilings).to_csv(folder / "figure1_shapes.csv", index=False)


def write_tables(folder: Path) -> None:
    """Those of ``tables``; a row is a run of its own, but for the image study, whose curves name theirs."""
    for name, rows in tables():
        table = pd.DataFrame([{**row, "experiment": name} for row in rows])
        if name != "shapes":
            table["run"] = [f"{name}{index}" for index in range(len(table))]
        write_table(table, folder / f"{name}.csv")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/ with the tables of a text and the reference values; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    for reference in ("paper", "cost"):
        shutil.copytree(REPOSITORY / "results" / reference, tmp_path / "results" / reference)
    write_tables(tmp_path / "results" / "tiny")
    write_side_tables(tmp_path / "results" / "tiny")
    for name, rows in caching_tables():
        pd.DataFrame(rows).assign(experiment=name).to_csv(tmp_path / "results" / "tiny" / f"{name}.csv", index=False)
    return tmp_path / "results"


def draw(name: str, monkeypatch: pytest.MonkeyPatch, *corpora: str) -> int:
    return experiment(monkeypatch, name, "draw", *corpora)


def test_mean_and_interval_are_students() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    mean, half_width = mean_and_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    # by hand: two values 0 and 2 have the standard error 1, and t at 97.5% with one degree of freedom is 12.706
    assert mean_and_interval([0.0, 2.0]) == pytest.approx((1.0, 12.7062), rel=1e-5)


def test_one_value_has_no_interval() -> None:
    mean, half_width = mean_and_interval([3.0])
    assert mean == 3.0 and math.isnan(half_width)


def test_summarise_gives_one_row_a_group() -> None:
    table = pd.DataFrame({"head": ["a", "a", "b"], "size": [1, 1, None], "loss": [0.0, 2.0, 5.0]})
    summary = summarise(table, ["head", "size"], "loss")
    assert list(summary.columns) == ["head", "size", "mean", "half_width", "seeds"]
    assert summary["head"].tolist() == ["a", "b"]
    assert summary["mean"].tolist() == [1.0, 5.0]
    assert summary["seeds"].tolist() == [2, 1]
    assert summary["half_width"][0] == pytest.approx(12.7062, rel=1e-5) and math.isnan(summary["half_width"][1])


@pytest.mark.parametrize("name", PICTURES)
def test_a_figure_is_drawn_the_same_each_time(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(STYLE, "figure.dpi", 80)  # quicker than what is committed
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert draw(name, monkeypatch, "tiny") == 0, capfd.readouterr().err
    for stem in PICTURES[name]:
        pixels = matplotlib.image.imread(results / "tiny" / f"{stem}.png")
        height, width = pixels.shape[:2]
        assert 240 <= width <= 1600 and 120 <= height <= 1600
        assert pixels[..., :3].std() > 0.05  # more than an empty page
    drawn = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert {path.stem for path in drawn.keys() - before.keys()} == {*PICTURES[name], *({"shapes"} & {name})}
    assert {path: drawn[path] for path in before} == before
    for path in drawn.keys() - before.keys():
        path.unlink()
    assert draw(name, monkeypatch) == 0  # without a name: every text that has the table
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == drawn


def test_the_table_beside_the_figure_holds_means_and_intervals(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("main_comparison", monkeypatch, "tiny") == 0
    lines = (results / "tiny" / "main_comparison.md").read_text().splitlines()
    (full,) = [line for line in lines if line.startswith("| GPT-2, full")]
    mean, half_width = mean_and_interval([4.0, 4.1, 4.2])
    assert f"| {mean:.3f} ± {half_width:.3f} |" in full and full.endswith("| 3 |")


def test_the_papers_head_minus_full_over_seeds_and_documents(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(results)
    assert draw("main_comparison", monkeypatch, "tiny") == 0
    lines = (results / "tiny" / "main_comparison.md").read_text().splitlines()
    # GPT-2 has seeds 0 and 1 of both heads, GPT-Neo only seed 0
    told = [index for index, line in enumerate(lines) if line.startswith("* GPT-")]
    assert "+0.225 ± 0.000 nats over 2 seeds" in lines[told[0]] and "3 documents" in lines[told[0]]
    # per document the difference is 0.225 nats times 0.5, 1.5 and 5 / 6: the interval lies around the mean
    low, high = (float(number) for number in lines[told[0]].split("; ")[1].split(" over ")[0].split(" to "))
    assert 0.11 <= low < 0.225 < high <= 0.34
    assert "worse by more than the margin" in lines[told[0] + 1]
    assert not any("GPT-Neo: the paper's head minus" in line for line in lines)


def test_document_losses_of_other_runs_are_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_documents(results, shift=0.01)
    assert draw("main_comparison", monkeypatch, "tiny") == 2
    written = capfd.readouterr().err
    assert written.count("\n") == 1 and "of other runs" in written
    assert not (results / "tiny" / "main_comparison.png").exists()


def test_at_equal_time_the_first_evaluation_after_it_is_compared(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    for head, losses in (("full", {50: 6.0, 100: 4.0}), ("scale_shift_bpe", {50: 6.0, 100: 5.0})):
        for seed in (0, 1):
            line = {"experiment": "heads_pareto", "head": head, "seed": seed, "train_loss": 1.0}
            for step, loss in losses.items():
                line |= {"step": step, "tokens": 2000 * step, "validation_loss_nats": loss + 0.01 * seed}
                lines.append(line | {"validation_group_accuracy": 0.5})
    tiny = results / "tiny"
    pd.DataFrame(lines).to_csv(tiny / "heads_pareto_curves.csv", index=False)
    costs = pd.read_csv(tiny / "heads_cost.csv")
    fast = costs[costs["method"] == "linear_clustered"].assign(method="scale_shift_bpe")  # 4.5 times as fast as full
    pd.concat([costs, fast]).to_csv(tiny / "heads_cost.csv", index=False)
    assert draw("main_comparison", monkeypatch, "tiny") == 0
    (told,) = [line for line in (tiny / "main_comparison.md").read_text().splitlines() if "whole budget" in line]
    # 200,000 tokens at 4,096 / 0.2 a second: 10 s; the full softmax is first evaluated after 100,000 at 4,096 / 0.9
    assert "(10 s)" in told and "(22 s, 2.2 times" in told and "-1.000 ± 0.000 nats over 2 seeds" in told


def test_a_text_without_the_main_comparison_has_a_baseline_of_its_own(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = results / "other"
    other.mkdir()
    first = pd.read_csv(results / "tiny" / "figure3_group_size.csv")
    least = first["peak_memory_gib"].where(first["group_size"] != 14, 0.1)
    first.assign(corpus="other", validation_loss_nats=7.5, peak_memory_gib=least).to_csv(
        other / "figure3_group_size.csv", index=False
    )
    baseline = pd.read_csv(results / "tiny" / "main_comparison.csv").query("model == 'gpt2' and head == 'full'")
    baseline = baseline.assign(corpus="other", validation_loss_nats=7.25, experiment="figure3_baseline")
    baseline.to_csv(other / "figure3_baseline.csv", index=False)
    assert draw("figure3_group_size", monkeypatch, "other", "tiny") == 0
    words = (other / "figure3_group_size.md").read_text()
    assert words.startswith("other; hidden 64, 4 layers; 0.20 M tokens")
    assert "7.500 ± 0.000" in words and "| GPT-2, full softmax | 7.250 ± 0.000 |" in words
    assert "S = 14, 0.100 GiB" in words and "√V = 224" in words
    assert "7.250" not in (results / "tiny" / "figure3_group_size.md").read_text()


def test_foldings_are_counted_from_their_own_teacher(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("fold", monkeypatch, "tiny") == 0
    lines = (results / "tiny" / "fold.md").read_text().splitlines()
    (at_once,) = [line for line in lines if line.startswith("| BPE order | 224 | 0 |")]
    assert at_once.endswith("| 0.6000 ± 0.0000 | 3 |")
    assert sum(line.startswith("| BPE order |") for line in lines) == 3


@pytest.mark.parametrize("name", ["caching", "first_look", "main_comparison", "shapes"])
@pytest.mark.parametrize(("content", "words"), [(None, "measure` first"), ("seed,model\n0,gpt2\n", "has no column")])
def test_a_missing_or_foreign_table_is_told_in_one_line(
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    words: str,
) -> None:
    for path in results.glob("tiny/*.csv"):
        path.unlink() if content is None else path.write_text(content)
    before = sorted(results.rglob("*"))
    for corpora in ((), ("tiny",)):
        assert draw(name, monkeypatch, *corpora) == 2
        written = capfd.readouterr().err
        assert written.count("\n") == 1 and (words in written or "is missing" in written)
    assert sorted(results.rglob("*")) == before
