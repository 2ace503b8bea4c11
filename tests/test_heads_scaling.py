"""Loss against training tokens: the trend of a gap and its crossing, points at equal cost, pictures and words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from experiments.heads import heads_scaling
from experiments.heads.heads_scaling import LARGE_GROUPS
from experiments.heads.scaling_points import (
    arm_of,
    at_equal_cost,
    best_full,
    flops_a_token,
    folded_arms,
    gap,
    gap_trend,
    points_of,
)
from experiments.study.trends import trend
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from scipy import stats

from run_cases import TEXT, TINY, call, experiment, write_corpus
from scaling_cases import V, cost_rows, rows_with_slope, scaling_row
from vocabfold import train
from vocabfold.errors import UserError
from vocabfold.heads import equal_partition
from vocabfold.runs.settings import CONFIG_FOLDER, UNTUNED_RATE, scaling_learning_rate
from vocabfold.runs.tables import write_table

FOLDED = "linear_clustered_counts"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def write(results: Path, rows: list[dict[str, Any]], corpus: str = "text") -> None:
    write_table(pd.DataFrame(rows), results / corpus / "heads_scaling.csv")


def words_of(results: Path, monkeypatch: pytest.MonkeyPatch, corpus: str = "text") -> str:
    assert experiment(monkeypatch, "heads_scaling", "draw", corpus) == 0
    return (results / corpus / "heads_scaling.md").read_text()


def test_a_trend_is_least_squares_over_log_tokens_and_its_band_gives_the_crossing() -> None:
    places = [0.5e6, 1e6, 2e6, 4e6, 4e6]
    values = [-0.11, -0.07, -0.05, -0.02, -0.01]
    found = trend(places, values)
    assert found is not None
    expected = stats.linregress(np.log2(places), values)
    assert found.slope == pytest.approx(expected.slope) and found.p_value == pytest.approx(expected.pvalue)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 3) * expected.stderr)
    assert found.at(1.0)[0] == pytest.approx(expected.intercept)
    crossing = found.crossing()
    assert found.at(crossing.place)[0] == pytest.approx(0, abs=1e-9)
    for end in (crossing.low, crossing.high):  # the band ends at zero there
        middle, half_width = found.at(end)
        assert abs(middle) == pytest.approx(half_width, rel=1e-6)
    assert crossing.low < crossing.place < crossing.high


def test_a_slope_that_is_none_bounds_no_crossing() -> None:
    flat = trend([1e6, 1e6, 2e6, 2e6], [-0.1, -0.12, -0.12, -0.1])
    assert flat is not None and flat.p_value == pytest.approx(1) and flat.crossing().place == math.inf
    assert flat.crossing().low > 2e6 and flat.crossing().high == math.inf
    around = trend([1e6, 1e6, 2e6, 2e6], [-0.1, 0.1, -0.1, 0.1])
    assert around is not None and (around.crossing().low, around.crossing().high) == (0.0, math.inf)
    falling = trend([1e6, 1e6, 2e6, 2e6], [0.10, 0.12, 0.115, 0.125])  # would have been 0 before the first
    assert falling is not None and falling.crossing().high < 1e6 and falling.crossing().low == 0
    assert trend([1e6, 2e6], [0.0, 1.0]) is None and trend([1e6] * 3, [0.0, 1.0, 2.0]) is None


def test_a_bend_is_seen() -> None:
    places = [2.0**power for power in range(8)]
    straight = trend(places, [0.1 * power + 0.01 * (power % 2) for power in range(8)])
    bent = trend(places, [0.1 * power**2 + 0.01 * (power % 2) for power in range(8)])
    assert straight is not None and bent is not None
    assert straight.curvature_p > 0.05 and bent.curvature_p < 1e-6
    assert math.isnan(trend([1, 2, 2, 2], [0, 1, 2, 3]).curvature_p)  # type: ignore[union-attr]


def test_slope_and_crossing_of_the_gap_are_those_that_were_put_in(results: Path) -> None:
    points = points_of(pd.DataFrame(rows_with_slope(0.03, -0.06, noise=0.002)), 64, "text")
    assert folded_arms(points) == [FOLDED] and best_full(points, (1e6, 1.0)) == "full_untied_counts"
    found = gap(points, FOLDED, (1e6, 1.0))
    assert found is not None and found.mean == pytest.approx(-0.06) and found.count == 3
    # by hand: gaps -0.062, -0.06 and -0.058 have the standard error 0.002 / sqrt 3, t at 97.5% with two is 4.3027
    assert found.half_width == pytest.approx(4.3027 * 0.002 / math.sqrt(3), rel=1e-4)
    line = gap_trend(points, FOLDED)
    assert line is not None and line.slope == pytest.approx(0.03, abs=1e-9) and line.count == 10
    assert line.crossing().place == pytest.approx(4e6) and line.crossing().low < 4e6 < line.crossing().high


def test_a_text_read_again_is_no_point_of_the_line(results: Path) -> None:
    rows = rows_with_slope(0.0, -0.06, noise=0.001)
    again = {"epochs": 3.0, "tokens": 12e6}
    rows += [scaling_row("full_untied_counts", 4e6, 0, 5.0, **again), scaling_row(FOLDED, 4e6, 0, 6.0, **again)]
    points = points_of(pd.DataFrame(rows), 64, "text")
    line, found = gap_trend(points, FOLDED), gap(points, FOLDED, (4e6, 3.0))
    assert line is not None and line.slope == pytest.approx(0, abs=1e-9) and line.count == 10
    assert found is not None and found.mean == pytest.approx(1.0)


def test_at_equal_cost_the_largest_run_that_costs_no_more_is_compared() -> None:
    points = points_of(pd.DataFrame(rows_with_slope(0.0, 0.05, noise=0.001)), 64, "text")
    seconds = {"full_untied_counts": 1e-3, FOLDED: 0.4e-3}  # 2.5 times as fast: twice the tokens are the most it can do
    first, second, third, last = at_equal_cost(points, FOLDED, seconds)
    assert (first.full_budget, first.budget) == ((0.5e6, 1.0), (1e6, 1.0)) and first.share == pytest.approx(0.8)
    assert first.difference.mean == pytest.approx(-0.3 + 0.05) and first.difference.count == 3
    assert third.budget == (4e6, 1.0) and third.difference.count == 1
    assert (
        last.budget == (4e6, 1.0) and last.share == pytest.approx(0.4) and last.difference.mean == pytest.approx(0.05)
    )
    assert second.difference.mean == pytest.approx(-0.25)
    slower = at_equal_cost(points, FOLDED, {"full_untied_counts": 1e-3, FOLDED: 1.5e-3})
    assert [one.budget[0] for one in slower] == [0.5e6, 1e6, 2e6] and slower[0].full_budget == (1e6, 1.0)
    assert at_equal_cost(points, FOLDED, {"full_untied_counts": 1e-3}) == []
    by_flops = at_equal_cost(points, FOLDED, flops_a_token(points))
    assert by_flops[0].budget == (4e6, 1.0) and by_flops[0].share == pytest.approx(0.8)


def test_of_several_learning_rates_the_rule_s_is_taken_and_never_the_best(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [scaling_row("full_counts", 1e6, 0, 6.0), scaling_row(FOLDED, 1e6, 0, 5.9)]
    rows.append(scaling_row(FOLDED, 1e6, 0, 5.0, learning_rate=6e-3))
    (folded,) = points_of(pd.DataFrame(rows), 64, "text").query("head == @FOLDED").itertuples()
    assert folded.learning_rate == 3e-3
    rates = [
        scaling_row(FOLDED, 1e6, 0, loss, learning_rate=rate) | {"experiment": "scaling_learning_rates"}
        for rate, loss in ((3e-3, 2.0), (6e-3, 1.0))
    ]
    write_table(pd.DataFrame(rates), results / "text" / "scaling_learning_rates.csv")
    (folded,) = points_of(pd.DataFrame(rows), 64, "text").query("head == @FOLDED").itertuples()
    assert folded.learning_rate == 6e-3
    write(results, rows[:2])
    assert f"Not at the rate of the rule: `{FOLDED}` at 1 M (0.003, by the rule 0.006)." in words_of(
        results, monkeypatch
    )


def test_runs_of_other_settings_are_refused_in_one_line() -> None:
    rows = [scaling_row(FOLDED, 1e6, 0, 5.9), scaling_row(FOLDED, 1e6, 0, 5.8, num_parameters=7)]
    with pytest.raises(UserError, match=f"{FOLDED} has several runs of seed 0"):
        points_of(pd.DataFrame(rows), 64, "text")
    with pytest.raises(UserError, match="no column epochs"):
        points_of(pd.DataFrame(rows).drop(columns="epochs"), 64, "text")


def test_group_sizes_far_from_the_root_have_arms_of_their_own() -> None:
    assert arm_of("paper", "scale_shift", 225, V) == "paper" and arm_of("full", None, math.nan, V) == "full"
    assert arm_of("adaptive", None, 40_257, V) == "adaptive"
    assert arm_of("linear_clustered", "linear_sorted", 225, math.nan) == "linear_clustered"  # a table before the column
    (name,) = LARGE_GROUPS
    assert arm_of("paper", "scale_shift", equal_partition(V, 3864).num_slots, V) == name


@pytest.mark.parametrize("timed", [True, False])
def test_words_and_picture_say_what_is_there(results: Path, monkeypatch: pytest.MonkeyPatch, timed: bool) -> None:
    rows = rows_with_slope(0.03, -0.09, noise=0.001)
    rows += [scaling_row("someone_s_head", 1e6, 0, 5.95), scaling_row("paper", 1e6, 0, 7.0, partition_order="bpe")]
    rows += [scaling_row(FOLDED, tokens, 0, 5.5, hidden_size=128, num_layers=8) for tokens in (1e6, 2e6)]
    rows.append(scaling_row(FOLDED, 1e6, 0, 5.4, hidden_size=256, num_layers=8))
    write(results, rows)
    if timed:
        pd.DataFrame(cost_rows()).to_csv(results / "text" / "heads_scaling_cost.csv", index=False)
    words = words_of(results, monkeypatch)
    assert "## text, hidden 64" in words and "## text, hidden 128" in words
    (line,) = [line for line in words.splitlines() if line.startswith(f"| `{FOLDED}` | +0.03")]
    assert "at 8.0 M tokens" in line and "**extrapolated**, 2.0 times the largest budget" in line
    # One seed at 4 M decides nothing where 2 M has several.
    (goal,) = [line for line in words.splitlines() if line.startswith(f"| `{FOLDED}` | 2 M | 0.94")]
    assert "), met | " in goal and "yes (+0.030 for twice)" in goal
    assert ("8.0 (8.0 to 8.0), met | 1.05, met" in goal) == timed and ("not measured" in goal) != timed
    assert "`paper` at 0.5 M, 2 M, 4 M" in words
    lead = words[words.index("At 2 M tokens, the largest budget") :].split("\n\n")[1]
    assert lead.splitlines()[2].startswith("| one linear layer a group, clustered, count biases | `head=linear_clus")
    assert ("| 0.942 (0.939 to 0.944) | 8.0 | 0.210 |" in lead) == timed and "| 5.710 ± 0.025 | 1 |" in lead
    assert "No full softmax was trained at any budget" in words  # of hidden 128
    assert "3.618 + 2.412" not in words and f"{0.6 * 5.92:.3f} + {0.4 * 5.92:.3f}, 0.300" in words
    for stem in ("heads_scaling", "heads_scaling_128"):
        pixels = matplotlib.image.imread(results / "text" / f"{stem}.png")
        assert pixels[..., :3].std() > 0.05
    assert "## text, hidden 256" in words and not (results / "text" / "heads_scaling_256.png").exists()  # one budget


def test_steps_are_compared_in_groups_that_several_heads_share_and_the_best_head_is_the_one_of_its_file() -> None:
    def points(**orders: str) -> pd.DataFrame:
        return pd.DataFrame({"arm": list(orders), "partition_order": list(orders.values())})

    both = {"conditioned_exchanged": "exchanged", "linear_clustered_counts": "clustered"}
    assert heads_scaling.shared_order(points(**both, full="")) is None
    assert heads_scaling.shared_order(points(**both, conditioned_clustered="clustered")) == "clustered"
    assert heads_scaling.shared_order(points(**both, conditioned_tied="exchanged", x="clustered")) == "exchanged"
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        assert compose("train", ["head=folded"]).head.name == heads_scaling.BEST


def test_a_head_whose_rate_was_not_tuned_is_told_and_not_drawn(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(results, [*rows_with_slope(0.03, -0.09), scaling_row("linear_bpe", 1e6, 0, 6.5)])
    write_rates(results, {(head, 64, 1e6): 3e-3 for head in (FOLDED, "full_counts", "full_untied_counts")})
    drawn: list[str] = []
    monkeypatch.setattr(heads_scaling, "draw_points", lambda points, *_: drawn.extend(points["arm"].unique()))
    words = words_of(results, monkeypatch)
    assert set(drawn) == {FOLDED, "full_counts", "full_untied_counts"}
    assert "Rates not tuned here: `linear_bpe`." in words and "| `linear_bpe` | not run | 6.500 (1)" in words


def test_two_rounds_of_seeds_and_a_single_run_can_be_drawn(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(results, [scaling_row("full_counts", 0.5e6, 0, 7.0)])
    words = words_of(results, monkeypatch)
    assert "7.000 (1)" in words and "1 seeds" not in words


def test_finished_runs_are_collected_with_their_budget_and_other_rows_stay(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(results.parent)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(results.parent / "cache"))
    write(results, [scaling_row("elsewhere", 1e6, 0, 5.0)])
    words = ["experiment=heads_scaling", "head=full_counts", "training_tokens=200", "budget.epochs=2"]
    assert call(train.main, monkeypatch, *TINY[1:], *words) == 0
    assert experiment(monkeypatch, "heads_scaling", "measure", *TEXT) == 0
    table = pd.read_csv(results / "text" / "heads_scaling.csv").set_index("head")
    assert set(table.index) == {"elsewhere", "full_counts"}
    row = table.loc["full_counts"]
    assert (row["training_tokens"], row["epochs"], row["learning_rate"]) == (200, 2, 3e-3)
    (config,) = results.glob("runs/text/heads_scaling/*/config.yaml")
    steps = json.loads(config.with_name("row.json").read_text())["steps"]
    assert steps == 12  # of 2 x 16 tokens, twice over 200: warm-up is counted over both epochs
    assert f"warmup_steps: {round(0.05 * 2 * 200 / 32)}\n" in config.read_text()


@pytest.mark.slow
def test_all_heads_are_timed_side_by_side(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(results.parent)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(results.parent / "cache"))
    small = ["training_tokens=200", "sequence_length=16", "batch_size=2", "model.hidden_size=16", "model.num_layers=1"]
    options = ["measure", "--speed", "--rounds", "2", "--heads", f"full_counts,{FOLDED}"]
    assert experiment(monkeypatch, "heads_scaling", *options, *TEXT, *small) == 0
    path = results / "text" / "heads_scaling_cost.csv"
    table = pd.read_csv(path)
    assert set(table["method"]) == {"full_counts", FOLDED, "no_head"} and (table["hidden_size"] == 16).all()
    assert len(table) == 6
    assert experiment(monkeypatch, "heads_scaling", *options, *TEXT, *small, "model.hidden_size=8") == 0
    assert sorted(set(pd.read_csv(path)["hidden_size"])) == [8, 16]


def write_rates(results: Path, best: dict[tuple[str, int, float], float]) -> None:
    """scaling_learning_rates in which of three rates the one given is the best, by 0.1 nats over each seed."""
    rows = [
        scaling_row(
            head, tokens, seed, 2.0 + 0.1 * (rate != wanted) + 0.01 * seed, learning_rate=rate, hidden_size=size
        )
        for (head, size, tokens), wanted in best.items()
        for rate in {1.5e-3, 3e-3, 6e-3, wanted}
        for seed in (0, 1)
    ]
    write_table(pd.DataFrame(rows), results / "text" / "scaling_learning_rates.csv")


def test_the_rate_between_tuned_budgets_is_a_straight_line_of_logarithms(results: Path) -> None:
    assert scaling_learning_rate("text", "a", 64, 1e6) == UNTUNED_RATE == 3e-3  # no table
    write_rates(
        results, {("a", 64, 0.5e6): 6e-3, ("a", 64, 2e6): 3e-3, ("b", 64, 0.5e6): 3e-3, ("a", 128, 2e6): 1.5e-3}
    )
    assert [scaling_learning_rate("text", "a", 64, tokens) for tokens in (0.5e6, 2e6)] == [6e-3, 3e-3]
    assert scaling_learning_rate("text", "a", 64, 1e6) == 4.2e-3  # 3e-3 times the root of two
    assert (
        scaling_learning_rate("text", "a", 64, 0.1e6) == 6e-3 and scaling_learning_rate("text", "a", 64, 16e6) == 3e-3
    )
    assert (
        scaling_learning_rate("text", "b", 64, 4e6) == 3e-3 and scaling_learning_rate("text", "a", 128, 1e5) == 1.5e-3
    )
    assert scaling_learning_rate("text", "c", 64, 1e6) == UNTUNED_RATE
    assert scaling_learning_rate("text", "b", 128, 1e6) == UNTUNED_RATE
    assert scaling_learning_rate("other", "a", 64, 1e6) == UNTUNED_RATE


def test_runs_of_heads_scaling_take_their_rate_by_the_rule(results: Path) -> None:
    write_rates(results, {("full_counts", 64, 0.5e6): 6e-3, ("full_counts", 64, 2e6): 3e-3})

    def rate(*words: str) -> float:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return float(compose("train", ["experiment=heads_scaling", "data=text", *words]).optimizer.learning_rate)

    assert rate("head=full_counts") == 6e-3 and rate("head=full_counts", "training_tokens=1_000_000") == 4.2e-3
    assert rate("head=full_counts", "budget.epochs=4") == 3e-3  # it is the tokens trained on that count
    assert rate("head=full_counts", "size=hidden128") == 3e-3 and rate("head=full_untied_counts") == 3e-3
    assert rate("head=full_counts", "optimizer.learning_rate=1e-3") == 1e-3
    with pytest.raises(Exception, match="set it, at most to the text's length"):
        rate("head=full_counts", "training_tokens=null")


def test_the_recipe_serves_the_paper_s_experiments_too() -> None:
    GlobalHydra.instance().clear()
    for name in ("figure3_group_size", "order_matters"):
        words = [f"experiment={name}", "data=text", "budget=scaling", "training_tokens=2_000_000"]
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            config = compose("train", [*words, "optimizer.learning_rate=3e-3"])
            whole = compose("train", ["experiment=heads_scaling", "data=text", "training_tokens=2_000_000"])
        assert config.optimizer == whole.optimizer and config.optimizer.warmup_steps == 49
        for key in ("budget", "batch_size", "sequence_length", "training_tokens", "model"):
            assert config[key] == whole[key], key


def test_the_table_of_rates_tells_the_rule_and_what_lies_at_an_edge(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rates(results, {("a", 64, 0.5e6): 6e-3, ("a", 64, 2e6): 3e-3})
    assert experiment(monkeypatch, "scaling_learning_rates", "draw", "text") == 0
    words = (results / "text" / "scaling_learning_rates.md").read_text()
    assert "| a | 64 | 0.5 M | 2.105 | 2.105 | **2.005** | 6 |" in words
    assert "| a | 64 | 0.006 | 0.0042 | 0.003 | 0.003 | 0.003 | 0.003 |" in words
    assert "may lie beyond: a at 0.5 M (0.006)." in words


@pytest.mark.slow
def test_rare_tokens_reads_the_largest_budget_of_heads_scaling(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_corpus(results.parent)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(results.parent / "cache"))
    words = ["experiment=heads_scaling", "--multirun", "seed=0"]
    tiny = [word for word in TINY if word != "budget=steps_2"]
    heads = ["head=full_untied_counts,paper", "training_tokens=200,400"]
    assert call(train.main, monkeypatch, *tiny, *words, *heads) == 0
    assert call(train.main, monkeypatch, *tiny, *words, "head=paper", "training_tokens=600") == 0
    assert experiment(monkeypatch, "rare_tokens", "measure", "--of", "heads_scaling", *TEXT) == 0
    table = pd.read_csv(results / "text" / "rare_tokens.csv")
    assert set(table["head"]) == {"full_untied_counts", "paper"} and table["tokens"].nunique() == 1
    assert 200 < table["tokens"].iloc[0] <= 400
    # what the runs saw is counted, not the whole text
    assert table.query("sorted_by == 'rank'")["most_training_count"].max() < 100
    assert experiment(monkeypatch, "rare_tokens", "draw", "text") == 0
    assert (results / "text" / "rare_tokens.png").is_file()
