"""The notebooks run from top to bottom, offline, and hold what they claim (they assert it)."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def read(notebook: Path):
    import nbformat

    return nbformat.read(notebook, as_version=4)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 7


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_clean_and_makes_claims(notebook):
    cells = read(notebook).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear the outputs"
    assert any("assert " in cell.source for cell in code), "a claim is an assertion"
    assert "MANIFOLD_MERGE_SHORT" in code[0].source, "the short mode is missing"
    assert cells[0].source.startswith("# "), "the first cell holds the title"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, monkeypatch, tmp_path):
    from nbclient import NotebookClient

    monkeypatch.setenv("MANIFOLD_MERGE_SHORT", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    where = {"metadata": {"path": str(notebook.parent)}}
    ran = read(notebook)
    NotebookClient(ran, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures, "a tutorial shows at least one picture"
    printed = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not any("Warning" in text for text in printed), printed
