"""The examples of README and docs/heads.md run as they stand there, with a smaller vocabulary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from test_hugging_face_coding import folder

ROOT = Path(__file__).parents[1]
VOCABULARY_SIZE = 512
__all__ = ["folder"]  # a fixture


def run_example(page: str, number: int = 0, **names: Any) -> dict[str, Any]:
    """The names that one of the page's Python examples leaves behind, ``names`` given to it."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    example = examples[number].replace("folder or file.gguf", str(names.get("folder")))
    exec(example.replace("50_257", str(VOCABULARY_SIZE)).replace("225", "25"), names)  # our own text
    return names


def test_the_readme_example_of_a_head_runs() -> None:
    tokens = torch.randint(VOCABULARY_SIZE, (2000,), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(8, 128, requires_grad=True)
    names = run_example("README.md", hidden=hidden, targets=tokens[:8], training_tokens=tokens.numpy())
    names["loss"].backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad.abs().sum() > 0
    assert names["next_tokens"].shape == (8,)
    probabilities = names["head"].log_prob(hidden).exp().sum(dim=-1)
    torch.testing.assert_close(probabilities, torch.ones(8))


def test_the_readme_example_of_a_finished_model_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_example("README.md", 1, folder=folder)
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert names["head"].counts and names["head"].bytes_read > 0


def test_the_example_of_docs_heads_runs() -> None:
    names = run_example("docs/heads.md")
    assert names["next_tokens"].shape == (2,)
    assert names["log_prob"].shape == names["tokens"].shape == (2, 5)
    assert torch.isfinite(names["hidden"].grad).all()
    loss = names["paper_head"].loss(names["hidden"], names["targets"]).loss
    direct = names["paper_head"].target_log_prob(names["hidden"], names["targets"])
    torch.testing.assert_close(loss, -direct.mean())
