"""notebooks/walkthrough.ipynb runs, defines nothing, and is committed with its pictures and without private paths."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "walkthrough.ipynb"
MOST_BYTES = 500_000
MOST_SECONDS = 120  # of a cell
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    """As committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Those of them that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: nbformat.NotebookNode) -> int:
    """How many its cells show."""
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def test_it_defines_nothing(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        assert not [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)], cell.source


def test_it_is_committed_with_its_outputs(notebook: nbformat.NotebookNode) -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook) == 7
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/", text)


def test_what_it_links_to_is_there(notebook: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in notebook.cells)
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.slow  # CI runs it
def test_it_runs(notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path))
    told = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    for cell in code_cells(notebook):  # a shorter training, to the same pictures
        cell.source = cell.source.replace("budget.tokens=100000", "budget.tokens=8000").replace(
            "train_documents=1000", "train_documents=100"
        )
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=MOST_SECONDS, kernel_name="python3", resources=folder).execute()
    assert pictures(notebook) == 7
    again = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "over the vocabulary 1.000000" in again
    assert again.splitlines()[:3] == told.splitlines()[:3]  # what depends on no machine's speed
