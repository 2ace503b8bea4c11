"""The configuration that a command line of the training program stands for, composed from conf/ by Hydra."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from omegaconf import DictConfig

from vocabfold.errors import UserError
from vocabfold.runs.settings import CONFIG_FOLDER, Settings, settings_from

GROUP = re.compile(r"[+~]*(?P<name>[A-Za-z_]\w*(?:/\w+)*)(?:@[^=]*)?(?:=|$)")
ALWAYS_CHOSEN = ("experiment", "data")  # what an experiment does differently on one text is found by both names


def composed(words: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """What ``vocabfold.train WORDS`` would run; with ``with_hydra`` Hydra's own part too, such as what an experiment
    sweeps over. Raises UserError or an error of Hydra for words that cannot be composed."""
    check_groups(words)
    GlobalHydra.instance().clear()  # of a program that was Hydra's before
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose("train", list(words), return_hydra_config=with_hydra)


def composed_settings(words: Sequence[str]) -> Settings:
    """The same as checked settings."""
    return settings_from(composed(words))


def check_groups(words: Sequence[str]) -> None:
    """Raise UserError for a word such as head=null, which Hydra answers with a traceback, or data=[text,zipf], which
    chooses two where there is one: an option of a group in conf/ is chosen by its name, or its keys are set."""
    for word in words:
        match = GROUP.match(word)
        if not match or not (match["name"].startswith("hydra/") or (CONFIG_FOLDER / match["name"]).is_dir()):
            continue
        override = OverridesParser.create().parse_override(word)
        if override.is_delete():
            if match["name"] in ALWAYS_CHOSEN:
                raise UserError(f"{word} leaves a run without {match['name']}: leave {word} out")
        elif not all(isinstance(option, str | QuotedString | dict) for option in _options(override)):
            names = sorted(path.stem for path in (CONFIG_FOLDER / match["name"]).glob("*.yaml"))
            raise UserError(f"there is no {word}: choose one of {', '.join(names) or 'its options'}, or leave it out")


def _options(override: Override) -> list[object]:
    """What is chosen, one after the other where a sweep chooses several."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return list(value.list)
    return [] if isinstance(value, Glob) else [value]
