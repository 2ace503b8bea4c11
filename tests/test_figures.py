"""The statistics of the figures, and each figure program on a small table."""

from __future__ import annotations

import math
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from experiments.study.statistics import mean_and_interval, summarise
from scipy import stats

from figure_cases import caching_tables, embedding_columns, run_row, write_documents
from run_cases import call, experiment_path
from vocabfold.runs.record import write_table

ORDERS = ("bpe", "frequency", "random", "clustered")
REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    path.stem
    for path in (REPOSITORY / "experiments").glob("*/*.py")
    if "draw_for_scales(" in path.read_text() and path.parent.name != "study"
)
# Arms of two seeds and more, one of them with a single seed: an interval that does not exist must not stop a figure.
ARMS = [
    ("gpt2", "full", None, 3),
    ("gpt2", "grouped", 225, 2),
    ("gpt_neo", "full", None, 2),
    ("gpt_neo", "grouped", 225, 1),
]


def tables() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(experiment, its rows): what the programs read."""
    yield (
        "main_comparison",
        [run_row(model, head, size, seed) for model, head, size, seeds in ARMS for seed in range(seeds)],
    )
    yield (
        "figure3_group_size",
        [run_row("gpt2", "grouped", group_size, seed) for group_size in (14, 225, 3864) for seed in range(3)],
    )
    foldings = [("bpe", 0, 3), ("clustered_run", 0, 1), ("frequency", 2048, 2)]
    yield (
        "fold",
        [
            run_row(
                "gpt2",
                "grouped",
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
        run_row("gpt2", "grouped", 225, seed, tokens=tokens, **embedding_columns(name, tokens))
        for name in ("dense", "int4", "tensor_train")
        for seed in range(2)
        for tokens in (200_000, 0, 20_000)
    ]
    yield "embedding_compression", folded
    yield "both_ends", [row for row in folded if row["tokens"] == 200_000]
    contenders = ["full_tied", "full_free", "linear_clustered", "shortlist_frequency"]
    contenders += [f"scale_shift_{order}" for order in ORDERS]
    pareto = [contender_row(name, 225, seed) for name in contenders for seed in range(2)]
    yield "heads_pareto", pareto
    yield "shapes", [run_row("cnn", head, None, seed) for head in ("full", "grouped") for seed in (0, 1)]
    yield (
        "order_matters",
        [
            contender_row(f"scale_shift_{order}", size, seed)
            for order in ORDERS
            for size in (56, 897)
            for seed in (0, 1)
        ],
    )
    yield (
        "vocabulary_scaling",
        [
            contender_row(name, 225, seed) | {"vocabulary_size": size, "excess_loss_nats": size / 1e5 + seed}
            for name in ("full_free", "linear_clustered")
            for size in (10_000, 50_257)
            for seed in (0, 1)
        ],
    )
    yield (
        "larger_vocabulary",
        [
            contender_row(name, 225, seed) | {"vocabulary_size": size, "validation_bits_per_byte": 1.5 + 0.1 * seed}
            for name in ("full_free", "linear_clustered")
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
        (run_row(model, head, size, seed), "trained") for model, head, size, seeds in ARMS for seed in range(seeds)
    ]
    writers += [(run_row("gpt2", "full", None, 0), "half-trained")]
    reference = {"scale": "smoke", "corpus": "stories", "seed": 0, "hardware": "test machine", "torch": "2"}
    writers += [(reference, name) for name in ("the stories' own endings", "words mixed between stories")]
    return [
        row
        | {"writer": writer, "judge": judge, "stories": 40}
        | {name: 0.1 * index + 0.05 * row["seed"] for index, name in enumerate(names)}
        | {f"{name}_half_width": 0.02 for name in names}
        for row, writer in writers
        for judge, names in judges.items()
    ]


def contender_row(contender: str, size: int, seed: int) -> dict[str, Any]:
    row = run_row("gpt2", "grouped", size, seed, contender=contender, scorer=contender, group_accuracy=0.4 + 0.1 * seed)
    random_seed = f"_seed{seed}" if seed and contender.endswith("random") else ""
    return row | {"partition_order": contender.rpartition("_")[2] + random_seed}


def write_side_tables(folder: Path) -> None:
    """What heads_pareto reads besides its own table: curves of its runs, and the seconds of a training step."""
    curves = []
    for contender in ("full_tied", "full_free", "linear_clustered", "scale_shift_bpe"):
        for step, loss in ((50, 6.0), (100, 4.0)):
            line = {
                "experiment": "heads_pareto",
                "contender": contender,
                "seed": 0,
                "step": step,
                "tokens": 2000 * step,
                "train_loss": loss,
            }
            curves.append(line | {"validation_loss_nats": loss, "validation_group_accuracy": 0.01 * step})
    pd.DataFrame(curves).to_csv(folder / "heads_pareto_curves.csv", index=False)
    steps = [
        {
            "side": side,
            "round": number,
            "seconds": seconds,
            "tokens": 4096,
            "peak_memory_gib": seconds,
            "flops_per_token": 9,
        }
        for side, seconds in (("free", 0.1), ("full_tied", 0.9), ("full_free", 0.9), ("linear_clustered", 0.2))
        for number in range(2)
    ]
    pd.DataFrame(steps).to_csv(folder / "heads_cost.csv", index=False)
    pictures = [
        {
            "experiment": "shapes",
            "head": head,
            "learning_rate": rate,
            "seed": seed,
            "step": step,
            "train_loss": 5.0 - step / 50,
        }
        | {"validation_accuracy": step / 100, "validation_group_accuracy": 0.5, "validation_loss_nats": 3.0 + seed}
        for head in ("full", "grouped")
        for rate in (1e-3, 3e-3)
        for seed in (0, 1)
        for step in (10, 20)
    ]
    pd.DataFrame(pictures).to_csv(folder / "shapes_curves.csv", index=False)
    ceilings = [{"quantity": f"best {kind}", "value": 0.9, "classes": 256} for kind in ("accuracy", "group accuracy")]
    pd.DataFrame(ceilings).to_csv(folder / "figure1_shapes.csv", index=False)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/ with the tables of scale smoke and the reference values; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    for reference in ("paper", "simulated"):
        shutil.copytree(REPOSITORY / "results" / reference, tmp_path / "results" / reference)
    for experiment, rows in tables():
        table = pd.DataFrame([{**row, "experiment": experiment} for row in rows])
        write_table(table, tmp_path / "results" / "smoke" / f"{experiment}.csv")
    write_side_tables(tmp_path / "results" / "smoke")
    for name, rows in caching_tables():
        pd.DataFrame(rows).assign(experiment=name).to_csv(tmp_path / "results" / "smoke" / f"{name}.csv", index=False)
    return tmp_path / "results"


def draw(program: str, monkeypatch: pytest.MonkeyPatch, *scales: str) -> int:
    def program_itself() -> None:
        runpy.run_path(str(experiment_path(program)), run_name="__main__")

    return call(program_itself, monkeypatch, *scales)


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_figure_is_drawn_the_same_each_time(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program: str
) -> None:
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert draw(program, monkeypatch, "smoke") == 0, capfd.readouterr().err
    picture = results / "smoke" / f"{program}.png"
    pixels = matplotlib.image.imread(picture)
    height, width = pixels.shape[:2]
    assert 600 <= width <= 4000 and 300 <= height <= 4000
    assert pixels[..., :3].std() > 0.05  # more than an empty page
    drawn = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert {path.stem for path in drawn.keys() - before.keys()} == {program}
    assert {path: drawn[path] for path in before} == before
    for path in drawn.keys() - before.keys():
        path.unlink()
    assert draw(program, monkeypatch) == 0  # without a name: every scale that has the table
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == drawn


def test_the_table_beside_the_figure_holds_means_and_intervals(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("main_comparison", monkeypatch, "smoke") == 0
    lines = (results / "smoke" / "main_comparison.md").read_text().splitlines()
    (full,) = [line for line in lines if line.startswith("| GPT-2, full")]
    mean, half_width = mean_and_interval([4.0, 4.1, 4.2])
    assert f"| {mean:.3f} ± {half_width:.3f} |" in full and full.endswith("| 3 |")


def test_grouped_minus_full_over_seeds_and_documents(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(results)
    assert draw("main_comparison", monkeypatch, "smoke") == 0
    lines = (results / "smoke" / "main_comparison.md").read_text().splitlines()
    # GPT-2 has seeds 0 and 1 of both heads, GPT-Neo only seed 0
    told = [index for index, line in enumerate(lines) if line.startswith("* GPT-")]
    assert "+0.225 ± 0.000 nats over 2 seeds" in lines[told[0]] and "3 documents" in lines[told[0]]
    # per document the difference is 0.225 nats times 0.5, 1.5 and 5 / 6: the interval lies around the mean
    low, high = (float(number) for number in lines[told[0]].split("; ")[1].split(" over ")[0].split(" to "))
    assert 0.11 <= low < 0.225 < high <= 0.34
    assert "worse by more than the margin" in lines[told[0] + 1]
    assert not any("GPT-Neo: grouped minus" in line for line in lines)


def test_document_losses_of_other_runs_are_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_documents(results, shift=0.01)
    assert draw("main_comparison", monkeypatch, "smoke") == 2
    written = capfd.readouterr().err
    assert written.count("\n") == 1 and "of other runs" in written
    assert not (results / "smoke" / "main_comparison.png").exists()


def test_at_equal_time_the_first_evaluation_after_it_is_compared(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    for contender, losses in (("full_tied", {50: 6.0, 100: 4.0}), ("scale_shift_bpe", {50: 6.0, 100: 5.0})):
        for seed in (0, 1):
            line = {"experiment": "heads_pareto", "contender": contender, "seed": seed, "train_loss": 1.0}
            for step, loss in losses.items():
                line |= {"step": step, "tokens": 2000 * step, "validation_loss_nats": loss + 0.01 * seed}
                lines.append(line | {"validation_group_accuracy": 0.5})
    smoke = results / "smoke"
    pd.DataFrame(lines).to_csv(smoke / "heads_pareto_curves.csv", index=False)
    costs = pd.read_csv(smoke / "heads_cost.csv")
    fast = costs[costs["side"] == "linear_clustered"].assign(side="scale_shift_bpe")  # 4.5 times as fast as full
    pd.concat([costs, fast]).to_csv(smoke / "heads_cost.csv", index=False)
    assert draw("main_comparison", monkeypatch, "smoke") == 0
    (told,) = [line for line in (smoke / "main_comparison.md").read_text().splitlines() if "whole budget" in line]
    # 200,000 tokens at 4,096 / 0.2 a second: 10 s; the full softmax is first evaluated after 100,000 at 4,096 / 0.9
    assert "(10 s)" in told and "(22 s, 2.2 times" in told and "-1.000 ± 0.000 nats over 2 seeds" in told


def test_each_corpus_has_its_own_panels_and_baseline(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results / "smoke" / "figure3_group_size.csv"
    assert draw("figure3_group_size", monkeypatch, "smoke") == 0
    one = matplotlib.image.imread(path.with_suffix(".png")).shape[0]
    first = pd.read_csv(path)
    least = first["peak_memory_gib"].where(first["group_size"] != 14, 0.1)
    second = first.assign(corpus="other", validation_loss_nats=7.5, peak_memory_gib=least)
    pd.concat([second, first]).to_csv(path, index=False)
    baseline = pd.read_csv(results / "smoke" / "main_comparison.csv").query("model == 'gpt2' and head == 'full'")
    baseline = baseline.assign(corpus="other", validation_loss_nats=7.25, experiment="figure3_baseline")
    baseline.to_csv(results / "smoke" / "figure3_baseline.csv", index=False)
    assert draw("figure3_group_size", monkeypatch, "smoke") == 0
    assert matplotlib.image.imread(path.with_suffix(".png")).shape[0] > 1.5 * one
    before, _, after = path.with_suffix(".md").read_text().partition("Corpus other")
    assert "Corpus stories" in before  # main_comparison's own corpus comes first
    assert "7.500" not in before and "7.250" not in before
    assert "7.500 ± 0.000" in after and "| GPT-2, full softmax | 7.250 ± 0.000 |" in after
    assert "S = 14, 0.100 GiB" in after and "√V = 224" in after


def test_foldings_are_counted_from_their_own_teacher(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("fold", monkeypatch, "smoke") == 0
    lines = (results / "smoke" / "fold.md").read_text().splitlines()
    (at_once,) = [line for line in lines if line.startswith("| BPE order | 224 | 0 |")]
    assert at_once.endswith("| 0.6000 ± 0.0000 | 3 |")
    assert sum(line.startswith("| BPE order |") for line in lines) == 3


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("content", "words"), [(None, "make everything"), ("seed,model\n0,gpt2\n", "has no column experiment")]
)
def test_a_missing_or_foreign_table_is_told_in_one_line(
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    program: str,
    content: str | None,
    words: str,
) -> None:
    for path in results.glob("smoke/*.csv"):
        path.unlink() if content is None else path.write_text(content)
    before = sorted(results.rglob("*"))
    for scales in ((), ("smoke",)):
        assert draw(program, monkeypatch, *scales) == 2
        written = capfd.readouterr().err
        assert written.count("\n") == 1 and words in written
    assert sorted(results.rglob("*")) == before
