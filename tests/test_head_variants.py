"""The table of a head's variants: ranked by loss, each against the linear head over the seeds that both have."""

from __future__ import annotations

import re

import pandas as pd
import yaml
from experiments.heads.head_variants import BASE, VARIANTS, markdown

from figure_cases import run_row
from vocabfold.runs.settings import CONFIG_FOLDER


def row(head: str, seed: int, loss: float, tokens: int) -> dict[str, object]:
    losses = {"validation_loss_nats": loss, "validation_group_loss": loss / 2, "validation_token_loss": loss / 2}
    return run_row("gpt2", head, 225, seed, tokens=tokens, **losses)


def test_variants_are_ranked_and_compared_over_common_seeds() -> None:
    rows = [row(BASE, 0, 6.6, 10**6), row(BASE, 1, 6.8, 10**6), row("conditioned_wide", 0, 6.5, 10**6)]
    rows += [row("conditioned_narrow", 0, 6.25, 4 * 10**6)]
    mixture = row("mixture_clustered", 1, 6.9, 10**6) | {"validation_group_loss": None, "validation_token_loss": None}
    lines = [line.strip("| ").split(" | ") for line in markdown(pd.DataFrame([*rows, mixture])).splitlines()]
    told = {(line[0], line[1]): line[3:] for line in lines if len(line) > 6}
    assert [key[1] for key in list(told)[1:]] == [
        "`conditioned_wide`",
        f"`{BASE}`",
        "`mixture_clustered`",
        "`conditioned_narrow`",
    ]
    assert told["1.00 M", "`conditioned_wide`"] == ["6.5000", "3.2500", "3.2500", "-0.1000", "1"]
    assert told["1.00 M", f"`{BASE}`"] == ["6.7000", "3.3500", "3.3500", "", "2"]
    assert told["1.00 M", "`mixture_clustered`"] == ["6.9000", "", "", "+0.1000", "1"]
    assert told["4.00 M", "`conditioned_narrow`"][3] == ""


def test_every_variant_is_swept_or_its_settings_are_told() -> None:
    text = (CONFIG_FOLDER / "experiment" / "head_variants.yaml").read_text()
    swept = yaml.safe_load(text)["hydra"]["sweeper"]["params"]["head"].split(",")
    named = re.findall(r"^#.* head\.name=(\w+)$", text, re.MULTILINE)
    assert sorted([*swept, *named]) == sorted(VARIANTS)
