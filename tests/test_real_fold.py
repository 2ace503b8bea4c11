"""real_fold and what it shares with other experiments on real models: texts, losses and cached states."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from experiments.real import real_fold, real_fold_work
from experiments.real.loss import by_document, document_losses, mean_loss, pieces_of, read_texts
from experiments.real.real_fold import Folding, costs, group_scores, head_of, measured_rows, partition_of
from experiments.real.states import States, TextPart, cached_states
from experiments.study.figures import drawing
from transformers import LlamaConfig, LlamaForCausalLM

from vocabfold.errors import UserError
from vocabfold.heads import FullHead
from vocabfold.hugging_face.distil import distil

VOCABULARY = 97
STORIES = "one two three\nfour\n<|endoftext|>\n\n<|endoftext|>\nfive six seven eight nine ten\n<|endoftext|>\n"


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[sum(word.encode()) % VOCABULARY for word in text.split()]]))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def written(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text)
    return path


def test_texts_are_documents_and_articles(tmp_path: Path) -> None:
    assert read_texts(written(tmp_path, STORIES)) == ["one two three\nfour", "five six seven eight nine ten"]
    assert read_texts(written(tmp_path, " \n = A = \n \n text \n \n = B = \n \n = = C = = \n")) == [
        " = A = \n \n text \n ",
        " = B = \n \n = = C = = ",
    ]
    for text, message in (("\n<|endoftext|>\n", "holds no text"), ("", "holds no text")):
        with pytest.raises(UserError, match=message):
            read_texts(written(tmp_path, text))
    with pytest.raises(UserError, match="cannot read"):
        read_texts(tmp_path / "none.txt")


def test_pieces_predict_every_token_but_the_first_once(tmp_path: Path, model: Any) -> None:
    texts = read_texts(written(tmp_path, STORIES))
    whole, cut = pieces_of(Words(), texts), pieces_of(Words(), texts, context=2)
    assert [piece.num_targets for piece in whole] == [3, 5] and [piece.document for piece in cut] == [0, 0, 1, 1, 1]
    for document in (0, 1):
        targets = torch.cat([piece.ids[1:] for piece in cut if piece.document == document])
        assert torch.equal(targets, whole[document].ids[1:])
    assert [piece.num_targets for piece in pieces_of(Words(), texts, most_of_document=2)] == [2, 2]
    assert len(pieces_of(Words(), texts, most_targets=3)) == 1 and len(pieces_of(Words(), texts, most_targets=4)) == 2
    with pytest.raises(UserError, match="no token to predict"):
        pieces_of(Words(), ["one"])
    table = document_losses(model, whole)
    assert table["tokens"].tolist() == [3, 5]
    for piece, loss in zip(whole, table["loss_nats"], strict=True):
        ids = piece.ids.unsqueeze(0)
        assert loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss) * piece.num_targets, rel=1e-5)
    assert mean_loss(table) == pytest.approx(table["loss_nats"].sum() / 8)


def test_states_are_computed_once_and_a_larger_part_goes_on(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.real.states.BLOCK_TARGETS", 7)
    path = written(tmp_path, "\n<|endoftext|>\n".join(" ".join(f"w{i * j}" for j in range(5)) for i in range(9)))
    asked = []

    def load() -> Any:
        asked.append(1)
        return model

    def states(number: int) -> States:
        return cached_states(tmp_path / "cache", "m", TextPart(path, number, 4), Words(), load)

    small, counted = states(10), len(asked)
    assert len(small.targets) == 12 and small.documents.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and counted == 2
    large = states(24)
    assert len(asked) == 4  # the block that was not full, and one more
    assert torch.equal(large.hidden[:12], small.hidden) and len(large.targets) == 24
    again = states(24)
    assert len(asked) == 4 and torch.equal(again.hidden, large.hidden)
    logits = model.lm_head(large.hidden)
    losses = torch.nn.functional.cross_entropy(logits, large.targets, reduction="none")
    expected = document_losses(model, pieces_of(Words(), read_texts(path), most_targets=24, most_of_document=4))
    found = by_document(large.documents.tolist(), losses.tolist())
    np.testing.assert_allclose(found["loss_nats"], expected["loss_nats"], rtol=1e-4)


def made(number: int, seed: int, weight: torch.Tensor | None = None) -> States:
    """States with targets drawn from the model with the output rows ``weight``."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(number, 16, generator=generator)
    logits = torch.zeros(number, VOCABULARY) if weight is None else hidden @ weight.t()
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return States(hidden, targets, torch.arange(number) // 10)


@pytest.mark.parametrize("folding", [Folding("rows", 9, 7), Folding("frequency", 10, 0), Folding("rows", 1, 3)])
def test_costs_are_those_of_the_head_that_would_decode(folding: Folding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_fold, "VISITED", (0, 2, 9))
    torch.manual_seed(0)
    full = FullHead(16, VOCABULARY, torch.nn.Parameter(0.5 * torch.randn(VOCABULARY, 16)))
    states = made(150, 1)
    partition = partition_of(folding, full.weight, torch.bincount(states.targets, minlength=VOCABULARY))
    (exact,) = group_scores(full.weight.detach(), [partition], states.hidden)
    head = head_of(full, partition, 4)
    torch.testing.assert_close(exact, head.teacher_scores(states.hidden), rtol=1e-4, atol=1e-4)
    distil(head, states.hidden, exact, steps=3)
    found = costs(head, states, exact)
    assert set(found) == ({0} if folding.size == 1 else {0, 2, 9})
    for visited, extra in found.items():
        head.visited = visited
        expected = full.target_log_prob(states.hidden, states.targets) - head.target_log_prob(
            states.hidden, states.targets
        )
        torch.testing.assert_close(extra, expected.detach(), rtol=1e-3, atol=1e-3)


def test_every_axis_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Folding(size=9, shortlist=7)
    axes = {"form": [Folding(size=9, shortlist=7, form=form) for form in real_fold.FORMS]}
    for name, value in (
        ("AXES", axes),
        ("BASE", base),
        ("WIDTH", 4),
        ("VISITED", (0, 3)),
        ("distil", lambda head, hidden, taught, _: distil(head, hidden, taught, steps=150)),
    ):
        monkeypatch.setattr(real_fold, name, value)
    monkeypatch.setattr(real_fold, "SERIES", {"network": (base, "network", "k", "o")})
    weight = torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(0))
    rows = measured_rows(weight, made(600, 2, weight), {"stories": made(80, 3, weight), "wiki": made(90, 4, weight)})
    table = pd.DataFrame(rows).assign(model="m", hardware="h", torch="t", commit="c")
    assert len(table) == 3 * 2 * 2 and (table["added_low"] <= table["added_nats"]).all()
    by_form = table[(table["visited"] == 0) & (table["text"] == "stories")].set_index("form")["added_nats"]
    visits = table[(table["form"] == "network") & (table["text"] == "wiki")].set_index("visited")["added_nats"]
    assert by_form["linear"] < by_form["mean"] and visits[3] < visits[0]
    monkeypatch.chdir(tmp_path)
    folder = Path("results/cost")
    folder.mkdir(parents=True)
    table.to_csv(folder / "real_fold.csv", index=False)
    with drawing():
        real_fold.draw("cost")
    words = (folder / "real_fold.md").read_text()
    assert (folder / "real_fold.png").stat().st_size > 1000
    assert f"+{by_form['mean']:.3f} (" in words and "| 600 | wiki |" in words


def test_more_tokens_and_steps_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_fold_work, "BASE", Folding(size=9, shortlist=7))
    monkeypatch.setattr(real_fold, "WIDTH", 4)
    monkeypatch.setattr(real_fold, "VISITED", (0, 3))
    for name, value in (("FEWEST_TOKENS", 40), ("STEPS", 20), ("LONGER_TOKENS", 200), ("SHOWN", {0: "-", 3: "--"})):
        monkeypatch.setattr(real_fold_work, name, value)
    assert real_fold_work.numbers_of_tokens(640) == [40, 160, 640]
    assert real_fold_work.numbers_of_tokens(700) == [40, 160, 700]
    assert real_fold_work.numbers_of_tokens(1300) == [40, 160, 640, 1300]
    weight = torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(0))
    valid = {"stories": made(80, 3, weight), "wiki": made(90, 4, weight)}
    rows = real_fold_work.measured_rows(weight, made(640, 2, weight), valid)
    table = pd.DataFrame(rows).assign(model="m", hardware="h", torch="t", commit="c")
    assert len(table) == 7 * 2 * 2  # three numbers for each form, one of them for longer too
    assert set(zip(table["trained_tokens"], table["steps"], table["passes"], strict=True)) >= {
        (40, 20, 20 * 512 / 40), (640, 80, 80 * 512 / 640),
    }  # fmt: skip
    of_network = table[(table["form"] == "network") & (table["visited"] == 0) & (table["text"] == "stories")]
    longest = of_network.set_index(["trained_tokens", "steps"])["added_nats"]
    assert longest[640, 80] < longest[40, 20]
    monkeypatch.chdir(tmp_path)
    folder = Path("results/cost")
    folder.mkdir(parents=True)
    table.to_csv(folder / "real_fold_work.csv", index=False)
    with drawing():
        real_fold_work.draw("cost")
    words = (folder / "real_fold_work.md").read_text()
    assert (folder / "real_fold_work.png").stat().st_size > 1000
    assert f"+{longest[640, 80]:.3f} (" in words
    assert "* wiki: more tokens in as many steps gain a network without visits " in words
