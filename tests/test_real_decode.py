"""The experiment on decoding finished models, on tiny ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from experiments.real import other_bounds, real_decode
from experiments.real.output_layers import distance, rounded_logits
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from run_cases import experiment
from vocabfold.hugging_face import screen

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16)).eval()


def tokenizer(text: str, **_: object) -> SimpleNamespace:
    """A token a byte."""
    return SimpleNamespace(input_ids=torch.tensor([list(text.encode())]))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real_decode, "gemma_shape", tiny_gemma)
    monkeypatch.setattr(real_decode, "load", lambda path: (tiny_llama(), tokenizer))
    monkeypatch.setattr(real_decode, "BATCHES", (1, 3))
    monkeypatch.setattr(real_decode, "STEPS_TIMED", 2)
    stories = [f"Story {index} of a little girl who was {index * 7} years old." for index in range(5)]
    Path("valid.txt").write_text("\n<|endoftext|>\n".join(stories))


@pytest.mark.slow
def test_decoding_is_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--rounds", "2", "--tokens", "3", "--threads", str(torch.get_num_threads()), "--documents", "4")
    model = ("--smollm2", "model.gguf", "--valid", "valid.txt")
    assert experiment(monkeypatch, "real_decode", "measure", *model, *options) == 0, capfd.readouterr().err
    assert experiment(monkeypatch, "real_decode", "measure", *options) == 0  # Gemma's shape beside it
    table = pd.read_csv("results/real/real_decode.csv")
    assert set(table["part"]) == {"decode", "head", "step", "quality", "bound"}
    assert table["run"].nunique() == 2 and {"hardware", "torch", "commit", "command"} <= set(table)
    timed = table[table["part"].isin(["decode", "head", "step"])]
    assert (timed["seconds"] > 0).all() and len(timed) == 2 * 2 * 2 * 2 * (2 + 2 * 6 + 2 * 4)
    greedy = table[(table["part"] == "decode") & (table["sampling"] == "greedy")]
    assert (greedy[greedy["method"] != "int8, not exact"]["same_tokens"] == 1).all()
    screened = table[(table["part"] == "head") & (table["method"] == "screened")]
    assert (screened["rows_scored_a_token"] >= 1).all() and (screened["mib_a_call"] > 0).all()
    quality = table[table["part"] == "quality"]
    assert (quality["screened_agreement"] == 1).all() and (quality["kl_nats"] > 0).all()
    left = table[table["part"] == "bound"].set_index("method")["rows_left"]
    assert len(left) == 2 * 6 and left.between(1 / 300, 1).all()
    assert left["int8 rows"].max() < left["int4 rows"].min()
    assert experiment(monkeypatch, "real_decode", "draw") == 0, capfd.readouterr().err
    words = Path("results/real/real_decode.md").read_text()
    assert "transformers' generate | goal" in words and "same likeliest token" in words
    assert words.count("\n| SmolLM2-135M | fp32 | 3 | greedy |") == 6 + 4
    assert Path("results/real/real_decode.png").stat().st_size > 0
    Path("results/real/real_decode.csv").unlink()
    assert experiment(monkeypatch, "real_decode", "measure", *options) == 0
    assert set(pd.read_csv("results/real/real_decode.csv")["model"]) == {"Gemma 3 270M shape"}
    assert experiment(monkeypatch, "real_decode", "draw") == 0  # without the other model


def test_what_cannot_be_measured_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("one.txt").write_text("Once upon a time")
    refused = {
        "--smollm2 needs --valid": ("--smollm2", "model.gguf"),
        "holds 1 documents": ("--smollm2", "model.gguf", "--valid", "one.txt"),
        "cannot read absent.txt": ("--smollm2", "model.gguf", "--valid", "absent.txt"),
        "--rounds is 0": ("--rounds", "0"),
        "there is no results": (),
    }
    for message, options in refused.items():
        assert experiment(monkeypatch, "real_decode", "measure" if options else "draw", *options) == 2
        printed = capfd.readouterr().err
        assert message in printed and printed.count("\n") == 1


def test_other_bounds_hold() -> None:
    rows = tiny_llama().lm_head.weight.detach() * torch.linspace(0.1, 3, 300).unsqueeze(-1)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    logits = states.double() @ rows.double().T
    for bound in (
        other_bounds.rounded_rows(rows, 7, 32),
        other_bounds.rounded_rows(rows, 7, 5),
        other_bounds.low_rank(rows, 9),
        other_bounds.clusters(rows),
    ):
        above = bound(states) - logits
        assert float(above.min()) > -1e-5 and float(above.max()) < 3 * float(logits.abs().max())
    assert float((other_bounds.low_rank(rows, 32)(states) - logits).abs().max()) < 1e-5
    finer, coarser = (other_bounds.rounded_rows(rows, steps, 32)(states) - logits for steps in (127, 7))
    assert float(finer.mean()) < 0.1 * float(coarser.mean())


def test_the_distance_of_a_layer_from_itself_is_none_and_that_of_another_is_seen() -> None:
    model = tiny_llama()
    head = screen(model)
    rows = model.lm_head.weight
    documents = [torch.arange(30), torch.arange(40, 90), torch.tensor([5, 9])]
    none = distance(model, head, documents, lambda states: F.linear(states, rows))
    assert none["kl_nats"] == 0 and none["perplexity_ratio"] == 1 and none["agreement"] == 1
    assert none["tokens_read"] == 29 + 49 + 1
    loss = [model(input_ids=ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss * (len(ids) - 1) for ids in documents]
    assert none["perplexity"] == pytest.approx(float((sum(loss) / 79).exp()), rel=1e-5)
    some = distance(model, head, documents, rounded_logits(head))
    assert 0 < some["kl_nats"] < 1e-3 and some["perplexity_ratio_low"] <= some["perplexity_ratio_high"]
    opposite = distance(model, head, documents, lambda states: -F.linear(states, rows))
    assert opposite["agreement"] < 0.1 and opposite["kl_nats"] > some["kl_nats"]
    assert opposite["screened_agreement"] == 1
