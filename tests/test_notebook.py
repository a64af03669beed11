"""The notebook runs from its first cell to its last, in a kernel of its own, as it is in the repository."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "toyworld.ipynb"


def test_the_notebook_runs_and_shows_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    said = "".join(output.get("text", "") for output in outputs)
    assert "Pick-a-Pic" in said
    assert "0.693" in said  # ln 2 before the first update
    assert "'pipeline'" in outputs[-1].get("data", {}).get("text/plain", "")
    (folder,) = tmp_path.glob("inpo-*")
    assert {"pairs", "cache", "run"} <= {path.name for path in folder.iterdir()}
