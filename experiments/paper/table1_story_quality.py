"""How good are the models' stories? Table 1 of arXiv 2411.06371, on the runs of experiment=main_comparison.

    python -m experiments table1_story_quality measure [KEY=VALUE ...]
    python -m experiments table1_story_quality measure --judge language-model --judge-model NAME --base-url URL
    python -m experiments table1_story_quality draw [CORPUS ...]

cuts validation stories at random, lets every model write on (temperature 0.4, top-k 50) and has the stories judged into
results/CORPUS/table1_story_quality.csv, one row a run and judge, with a sample of them in
table1_story_quality_stories.md, and draws the table beside the published one and the picture. Judges: the grammar of
the embedded stories' own generator (for other texts what needs no grammar), or a language model behind an endpoint that
speaks OpenAI's protocol.
"""

from __future__ import annotations

import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from tqdm import tqdm

from experiments.judging import (
    MAX_TOKENS,
    MIXED_SENTENCES,
    OWN_ENDINGS,
    SHUFFLED_WORDS,
    Endpoint,
    GrammarJudge,
    Judge,
    LanguageModelJudge,
    Material,
    Story,
    TextJudge,
    Written,
    documents_of,
    mean_and_bootstrap,
    text_of,
    written_by_runs,
    written_references,
)
from experiments.judging.language_model import RETRIES, TIMEOUT_SECONDS
from experiments.paper.table1_words import (
    BY_RULES,
    HALF_TRAINED,
    MARKS,
    QUANTITIES,
    TRAINED,
    markdown,
    measured,
    name_of,
    rows_of,
    summary,
    writers_of,
)
from experiments.study.figures import COLORS, COLUMN_INCHES, save
from experiments.study.measuring import (
    add_settings,
    at_least_one,
    corpus_of,
    identity,
    is_measured,
)
from vocabfold.errors import UserError
from vocabfold.files import write_text
from vocabfold.machine import origin
from vocabfold.runs.tables import RESULTS, RUN_COLUMNS, read_table, write_table

EXPERIMENT = "table1_story_quality"
SOURCES = {"main_comparison": TRAINED, EXPERIMENT: HALF_TRAINED}  # experiment of a run -> what its writer is called
STYLES = {OWN_ENDINGS: ("green", "^"), MIXED_SENTENCES: ("purple", "v"), SHUFFLED_WORDS: ("red", "x")}
STYLES |= {"full": ("orange", "s"), "paper": ("blue", "o")}
JUDGES = ("grammar", "language-model")
NUM_TRAINING_DOCUMENTS = 20_000  # at most so many are remembered by the judges that know the training text
NUM_SHOWN, SHOWN_WORDS = 3, 15  # stories in the sample, and words of their beginnings
SEED = 0  # of the beginnings and the spoilt references
WHOLE = ["seed", "hidden_size", "num_layers", "steps", "tokens", "num_parameters", "stories"]
DRAWN = {
    "text": tuple(TextJudge.quantities),
    "grammar": (
        *("words_told_share", "known_trigrams_share", "distinct_bigrams_share"),
        *("consistency_share", "mentions", "plot_words_share"),
    ),
}
ANSWERS = Path(os.environ.get("VOCABFOLD_CACHE", "~/.cache/vocabfold")) / "judge"


def add_options(parser: ArgumentParser) -> None:
    """Who judges what, and the text."""
    parser.add_argument("--judge", choices=JUDGES, default="grammar", help="who judges (default %(default)s)")
    parser.add_argument("--beginnings", type=int, default=40, help="validation stories (default %(default)s)")
    parser.add_argument("--continuations", type=int, default=1, help="of each beginning (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of each (default %(default)s)")
    group = parser.add_argument_group("--judge language-model")
    group.add_argument("--judge-model", help="its name at the endpoint")
    group.add_argument("--base-url", help="of the endpoint (default OPENAI_BASE_URL, or OpenAI)")
    group.add_argument("--key-variable", default="OPENAI_API_KEY", help="variable with the key (default %(default)s)")
    group.add_argument("--repeats", type=int, default=1, help="asks about each story (default %(default)s)")
    group.add_argument("--retries", type=int, default=RETRIES, help="of a failing request (default %(default)s)")
    group.add_argument("--timeout-seconds", type=float, default=TIMEOUT_SECONDS, help="(default %(default)s)")
    group.add_argument("--max-answer-tokens", type=int, help="of an answer (default: the endpoint's own limit)")
    group.add_argument("--dollars-per-million", type=float, nargs=2, default=(None, None), metavar=("IN", "OUT"))
    group.add_argument("--cache", type=Path, default=ANSWERS, help="folder of answers (default %(default)s)")
    group.add_argument("--yes", action="store_true", help="do not ask whether to go on after the estimate")
    add_settings(parser)


def measure(arguments: Namespace) -> None:
    """Let every finished run write and the judge judge. Raises UserError where no run of main_comparison is there."""
    at_least_one(arguments, "beginnings", "continuations", "max_tokens", "repeats")
    corpus = corpus_of(arguments.settings)
    folder = RESULTS / "runs" / corpus
    runs = {
        writer: sorted(row.parent for row in (folder / experiment).glob("*/row.json"))
        for experiment, writer in SOURCES.items()
    }
    if not runs[TRAINED]:
        raise UserError(f"no run of main_comparison on {corpus} has finished: run `make paper` first")
    path = RESULTS / corpus / f"{EXPERIMENT}.csv"
    names = [folder.name for folders in runs.values() for folder in folders]
    measurement = identity(EXPERIMENT, judged_by(arguments), names)
    if is_measured(path, measurement, "measurement"):
        return
    written = list(written_by_runs(runs, arguments.beginnings, arguments.continuations, arguments.max_tokens, SEED))
    materials = list({id(writer.material): writer.material for writer in written}.values())
    for material in materials:
        written += written_references(material, SEED)
    judges = {id(material): judge_of(arguments, material) for material in materials}
    if isinstance(judge := judges[id(materials[0])], LanguageModelJudge):
        agree(judge, [story for writer in written for story in writer.stories], arguments)
    text = {name: written[0].row.get(name) for name in ("corpus_sha256", "corpus_documents", "corpus_tokens")}
    rows = []
    for writer in tqdm(written, desc="judging"):
        judge = judges[id(writer.material)]
        scores = pd.DataFrame(judge.scores(writer.stories))
        row = {name: writer.row.get(name) for name in RUN_COLUMNS} | text
        row |= {
            "experiment": EXPERIMENT,
            "measurement": measurement,
            "run": writer.row.get("run") or measurement,  # endings that no run wrote are this measurement's own
        }
        row |= {"writer": writer.name, "judge": judge.name, "stories": len(scores)}
        for quantity in judge.quantities:
            row[quantity], row[f"{quantity}_half_width"] = mean_and_bootstrap(scores[quantity].tolist())
        rows.append(row | origin())
    table = pd.DataFrame(rows)
    if path.is_file():  # what another judge said stays
        before = read_table(EXPERIMENT, corpus)
        table = pd.concat([before[~before["judge"].isin(table["judge"])], table], ignore_index=True)
    table[WHOLE] = table[WHOLE].astype("Int64")
    write_table(table, path, ("run", "corpus", "writer", "judge"))
    write_text(path.with_name(f"{EXPERIMENT}_stories.md"), sample(written))


def judged_by(arguments: Namespace) -> Namespace:
    """The options that decide what is judged and how: not where answers are kept or how patiently they are awaited."""
    names = ("judge", "beginnings", "continuations", "max_tokens", "judge_model", "repeats")
    return Namespace(**{name: getattr(arguments, name) for name in names})


def judge_of(options: Namespace, material: Material) -> Judge:
    """The judge that the command line names, for the stories of one corpus."""
    if options.judge == "language-model":
        if not options.judge_model:
            raise UserError("--judge language-model needs --judge-model NAME: which model is to judge?")
        key = os.environ.get(options.key_variable)
        if options.max_answer_tokens is not None and options.max_answer_tokens < 1:
            raise UserError(f"--max-answer-tokens is {options.max_answer_tokens}: choose at least 1")
        endpoint = Endpoint(
            options.judge_model,
            options.base_url,
            key,
            options.timeout_seconds,
            options.retries,
            max_answer_tokens=options.max_answer_tokens,
        )
        return LanguageModelJudge(endpoint, options.cache, options.repeats)
    tokenizer = text_of(material.corpus)
    documents = documents_of(material.corpus.train, tokenizer.end_token, NUM_TRAINING_DOCUMENTS)
    training = (tokenizer.decode(document) for document in documents)
    return GrammarJudge(training) if material.data["name"] == "stories" else TextJudge(training)


def agree(judge: LanguageModelJudge, stories: Sequence[Story], options: Namespace) -> None:
    """Show what judging will take; go on if --yes or a person at the terminal says so. Raises UserError otherwise."""
    estimate = judge.estimate(stories)
    print(f"{judge.name}, {judge.endpoint.address}: {estimate.words(*options.dollars_per_million)}", flush=True)
    if options.yes or estimate.requests == 0:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is at the terminal to agree to that: add --yes")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was asked, as you wish")


def sample(written: Sequence[Written]) -> str:
    """The first stories of each one's first seed."""
    models: dict[str, list[Story]] = {}
    for writer in written:
        if "model" in writer.row:
            models.setdefault(name_of(writer.row | {"writer": writer.name}), writer.stories)
    lines = ["# What the models wrote", "", f"The same beginnings for all; of each the last {SHOWN_WORDS} words."]
    for number in range(NUM_SHOWN):
        first = next(iter(models.values()))[number]
        lines += ["", f"## … {' '.join(first.beginning.split()[-SHOWN_WORDS:])} …", ""]
        for name, stories in models.items():
            end = "" if stories[number].ended else " …"
            lines.append(f"* **{name}**: {' '.join(stories[number].continuation.split())}{end}")
    return "\n".join([*lines, ""])


def draw(corpus: str) -> None:
    """Write one corpus' picture and table from results/CORPUS/table1_story_quality.csv."""
    table = read_table(EXPERIMENT, corpus)
    kinds_of_writer = writers_of(table)[::-1]
    panels = [
        (judge, name)
        for judge in sorted(set(table["judge"]))
        for name in DRAWN.get(judge, MARKS)
        if name in measured(table, judge)
    ]
    num_rows = math.ceil(len(panels) / 3)
    size = (2 * COLUMN_INCHES, 0.7 + (0.4 + 0.15 * len(kinds_of_writer)) * num_rows)
    figure, grid = plt.subplots(num_rows, 3, figsize=size, sharey=True, squeeze=False)
    for axis, (judge, quantity) in zip(grid.flat, panels, strict=False):
        for position, one in enumerate(kinds_of_writer):
            mean, half_width, _ = summary(rows_of(table, one, judge), quantity)
            color, marker = STYLES[one["head"] if one["head"] in STYLES else one["writer"]]
            style: dict[str, Any] = {"color": COLORS[color], "marker": marker, "capsize": 2}
            if one["writer"] == HALF_TRAINED:
                style["markerfacecolor"] = "white"
            axis.errorbar(mean, position, xerr=half_width, **style)
        axis.set_yticks(range(len(kinds_of_writer)), [name_of(one) for one in kinds_of_writer])
        by = "" if judge in BY_RULES else f"\n{judge}"
        axis.set_xlabel(QUANTITIES[quantity] + by, fontsize=7)
        if quantity.endswith("_share"):
            axis.set_xlim(-0.04, 1.04)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    first = table.iloc[0]
    figure.suptitle(f"{first['corpus']}, {first['stories']} stories from each writer; 95% intervals", fontsize=7)
    save(figure, RESULTS / corpus / f"{EXPERIMENT}.png")
    write_text(path := RESULTS / corpus / f"{EXPERIMENT}.md", markdown(table))
    print(f"wrote {path}")
