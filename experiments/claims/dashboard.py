"""A saved workspace in Weights & Biases with the panels of the report, for someone who is logged in.

    pip install 'vocabfold[dashboards]' && wandb login
    wandb sync results/runs/*/*/*/wandb/offline-run-*
    python -m experiments dashboard draw [CORPUS]

The panels show what the mirrors of the runs hold (vocabfold/runs/record.py): curves while training, and the tables' own
values, which stand in a run's summary as result.COLUMN. WANDB_ENTITY and WANDB_PROJECT (vocabfold) choose where it is
saved; with WANDB_MODE=offline what would be sent is printed and nothing is sent.
"""

from __future__ import annotations

import json
import os
from typing import Any

from vocabfold.errors import UserError
from vocabfold.runs.record import RESULT

CORPORA = ("",)  # without a name: the runs of all texts
NAME = "vocabfold: the report"
# A section for each part of the report: its title, with the experiments that it is about, and its panels as (kind, what
# is drawn, against what): a curve a head, a bar a group of runs, or a point a run. A workspace has one list of runs;
# they stand grouped by corpus/experiment (heads_scaling: /head) there, so that the others can be hidden.
# What a run logs once, at its end, is one point of the curve of its head: with "curve of runs" a logarithmic axis.
CURVE, CURVE_OF_RUNS, BAR, POINT = "curve", "curve of runs", "bar", "point"
SECTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Loss against training tokens by head (heads_scaling)": (
        (CURVE_OF_RUNS, "validation_loss_nats", "tokens"),
        (CURVE_OF_RUNS, "validation_group_loss", "tokens"),
        (CURVE_OF_RUNS, "validation_token_loss", "tokens"),
        (CURVE, "train_loss", "tokens"),
    ),
    "On par with GPT-2 and GPT-Neo (main_comparison)": (
        (CURVE, "validation_loss_nats", "step"),
        (BAR, "validation_loss_nats", "head.name"),
        (BAR, "tokens_per_second", "head.name"),
        (BAR, "peak_memory_gib", "head.name"),
    ),
    "Figure 3: memory and loss against group size (figure3_group_size)": (
        (POINT, "validation_loss_nats", "group_size"),
        (POINT, "peak_memory_gib", "group_size"),
        (POINT, "group_accuracy", "group_size"),
    ),
    "Which head, which order (heads_pareto, order_matters)": (
        (CURVE, "validation_loss_nats", "tokens"),
        (BAR, "perplexity", "head.name"),
        (POINT, "validation_loss_nats", "flops_per_token"),
        (BAR, "group_accuracy", "head.name"),
    ),
    "Vocabulary size (vocabulary_scaling)": ((POINT, "excess_loss_nats", "vocabulary_size"),),
    "Figures 2, 6 and 7: the image study (shapes)": (
        (CURVE, "validation_accuracy", "step"),
        (CURVE, "train_loss", "step"),
        (CURVE, "validation_group_accuracy", "step"),
    ),
    "Compressed embeddings (embedding_compression, both_ends)": (
        (POINT, "validation_loss_nats", "embedding_compression"),
        (POINT, "validation_loss_nats", "model_bytes"),
        (BAR, "embedding_relative_error", "embedding.name"),
    ),
    "Folded heads (fold)": ((POINT, "perplexity", "distillation_tokens"), (POINT, "perplexity", "at_once_perplexity")),
}


def workspace(entity: str, project: str, corpus: str) -> Any:
    """The Workspace object; nothing is sent. Raises UserError where wandb-workspaces is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("a workspace needs wandb-workspaces: pip install 'vocabfold[dashboards]'") from error

    def panel(kind: str, column: str, against: str) -> Any:
        value = panels.SummaryMetric(f"{RESULT}.{column}")
        if kind in (CURVE, CURVE_OF_RUNS):
            axis, of_runs = "Step" if against == "step" else against, kind == CURVE_OF_RUNS
            by = panels.Config("head.name")
            return panels.LinePlot(title=column, x=axis, y=[column], groupby=by, log_x=of_runs or None)
        if kind == BAR:
            by = panels.Config(against)
            return panels.BarPlot(title=f"{column} by {against}", metrics=[value], groupby=by, groupby_aggfunc="mean")
        x = panels.SummaryMetric(f"{RESULT}.{against}")
        return panels.ScatterPlot(title=f"{column} against {against}", x=x, y=value)

    chosen = [workspaces.Tags("tags").isin([f"corpus:{corpus}"])] if corpus else []
    columns = [f"summary:{RESULT}.{name}" for name in ("validation_loss_nats", "perplexity", "peak_memory_gib")]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"{NAME}, {corpus}" if corpus else NAME,
        sections=[
            workspaces.Section(name=title, panels=[panel(*one) for one in ones], is_open=True)
            for title, ones in SECTIONS.items()
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=chosen,
            groupby=[workspaces.Metric("Group"), workspaces.Metric("JobType")],
            pinned_columns=["run:displayName", *columns],
        ),
    )


def specification(built: Any) -> dict[str, Any]:
    """What would be sent, as JSON has it."""
    plain: dict[str, Any] = json.loads(built._model.model_dump_json(by_alias=True, exclude_none=True))
    return plain


def entity_of_login(named: str | None) -> str:
    """The entity to save for. Raises UserError where nobody is logged in."""
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
        entity = named or (wandb.Api().default_entity if logged_in else None)
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"Weights & Biases does not answer ({error}): check the network and `wandb login`") from error
    if not logged_in or not entity:
        raise UserError(
            "nobody is logged in to Weights & Biases: run `wandb login` first, or set WANDB_MODE=offline to see it"
        )
    return entity


def draw(corpus: str) -> None:
    """Save the workspace, with the runs of one text or, for "", of all; with WANDB_MODE=offline print what would be
    sent."""
    project = os.environ.get("WANDB_PROJECT", "vocabfold")
    if os.environ.get("WANDB_MODE") == "offline":
        built = workspace(os.environ.get("WANDB_ENTITY", "ENTITY"), project, corpus)
        print(json.dumps(specification(built), indent=1))
        return
    built = workspace(entity_of_login(os.environ.get("WANDB_ENTITY")), project, corpus)
    print(f"saved {built.save().url}")
