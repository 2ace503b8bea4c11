"""Losses of documents in the cells of a table, and how much one row of it loses more than another, with an interval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.study.statistics import Interval, paired_bootstrap


def loss_columns(losses: pd.DataFrame) -> dict[str, Any]:
    """Of ``loss.document_losses``: the mean, and each document's tokens and summed loss in one cell each, since there
    are many rows."""
    return {
        "documents": len(losses),
        "tokens": int(losses["tokens"].sum()),
        "loss_nats": losses["loss_nats"].sum() / losses["tokens"].sum(),
        "document_tokens": " ".join(map(str, losses["tokens"])),
        "document_loss_nats": " ".join(f"{loss:.4f}" for loss in losses["loss_nats"]),
    }


def numbers_in(cell: Any) -> np.ndarray:
    """The numbers of one such cell."""
    return np.array([float(number) for number in str(cell).split()])


def change_of(row: pd.Series, reference: pd.Series) -> Interval:
    """The loss of one row above that of another on the same documents, nats a token, with its 95% interval."""
    losses, before = (numbers_in(each["document_loss_nats"]) for each in (row, reference))
    return paired_bootstrap(losses, before, numbers_in(row["document_tokens"]))
