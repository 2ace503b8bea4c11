"""Compression of finished runs: new run folders that load, generate and resume beside the old."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from run_cases import TINY, call, write_corpus
from vocabfold import generate, train
from vocabfold.embeddings import relative_error
from vocabfold.errors import UserError
from vocabfold.runs.checkpoint import load_weights
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.token_order import saved_embedding

FORMS = {
    "int8": [],
    "int4": ["embedding.group_size=8"],
    "mixed": ["embedding.group_size=8"],
    "low_rank": ["embedding.rank=16"],
    "tensor_train": ["embedding.mode_sizes=[4,4]", "embedding.ranks=[2]"],
    "tt_matrix": [],
}
QUICK = ("int8", "low_rank", "tensor_train")  # numbers, a matrix, cores: a form of each kind
COMPRESS = ["start=compress", "start.run=plain", "wandb.mode=disabled", "device=cpu"]
UNTIED = ["head=paper", "budget.steps=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, ``plain``, that has a dense embedding of 50,257 x 16."""
    folder = tmp_path_factory.mktemp("compress")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VOCABFOLD_CACHE", str(folder / "cache"))
        write_corpus(folder)
        assert call(train.main, patch, *TINY, *UNTIED, "run_dir=plain") == 0
    return folder


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its folder, within the current one."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(trained / "cache"))
    return trained / "plain"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_every_form_compresses_recovers_loads_and_generates(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = finished_row(run)
    assert plain is not None
    rows = {}
    for share in (0, 0.5):
        folder = f"{name}{share}"
        options = [*COMPRESS, f"embedding={name}", *FORMS[name], f"start.share={share}", f"run_dir={folder}"]
        assert call(train.main, monkeypatch, *options) == 0
        rows[share] = finished_row(Path(folder))
    at_once, recovered = rows[0], rows[0.5]
    assert at_once is not None and recovered is not None
    half = round(0.5 * plain["tokens"])
    assert (at_once["steps"], at_once["recovery_tokens"]) == (0, 0)
    assert (recovered["steps"], recovered["recovery_tokens"]) == (2, half)
    assert at_once["embedding_relative_error"] == recovered["embedding_relative_error"]
    assert at_once["validation_loss_nats"] == at_once["at_once_loss_nats"] == recovered["at_once_loss_nats"]
    assert at_once["validation_loss_nats"] != recovered["validation_loss_nats"]
    assert at_once["teacher_loss_nats"] == plain["validation_loss_nats"]
    if name == "low_rank":  # of full rank: the same model
        assert at_once["validation_loss_nats"] == pytest.approx(plain["validation_loss_nats"], abs=1e-5)
    if name == "int8":
        assert at_once["embedding_bytes"] == 50_257 * 18
        assert plain["model_bytes"] - at_once["model_bytes"] == 50_257 * (64 - 18)

    table = load_run(run, torch.device("cpu")).gpt.token_embedding.rows(0, 50_257)
    compressed = load_run(Path(f"{name}0"), torch.device("cpu"))
    assert Path(f"{name}0/model.safetensors").stat().st_size == pytest.approx(at_once["model_bytes"], rel=0.02)
    error = relative_error(compressed.gpt.token_embedding, table)
    assert error == pytest.approx(at_once["embedding_relative_error"], rel=1e-3, abs=1e-6)
    assert call(generate.main, monkeypatch, f"{name}0", "the cat", "--max-tokens", "2") == 0
    with pytest.raises(UserError, match="compressed input embedding"):
        saved_embedding(Path(f"{name}0"), 50_257)


def test_a_scratch_run_of_every_kind_keeps_its_small_form(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, least in (("tensor_train", 2.0), ("tt_matrix", 4.0), ("int8", 3.5)):
        extra = ["embedding.compression=2"] if name == "tensor_train" else []
        options = [*TINY, *UNTIED, "budget.steps=1", f"embedding={name}", *extra, f"run_dir=scratch-{name}"]
        assert call(train.main, monkeypatch, *options) == 0
        row = finished_row(Path(f"scratch-{name}"))
        assert row is not None and row["embedding"] == name
        assert row["embedding_compression"] >= least and row["recovery_tokens"] is None
        load_run(Path(f"scratch-{name}"), torch.device("cpu"))


def test_what_cannot_be_compressed_is_refused_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(train.main, monkeypatch, *TINY, "head=full", "budget.steps=1", "run_dir=tied") == 0
    assert call(train.main, monkeypatch, *COMPRESS, "embedding=int8", "run_dir=small") == 0
    cases = [
        (["start.run=tied", "embedding=int8"], "has no rows to lend to the head"),
        (["start.run=small", "embedding=int8"], "has no dense embedding"),
        (["start.run=nowhere", "embedding=int8"], "holds no config.yaml"),
        (["embedding=int9"], "there is no embedding=int9"),
        (["embedding=int8", "head=full"], "takes head from plain"),
        (["embedding=low_rank", "embedding.rnak=3"], "did you mean embedding.rank?"),
        (["embedding=tensor_train", "embedding.compression=40"], "out of reach"),
        (["embedding=int8", "start.share=1.5"], "choose a number from 0 to 1"),
    ]
    capfd.readouterr()
    for options, words in cases:
        assert call(train.main, monkeypatch, *COMPRESS, "run_dir=refused", *options) == 2
        written = capfd.readouterr().err
        assert words in written and "Traceback" not in written and written.count("\n") == 1, written
    assert not Path("refused/row.json").exists()


def test_weights_of_another_shape_are_refused(run: Path) -> None:
    model = load_run(run, torch.device("cpu"))
    model.gpt.token_embedding = type(model.gpt.token_embedding)(50_257, 8)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_weights(run, model)
