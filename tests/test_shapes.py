"""The image set: every picture reproducible, drawn ahead or not; the network; the training program on pictures."""

from __future__ import annotations

import csv
import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.paper.lookalikes import find_lookalikes
from experiments.study.curves import read_curves

from run_cases import PICTURES, call
from vocabfold import train
from vocabfold.data.batches import BatchPlan
from vocabfold.data.composing import Undrawn, chances
from vocabfold.data.drawing import ATTRIBUTES, LETTERS, classes_of, draw, picture
from vocabfold.data.shapes import Shapes, load_shapes
from vocabfold.errors import UserError
from vocabfold.heads import HeadSettings
from vocabfold.models.build import ModelSettings, build_model
from vocabfold.models.cnn import CNN
from vocabfold.runs.record import collect
from vocabfold.tokens import IGNORE_INDEX

REPOSITORY = Path(__file__).parents[1]
# No two of these look alike, and no two pictures have the same noise.
FEW = {"shape": ["pentagon", "star"], "pattern": ["solid"], "size": ["huge"], "texture": ["noise"], "opacity": [1.0]}
FEW |= {"colour": ["red", "teal", "lime"], "border": ["solid"]}
DATA: dict[str, Any] = {
    "name": "shapes",
    "image_size": 24,
    "attributes": FEW,
    "train_images_per_class": 3,
    "valid_images_per_class": 1,
    "seed": 5,
    "workers": 0,
}


def still(attributes: dict[str, str | int | float], side: int = 48, noise: int = 0) -> np.ndarray:
    return draw(attributes, side, (0, 0), "A", np.random.default_rng(noise))


def test_the_classes_are_those_of_the_published_table() -> None:
    with (REPOSITORY / "results" / "paper" / "table4_attributes.csv").open() as file:
        published = {row["attribute"]: row["options"].split(";") for row in csv.DictReader(file)}
    assert {name: [str(option) for option in options] for name, options in ATTRIBUTES.items()} == published
    classes = classes_of({})
    assert len(classes) == 184_320
    numbers = [0, 1, 2, 8, 30_719, 184_319]
    assert classes.attributes(1) == classes.attributes(0) | {"border": "dashed"}
    assert len({tuple(classes.attributes(number).values()) for number in numbers}) == len(numbers)
    few = classes_of(FEW)
    everything = {tuple(few.attributes(label).values()) for label in range(len(few))}
    assert len(everything) == len(few) == 2 * 6 * 3


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"form": ["circle"]}, "unknown data.attributes.form: choose among shape, pattern"),
        ({"shape": ["blob"]}, r"data.attributes.shape is \['blob'\]: choose among circle, square"),
        ({"size": []}, r"data.attributes.size is \[\]"),
        ({"size": ["huge", "huge"]}, "data.attributes.size is"),
    ],
)
def test_attributes_that_do_not_exist_are_refused(chosen: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classes_of(chosen)


def test_a_picture_depends_on_seed_and_number_alone() -> None:
    classes = classes_of({})
    first = picture(classes, 3, 1_234_567, 100)
    assert first.shape == (100, 100, 3) and first.dtype == np.uint8
    picture(classes, 3, 7, 100)
    assert np.array_equal(first, picture(classes, 3, 1_234_567, 100))
    assert not np.array_equal(first, picture(classes, 4, 1_234_567, 100))
    assert not np.array_equal(first, picture(classes, 3, 1_234_567 + len(classes), 100))  # the same class once more


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_option_of_every_attribute_shows(attribute: str) -> None:
    base = classes_of({}).attributes(0) | {"shape": "pentagon", "pattern": "striped", "size": "large", "opacity": 0.75}
    drawn = {still(base | {attribute: option}, 100).tobytes() for option in ATTRIBUTES[attribute]}
    assert len(drawn) == len(ATTRIBUTES[attribute])


def test_every_letter_can_be_read_and_the_figure_stays_within_the_picture() -> None:
    base = classes_of({}).attributes(0) | {"size": "huge", "opacity": 1.0}
    pictures = {draw(base, 100, (0, 0), letter, np.random.default_rng(0)).tobytes() for letter in LETTERS}
    assert len(pictures) == len(LETTERS)
    moved = draw(base, 100, (6, -6), "A", np.random.default_rng(0))
    edge = np.concatenate([moved[0], moved[-1], moved[:, 0], moved[:, -1]])
    assert (edge == 255).all()


def test_lookalikes_follow_from_the_symmetries_of_the_figures() -> None:
    chosen = {"colour": ["red"], "size": ["huge"], "texture": ["none"], "opacity": [1.0], "border": ["solid", "dashed"]}
    for shape, different in (("circle", 1), ("square", 3), ("triangle", 2), ("hexagon", 1), ("star", 6), ("cross", 3)):
        found = find_lookalikes(classes_of({**chosen, "shape": [shape], "pattern": ["solid"]}), 100)
        assert len(set(found.alike.tolist())) == 2 * different, shape
        assert found.best_accuracy() == pytest.approx(different / 6)
    striped = find_lookalikes(classes_of({**chosen, "shape": ["circle"], "pattern": ["striped"]}), 100)
    assert striped.best_accuracy() == pytest.approx(3 / 6)  # stripes come back after half a turn
    # All six turns in one group: the group can be named though the class cannot.
    circle = find_lookalikes(classes_of({**chosen, "shape": ["circle"], "pattern": ["solid"]}), 100)
    assert circle.best_accuracy(np.zeros(12, int)) == 1
    assert circle.best_accuracy(np.arange(12)) == circle.best_accuracy()
    assert circle.by_option("border") == {"solid": 0.0, "dashed": 0.0}


def test_lookalikes_are_the_classes_that_are_drawn_alike() -> None:
    chosen = {"shape": ["circle", "square"], "pattern": ["solid", "dotted"], "size": ["tiny", "huge"]}
    classes = classes_of({**chosen, "colour": ["red", "lime"], "opacity": [0.25, 1.0], "border": ["dashed"]})
    first: dict[bytes, int] = {}
    drawn = [first.setdefault(still(classes.attributes(label)).tobytes(), label) for label in range(len(classes))]
    assert 1 < len(set(drawn)) < len(classes)
    assert find_lookalikes(classes, 48).alike.tolist() == drawn


def numbers_of(shapes: Shapes, pictures: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Which pictures of the sequence a batch holds."""
    drawn = {
        picture(shapes.classes, shapes.seed, number, shapes.image_size).tobytes(): number
        for number in range(shapes.num_train + shapes.num_valid)
    }
    numbers = [drawn[one.permute(1, 2, 0).contiguous().numpy().tobytes()] for one in pictures]
    assert [number % shapes.vocabulary_size for number in numbers] == labels.tolist()
    return numbers


def test_an_epoch_has_every_picture_once_and_validation_has_its_own() -> None:
    shapes = load_shapes(DATA)
    batches = shapes.batches("train", BatchPlan(1, 9, seed=1))
    assert batches.batches_per_epoch == 12 and batches.targets_per_batch == 9
    epochs = [[numbers_of(shapes, *batches.batch(12 * epoch + index)) for index in range(12)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(chain.from_iterable(epoch)) == list(range(108))
    assert epochs[0] != epochs[1]
    again = shapes.batches("train", BatchPlan(1, 9, seed=1)).batch(17)
    assert numbers_of(shapes, *again) == epochs[1][5]
    valid = shapes.batches("valid", BatchPlan(1, 10, seed=1))
    seen = [numbers_of(shapes, *batch) for batch in valid.evaluation_batches()]
    assert [len(numbers) for numbers in seen] == [10, 10, 10, 6]
    assert list(chain.from_iterable(seen)) == list(range(108, 144))


def test_ranks_share_every_batch() -> None:
    shapes = load_shapes(DATA)
    whole = shapes.batches("train", BatchPlan(1, 12, seed=1)).batch(14)[1].tolist()
    parts = [shapes.batches("train", BatchPlan(1, 12, 1, rank, 3)).batch(14)[1].tolist() for rank in range(3)]
    assert [parts[index % 3][index // 3] for index in range(12)] == whole
    # 36 validation pictures in batches of 35: the last one has a picture for the first rank only.
    last = [list(shapes.batches("valid", BatchPlan(1, 35, 1, rank, 5)).evaluation_batches())[-1] for rank in range(5)]
    assert [labels.tolist() for _, labels in last] == [[35]] + [[IGNORE_INDEX]] * 4


def test_workers_draw_the_same_pictures() -> None:
    here, there = (load_shapes(DATA | {"workers": workers}).batches("train", BatchPlan(1, 8, 2)) for workers in (0, 1))
    for index in (11, 12, 13, 14, 2):  # over the end of an epoch, and back
        for one, other in zip(here.batch(index), there.batch(index), strict=True):
            assert torch.equal(one, other)


def test_pictures_put_together_on_the_device_are_the_same_to_the_last_pixel() -> None:
    classes, numbers = classes_of({}), np.random.default_rng(3).integers(2_000_000, size=64)
    for side in (100, 37):
        made = Undrawn(classes, side, chances(classes, 4, numbers, side)).to(torch.device("cpu"))
        assert made.dtype == torch.uint8 and made.is_contiguous(memory_format=torch.channels_last)
        for row, number in enumerate(numbers.tolist()):
            assert np.array_equal(made[row].permute(1, 2, 0).numpy(), picture(classes, 4, number, side)), number


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_put_together_on_the_device_has_the_same_batches(workers: int) -> None:
    mixed = DATA | {"attributes": FEW | {"texture": ["none", "noise"]}}
    made = load_shapes(mixed | {"on_device": True, "workers": workers})
    drawn, plan = load_shapes(mixed), BatchPlan(1, 50, seed=2)
    for split in ("train", "valid"):
        parts = [shapes.batches(split, plan) for shapes in (made, drawn)]
        batches, expected = ([part.batch(3)] if split == "train" else part.evaluation_batches() for part in parts)
        for (undrawn, labels), (pictures, classes) in zip(batches, expected, strict=True):
            assert torch.equal(undrawn.to(torch.device("cpu")), pictures.to("cpu")) and torch.equal(labels, classes)


@pytest.mark.parametrize(
    "change",
    [{"image_size": 8}, {"train_images_per_class": 0}, {"valid_images_per_class": 0}, {"seed": -1}, {"workers": -1}],
)
def test_settings_that_no_set_has_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=rf"data\.{next(iter(change))} is "):
        load_shapes(DATA | change)


@pytest.mark.parametrize("half", ["model=cnn", "data=shapes"])
def test_pictures_and_their_network_need_each_other(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], half: str
) -> None:
    assert call(train.main, monkeypatch, "budget=steps_2", half) == 2
    written = capfd.readouterr().err
    assert "data.image_size" in written or "use model=cnn with data=shapes" in written
    assert "Traceback" not in written


def test_the_network_is_the_published_one() -> None:
    with torch.device("meta"):
        network = CNN(512, 3, 100)
    shapes = [tuple(parameter.shape) for parameter in network.parameters() if parameter.ndim > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (512, 18_432)]
    pictures = torch.randint(256, (2, 3, 25, 25), dtype=torch.uint8)
    hidden = CNN(20, 2, 25).double()(pictures)
    assert hidden.shape == (2, 20) and (hidden >= 0).all()
    with pytest.raises(UserError, match="lower model"):
        CNN(8, 5, 24)


@pytest.mark.parametrize("head", [HeadSettings(tied=False), HeadSettings(type="folded", tied=False)])
def test_accuracy_is_that_of_the_likeliest_class(head: HeadSettings) -> None:
    torch.manual_seed(0)
    settings = ModelSettings(name="cnn", hidden_size=16, num_layers=2, image_size=16)
    model = build_model(settings, head, 7).double()
    pictures = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    targets = torch.randint(7, (40,))
    targets[::5] = IGNORE_INDEX
    output = model(pictures, targets, with_accuracy=True, with_exact_accuracy=True)
    log_prob = model.head.log_prob(model.backbone(pictures))
    counted = targets != IGNORE_INDEX
    expected = (log_prob.argmax(-1) == targets)[counted].double().mean()
    assert 0 < expected < 1
    assert float(output.parts["accuracy"]) == pytest.approx(float(expected))
    assert float(model.head.accuracy(model.backbone(pictures), targets)) == pytest.approx(float(expected))
    with pytest.raises(UserError, match=r"head\.tied=false"):
        build_model(settings, HeadSettings(tied=True), 7)


@pytest.mark.parametrize("head", ["full", "paper"])
def test_both_heads_learn_pictures_and_leave_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], head: str
) -> None:
    monkeypatch.chdir(tmp_path)
    budget = ["budget.steps=24", "evaluate_every=12", "log_every=6", "batch_size=16", "optimizer.learning_rate=0.005"]
    status = call(train.main, monkeypatch, *PICTURES, "experiment=shapes", f"head={head}", *budget)
    assert status == 0, capfd.readouterr().err
    (path,) = tmp_path.glob("results/runs/shapes/shapes/*/row.json")
    row = json.loads(path.read_text())
    assert row["tied"] is False and row["model"] == "cnn" and row["tokens"] == 24 * 16
    assert row["validation_loss_nats"] < math.log(16) and row["validation_accuracy"] > 2 / 16
    assert (row["group_accuracy"] is None) == (head == "full")
    collect("shapes", "shapes")
    curves = read_curves("shapes", "shapes")
    assert curves["step"].tolist() == [6, 12, 18, 24]
    assert curves["validation_accuracy"].notna().tolist() == [False, True, False, True]
    assert curves["validation_accuracy"].iloc[-1] == pytest.approx(row["validation_accuracy"], rel=1e-4)
