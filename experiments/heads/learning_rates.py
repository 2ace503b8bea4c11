"""The learning rate of each head, chosen on held-out training text: the table that other experiments read it from.

python -m vocabfold.train --multirun experiment=learning_rates
python -m experiments learning_rates measure
"""

from __future__ import annotations

from argparse import Namespace

from experiments.study.measuring import add_settings, collect_runs

add_options = add_settings


def measure(arguments: Namespace) -> None:
    """Gather the finished training runs into results/CORPUS/learning_rates.csv."""
    collect_runs("learning_rates", arguments.settings)
