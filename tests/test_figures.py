"""The statistics of the figures, and each figure program on a small table."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from experiments.study.statistics import mean_and_interval, summarise
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from scipy import stats

from figure_cases import caching_tables, write_documents, write_side_tables, write_tables
from run_cases import experiment

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
PICTURES |= {name: [name] for name in ("lead_by_step", "main_comparison", "rare_tokens", "table1_story_quality")}
SHAPES = ("shapes", "shapes_curves")
PICTURES |= {
    "order_matters": ["order_matters", "order_matters_group_accuracy"],
    "vocabulary_scaling": ["vocabulary_scaling", "larger_vocabulary"],
    "shapes": ["shapes_figure2", "shapes_figure6", "shapes_figure7"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/ with the tables of a text and the reference values."""
    folder = tmp_path_factory.mktemp("figures") / "results"
    for reference in ("paper", "cost"):
        shutil.copytree(REPOSITORY / "results" / reference, folder / reference)
    write_tables(folder / "tiny")
    write_side_tables(folder / "tiny")
    for name, rows in caching_tables():
        pd.DataFrame(rows).assign(experiment=name).to_csv(folder / "tiny" / f"{name}.csv", index=False)
    return folder


@pytest.fixture
def results(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(written, tmp_path / "results")


class Shown(list[str]):
    """What each figure that was saved shows, as words and numbers; the files are empty unless it ``paints`` them."""

    paints = False


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Filled by every figure that is saved."""
    figures, savefig = Shown(), Figure.savefig

    def save(figure: Figure, path: Path, **options: Any) -> None:
        figures.append(content(figure))
        if figures.paints:
            savefig(figure, path, **options)
        else:
            Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def content(figure: Figure) -> str:
    """Words, places and colours of all that a figure shows."""
    found: list[object] = [figure.get_size_inches().tolist()]
    for artist in figure.findobj():
        match artist:
            case Text():
                found.append((artist.get_text(), artist.get_position(), artist.get_color()))
            case Line2D():
                look = (artist.get_color(), artist.get_linestyle(), artist.get_marker())
                found.append((artist.get_label(), artist.get_xydata().tolist(), look))
            case Patch():
                found.append((artist.get_path().vertices.tolist(), artist.get_facecolor()))
            case Collection():
                paths = [path.vertices.tolist() for path in artist.get_paths()]
                found.append((artist.get_label(), artist.get_offsets().tolist(), paths))
    return repr(found)


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
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shown: Shown, name: str
) -> None:
    shown.paints = True
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
    first = shown.copy()
    shown.clear()
    # Without a name: every text that has the table. What shows the same is painted the same, as one of them proves.
    shown.paints = name == "first_look"
    assert draw(name, monkeypatch) == 0
    assert shown == first and len(first) == len(PICTURES[name])
    again = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert again.keys() == drawn.keys()
    same = [path for path in drawn if shown.paints or path.suffix != ".png"]
    assert [again[path] for path in same] == [drawn[path] for path in same]


@pytest.mark.usefixtures("shown")
def test_the_table_beside_the_figure_holds_means_and_intervals(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("main_comparison", monkeypatch, "tiny") == 0
    lines = (results / "tiny" / "main_comparison.md").read_text().splitlines()
    (full,) = [line for line in lines if line.startswith("| GPT-2, full")]
    mean, half_width = mean_and_interval([4.0, 4.1, 4.2])
    assert f"| {mean:.3f} ± {half_width:.3f} |" in full and full.endswith("| 3 |")


@pytest.mark.usefixtures("shown")
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


@pytest.mark.usefixtures("shown")
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


@pytest.mark.usefixtures("shown")
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


@pytest.mark.usefixtures("shown")
def test_foldings_are_counted_from_their_own_teacher(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("fold", monkeypatch, "tiny") == 0
    lines = (results / "tiny" / "fold.md").read_text().splitlines()
    (at_once,) = [line for line in lines if line.startswith("| BPE order | 224 | 0 |")]
    assert at_once.endswith("| 0.6000 ± 0.0000 | 3 |")
    assert sum(line.startswith("| BPE order |") for line in lines) == 3


@pytest.mark.usefixtures("shown")
def test_a_larger_set_of_pictures_that_were_not_all_seen_stands_beside_the_others(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = results / "tiny"
    runs, curves = (pd.read_csv(folder / f"{name}.csv").assign(experiment="shapes_full") for name in SHAPES)
    runs = runs.assign(vocabulary_size=184_320, tokens=25, corpus_documents=100)
    for table in (runs, curves):
        table["run"] += " at full size"
    curves.loc[curves["step"] < curves["step"].max(), "validation_accuracy"] = None
    for table, name in zip((runs, curves), ("shapes_full", "shapes_full_curves"), strict=True):
        table.to_csv(folder / f"{name}.csv", index=False)
    ceilings = pd.read_csv(folder / "figure1_shapes.csv")
    pd.concat([ceilings, ceilings.assign(classes=184_320)]).to_csv(folder / "figure1_shapes.csv", index=False)
    assert draw("shapes", monkeypatch, "tiny") == 0
    drawn = {path.stem for path in folder.glob("shapes_figure*.png")}
    assert drawn == {"shapes_figure2", "shapes_figure6", "shapes_figure7", "shapes_figure6_184320"}
    words = (folder / "shapes.md").read_text()
    assert words.startswith("256 classes of pictures; 2 seeds")
    assert "184,320 classes of pictures, of whose training pictures 25% were seen; 2 seeds" in words


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
