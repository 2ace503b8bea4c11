"""The README's example of a head in a model of one's own runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_example_of_a_head_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)  # our own text
    assert names["next_tokens"].shape == (2,)
    assert names["log_prob"].shape == names["tokens"].shape == (2, 5)
    assert torch.isfinite(names["hidden"].grad).all()


def test_what_the_readme_names_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((results/[^)]+)\)", text):
        assert (README.parent / link).is_file(), link
    for name in re.findall(r"\b(\w+\.py)\b", text):
        assert list(README.parent.glob(f"src/**/{name}")) + list(README.parent.glob(f"[et]*/{name}")), name
