"""The notebooks of examples/ run as they stand, and are committed with what they showed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MOST_BYTES = 300_000  # GitHub shows larger ones slowly or not at all, and each version stays in the history

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {
        "quick_start",
        "inside_a_ternary_layer",
        "train_a_tiny_model",
        "compile_and_profile",
        "in_your_stack",
    }


@pytest.mark.slow
@each_notebook
def test_it_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,  # of a cell; on a busy machine, where a whole notebook otherwise takes 15 seconds
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},  # nothing that lies in the repository
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    # Without a plot the reader would see nothing, though no cell failed.
    pictures = [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert pictures


@each_notebook
def test_it_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from the top"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < MOST_BYTES
