"""The typed settings of one training run, checked before anything is loaded. conf/ holds every default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vocabfold.embeddings import EmbeddingSettings
from vocabfold.errors import UserError
from vocabfold.files import read_yaml_mapping
from vocabfold.heads import HeadSettings
from vocabfold.models.build import ModelSettings
from vocabfold.runs.tables import RESULTS, read_table

if TYPE_CHECKING:
    import pandas as pd

# the largest seed that every generator of random numbers takes
MOST_SEED = 2**63 - 1
CONFIG_FOLDER = Path(__file__).resolve().parents[3] / "conf"
UNTUNED_RATE = 3.0e-3  # of heads_scaling where nothing was tuned
NOT_IN_NAMES = ("/", "\\", "\0")


@dataclass
class OptimizerSettings:
    """Adam or AdamW; ``learning_rate`` rises over ``warmup_steps``, then stays or falls as a cosine to
    ``final_fraction`` of itself; gradients are clipped to norm ``gradient_clip`` (None: not at all)."""

    name: str = MISSING
    learning_rate: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    gradient_clip: float | None = None
    schedule: str = MISSING
    warmup_steps: int = MISSING
    final_fraction: float = MISSING


@dataclass
class BudgetSettings:
    """Where training ends: at the first of these that is reached; None does not limit."""

    epochs: float | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None


@dataclass
class StartSettings:
    """What a run starts from: ``type`` none (fresh weights), fold or compress, and for these ``run``, the folder of a
    finished run. ``share``: for how much of that run's tokens a compressed one is trained on."""

    type: str = "none"
    run: str | None = field(default=None, metadata={"folder": True})
    share: float = 0.0


@dataclass
class WandbSettings:
    """How metrics are mirrored to Weights & Biases: offline, online or disabled."""

    mode: str = MISSING
    project: str = MISSING
    entity: str | None = None
    group: str | None = None  # what runs stand together as; None: corpus/experiment


@dataclass
class Settings:
    """One training run. conf/train.yaml says what each key means."""

    experiment: str = MISSING
    seed: int = MISSING
    run: str = ""  # which one it is, see identity.py: nobody sets it
    run_dir: str = ""
    data: dict[str, Any] = MISSING
    development_share: float = MISSING
    training_tokens: int | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    start: StartSettings = field(default_factory=StartSettings)
    sequence_length: int = MISSING
    batch_size: int = MISSING
    gradient_accumulation: int = MISSING
    evaluation_batch_size: int = MISSING
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluate_every: int | None = None
    log_every: int = MISSING
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    device: str = MISSING
    parallel: str = "ddp"
    precision: str = MISSING
    compile: bool = MISSING
    wandb: WandbSettings = field(default_factory=WandbSettings)

    @property
    def corpus(self) -> str:
        """What tables, figures and folders call the text."""
        return corpus_of(self.data)

    def check(self) -> None:
        """Raise UserError for the first setting that no run can have."""
        refuse_infinite("", dataclasses.asdict(self))
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed is {self.seed}: choose 0 or more, at most 2**63 - 1")
        if self.head.init_std is not None and self.head.init_std < 0:
            raise UserError(f"head.init_std is {self.head.init_std}: choose 0 or more")
        for name in ("sequence_length", "batch_size", "gradient_accumulation", "evaluation_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose at least 1")
        if not 0 <= self.development_share < 1:
            raise UserError(f"development_share is {self.development_share}: choose 0 (none) or more, less than 1")
        for name in ("training_tokens", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose at least 1, or null")
        if self.checkpoint_minutes is not None and self.checkpoint_minutes < 0:
            raise UserError(f"checkpoint_minutes is {self.checkpoint_minutes}: choose 0 or more, or null for never")
        limits = {key: value for key, value in vars(self.budget).items() if value is not None}
        if not limits:
            raise UserError("training has no end: set budget.epochs, budget.steps, budget.tokens or budget.seconds")
        for key, value in limits.items():
            # A run made from a finished one may be wanted as it is, without a step of training.
            if value < 0 or (value == 0 and self.start.type == "none"):
                raise UserError(f"budget.{key} is {value}: choose more than 0")
        corpus_of(self.data)
        if self.model.max_positions < self.sequence_length:
            raise UserError(
                f"model.max_positions {self.model.max_positions} is less than sequence_length {self.sequence_length}: "
                "raise the first or lower the second"
            )
        if self.data.get("image_size") != self.model.image_size:
            raise UserError("pictures and their network need each other: use model=cnn with data=shapes, or neither")
        if not self.optimizer.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate is {self.optimizer.learning_rate}: choose more than 0")
        if len(self.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise UserError(
                f"optimizer.betas is {self.optimizer.betas}: choose two numbers, at least 0 and less than 1"
            )
        if self.optimizer.gradient_clip is not None and not self.optimizer.gradient_clip > 0:
            raise UserError(f"optimizer.gradient_clip is {self.optimizer.gradient_clip}: choose more than 0, or null")
        for name in ("weight_decay", "warmup_steps", "final_fraction"):
            if not getattr(self.optimizer, name) >= 0:
                raise UserError(f"optimizer.{name} is {getattr(self.optimizer, name)}: choose 0 or more")
        choose("start.type", self.start.type, ("none", "fold", "compress"))
        if (self.start.type == "none") != (self.start.run is None):
            raise UserError("start=fold and start=compress begin from a finished run: set start.run=FOLDER with them")
        if not 0 <= self.start.share <= 1:
            raise UserError(f"start.share is {self.start.share}: choose a number from 0 to 1")
        choose("optimizer.name", self.optimizer.name, ("adam", "adamw"))
        choose("optimizer.schedule", self.optimizer.schedule, ("constant", "cosine"))
        choose("precision", self.precision, ("fp32", "bf16", "fp16"))
        choose("parallel", self.parallel, ("ddp", "fsdp"))
        if self.parallel == "fsdp" and (self.start.type == "fold" or self.model.image_size is not None or self.compile):
            raise UserError("parallel=fsdp takes language models, without start=fold and compile: use parallel=ddp")
        choose("wandb.mode", self.wandb.mode, ("offline", "online", "disabled"))

    def total_steps(self, batches_per_epoch: int, targets_per_batch: int) -> int | None:
        """Optimizer steps until the first budget of epochs, steps or tokens is used up; None if only time ends it."""
        limits = []
        if self.budget.steps is not None:
            limits.append(self.budget.steps)
        if self.budget.epochs is not None:
            limits.append(int(self.budget.epochs * batches_per_epoch / self.gradient_accumulation))
        if self.budget.tokens is not None:
            limits.append(math.ceil(self.budget.tokens / (targets_per_batch * self.gradient_accumulation)))
        if not limits:
            return None
        return 0 if min(limits) == 0 and self.start.type != "none" else max(1, min(limits))


def refuse_infinite(key: str, value: Any) -> None:
    """Raise UserError, with its key, for a number in ``value`` that is not finite; ``key`` is that of ``value``."""
    if isinstance(value, dict):
        for name, part in value.items():
            refuse_infinite(f"{key}.{name}" if key else str(name), part)
    elif isinstance(value, list):
        for part in value:
            refuse_infinite(key, part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value}: choose a finite number")


def choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{key} is {value!r}: choose one of {', '.join(choices)}")


def settings_from(config: DictConfig) -> Settings:
    """Check keys and types, then the values. Raises UserError or an OmegaConf error with a one-line message."""
    plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    settings = OmegaConf.to_object(OmegaConf.merge(_schema(), plain))
    assert isinstance(settings, Settings)
    settings.check()
    return settings


@cache
def _schema() -> DictConfig:
    """Every key with its type: half of the time of a check, if it were made each time. Merging copies it."""
    return OmegaConf.structured(Settings)


def refuse_interpolation(value: Any, path: Path) -> None:
    """Raise UserError where the content of ``path`` has a ${..}, which would read the environment or other keys."""
    if isinstance(value, dict):
        for key, part in value.items():
            refuse_interpolation(key, path)
            refuse_interpolation(part, path)
    elif isinstance(value, list):
        for part in value:
            refuse_interpolation(part, path)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{path} holds {value!r}, which no run writes: put the value itself in its place")


def load_settings(run_folder: Path) -> Settings:
    """The settings of a run from its config.yaml (plain YAML: nothing in it is executed or looked up).
    Raises UserError."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_folder} holds no config.yaml: name the folder of a training run")
    content = read_yaml_mapping(path)
    refuse_interpolation(content, path)
    try:
        return settings_from(OmegaConf.create(content))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is of another version ({reason}): delete the run folder and train again") from error


def corpus_of(data: Mapping[str, Any]) -> str:
    """What tables, figures and folders call the text of a conf/data node. Raises UserError where no folder can have
    that name."""
    name = str(data.get("label") or data.get("name"))
    if any(part in name for part in NOT_IN_NAMES) or name.startswith("."):
        raise UserError(f"data.label is {name!r}: choose a name that a folder can have, such as tinystories")
    return name


def chosen_learning_rate(corpus: str, head: str) -> float:
    """The learning rate with which ``head`` did best in results/CORPUS/learning_rates.csv, which is evaluated on
    held-out training documents. Raises UserError where that table does not have it."""
    rates = read_table("learning_rates", corpus)
    rates = rates[rates["head"] == head]
    if rates.empty:
        raise UserError(
            f"results/{corpus}/learning_rates.csv has no {head}: train experiment=learning_rates head={head} first, "
            "or set optimizer.learning_rate"
        )
    means = rates.groupby("learning_rate", as_index=False)["validation_loss_nats"].mean()
    return float(means.loc[means["validation_loss_nats"].idxmin(), "learning_rate"])


def scaling_learning_rate(corpus: str, head: str, hidden_size: int, tokens: float) -> float:
    """The learning rate of a run of heads_scaling over ``tokens``, by the rule that holds between tuned budgets.

    results/CORPUS/scaling_learning_rates.csv says for some heads and sizes which rate did best at which budget on
    held-out training documents. Between two budgets the logarithm of the rate lies on a straight line over the
    logarithm of the tokens; below the first and beyond the last the rate stays; it is rounded to two figures. A head or
    size that the table does not have gets UNTUNED_RATE.
    """
    return rate_by_rule(scaling_rates(corpus), head, hidden_size, tokens)


def scaling_rates(corpus: str) -> dict[tuple[str, int], dict[float, float]]:
    """``best_scaling_rates`` of a text, of which nothing may be tuned."""
    if not (RESULTS / corpus / "scaling_learning_rates.csv").is_file():
        return {}
    return best_scaling_rates(read_table("scaling_learning_rates", corpus))


def rate_by_rule(
    best: Mapping[tuple[str, int], Mapping[float, float]], head: str, hidden_size: int, tokens: float
) -> float:
    """``scaling_learning_rate`` from what ``scaling_rates`` found."""
    if not (found := best.get((head, hidden_size))):
        return UNTUNED_RATE
    budgets = sorted(found)
    logs = np.interp(math.log(tokens), [math.log(one) for one in budgets], [math.log(found[one]) for one in budgets])
    return float(f"{math.exp(logs):.2g}")


def best_scaling_rates(table: pd.DataFrame) -> dict[tuple[str, int], dict[float, float]]:
    """{(head, hidden size): {tokens: the rate with the least mean loss there}} of a table of scaling_learning_rates.
    Raises UserError for a table of another version."""
    if missing := [name for name in ("training_tokens", "epochs") if name not in table.columns]:
        raise UserError(f"scaling_learning_rates.csv has no column {missing[0]}: another version wrote it")
    best: dict[tuple[str, int], dict[float, float]] = {}
    table = table.assign(budget=table["training_tokens"] * table["epochs"])
    for (head, size, budget), rows in table.groupby(["head", "hidden_size", "budget"]):
        means = rows.groupby("learning_rate")["validation_loss_nats"].mean()
        best.setdefault((str(head), int(float(str(size)))), {})[float(str(budget))] = float(str(means.idxmin()))
    return best


def rate_of_scaling_run(_root_: DictConfig) -> float:
    """``scaling_learning_rate`` of the run that a configuration describes."""
    tokens = tokens_to_train(_root_)
    return scaling_learning_rate(corpus_of(_root_.data), _root_.head.name, _root_.model.hidden_size, tokens)


def tokens_to_train(_root_: DictConfig) -> float:
    """``training_tokens`` times how often they are read; once where epochs do not end the training. Raises UserError
    where they are not set."""
    if _root_.training_tokens is None:
        raise UserError("this experiment counts its steps from training_tokens: set it, at most to the text's length")
    return float(_root_.training_tokens * (_root_.budget.epochs or 1))


def model_has_tokens(_root_: DictConfig) -> bool:
    """Whether the model reads tokens, through an embedding whose rows a head may share, and no pictures."""
    return "image_size" not in _root_.model


def share_of_steps(share: float, _root_: DictConfig) -> int:
    """The optimizer steps that are ``share`` of a run over ``training_tokens``. Raises UserError where those are not
    set."""
    tokens_a_step = _root_.batch_size * _root_.sequence_length * _root_.gradient_accumulation
    return round(share * tokens_to_train(_root_) / tokens_a_step)


OmegaConf.register_new_resolver("corpus", lambda _root_: corpus_of(_root_.data), replace=True)
OmegaConf.register_new_resolver("chosen_learning_rate", chosen_learning_rate, replace=True)
OmegaConf.register_new_resolver("model_has_tokens", model_has_tokens, replace=True)
OmegaConf.register_new_resolver("scaling_learning_rate", rate_of_scaling_run, replace=True)
OmegaConf.register_new_resolver("share_of_steps", share_of_steps, replace=True)
