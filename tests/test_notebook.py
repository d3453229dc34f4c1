"""notebook.ipynb runs from top to bottom, finds what it says, and carries no output but small pictures.

    python tests/test_notebook.py     run it at its full size and keep the pictures: after each change of a cell
"""
import ast
import base64
import io
import json
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).parent.parent
PATH = ROOT / "notebook.ipynb"
PICTURE, WHOLE = 60_000, 400_000  # bytes, at most: of one picture, of the file
PICTURES = 6


def tagged(notebook, tag):
    """-> the number of the only cell with that tag"""
    (found,) = [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]
    return found


def read():
    return nbformat.read(PATH, as_version=4)


def execute(notebook, folder=ROOT, parameters=""):
    """Run all cells, `parameters` right after those of the notebook: outputs are put into it -> seconds"""
    if parameters:
        notebook.cells.insert(tagged(notebook, "parameters") + 1, nbformat.v4.new_code_cell(parameters))
    start = time.time()
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return time.time() - start


def results(notebook):
    """-> what the last code cell printed"""
    (output,) = notebook.cells[tagged(notebook, "results")].outputs
    return json.loads(output.text)


def pictures(notebook):
    """-> the PNG files of the outputs"""
    return [base64.b64decode(output.data["image/png"]) for cell in notebook.cells if cell.cell_type == "code"
            for output in cell.outputs if "image/png" in output.get("data", {})]


def check_results(found, n_layer, k):
    """What the text between the cells promises."""
    assert found["routes"] == 2 ** n_layer
    assert found["tree_minus_forward"] < 1e-3
    cost = found["mflop"]
    assert cost["all SKIP"] < cost["all SMALL"] < cost["half BIG"] < cost["all BIG"]
    loss = found["loss"]
    assert len(loss["oracle"]) == len(loss["fixed"]) == len(loss["random"]) == n_layer + 1
    # An oracle searches the fixed pattern's route, too; at k = 0 and k = L there is one route only.
    assert all(best <= fixed + 1e-5 for best, fixed in zip(loss["oracle"], loss["fixed"], strict=True))
    for end in (0, n_layer):
        assert loss["oracle"][end] == pytest.approx(loss["fixed"][end], abs=1e-4)
    assert loss["oracle"][k] < loss["fixed"][k]
    assert set(found["split"]) == {str(budget) for budget in range(n_layer + 1)}
    for budget, line in found["split"].items():
        assert line["foresight"] + line["hindsight"] == pytest.approx(line["gain"], abs=1e-5)
        assert line["gain"] == pytest.approx(loss["fixed"][int(budget)] - loss["oracle"][int(budget)], abs=1e-4)
        assert line["hindsight"] >= -1e-5  # no chooser beats the oracle on the label
    assert found["router"]["big"] == pytest.approx(k, abs=1)


def test_it_runs_small(tmp_path):
    notebook = read()
    seconds = execute(notebook, parameters=f"""
from pathlib import Path
torch.set_num_threads(1)
bench.ROUNDS = 1
N_LAYER, WIDTH, CONTEXT, STEPS, REFERENCE_STEPS, ROUTER_STEPS, TOKENS, K = 4, 16, 16, 8, 4, 2, 64, 2
CORPUS_MB, DATA, OUT = 1, Path({str(tmp_path / "data")!r}), Path({str(tmp_path / "out")!r})
""")
    check_results(results(notebook), 4, 2)
    assert len(pictures(notebook)) == PICTURES
    assert seconds < 60  # about 20 on a quiet core


@pytest.mark.slow
def test_it_runs_at_its_full_size(tmp_path):
    notebook = read()
    seconds = execute(notebook, parameters=f"OUT = Path({str(tmp_path / 'out')!r})")
    found = results(notebook)
    check_results(found, 12, 4)
    loss, split = found["loss"], found["split"]["4"]
    assert loss["oracle"][4] < loss["fixed"][12] - 0.1  # "passes far below all-big with a few BIG layers"
    assert min(loss["oracle"]) < loss["oracle"][12] - 0.1  # "and turns"
    assert loss["fixed"][12] < loss["fixed"][0]  # all-big is better than all-small
    assert 2 < found["flops_all_big_of_all_small"] < 3  # "a little over twice"
    assert split["foresight"] < split["hindsight"]  # "most of each bar is orange"
    assert seconds < 300, seconds


def first_code_cell():
    notebook = read()
    notebook.cells = [next(cell for cell in notebook.cells if cell.cell_type == "code")]
    return notebook


def test_it_says_what_to_do_without_the_project(tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        execute(first_code_cell(), tmp_path)
    assert caught.value.ename == "FileNotFoundError" and "\n" not in caught.value.evalue
    assert "open the notebook in the project's folder, or write the project's git address" in caught.value.evalue


def test_it_clones_the_project_where_it_has_an_address(tmp_path):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    git = ["git", "-C", project, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "--quiet", project], check=True)
    (project / "zoo.py").touch()
    (project / "requirements.txt").write_text("numpy\n# a comment\ntorch==0.1  # any other is left alone\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "a project"], check=True)
    notebook = first_code_cell()
    cell = notebook.cells[0]
    assert cell.source.count('REPOSITORY = ""') == 1
    cell.source = cell.source.replace('REPOSITORY = ""', f"REPOSITORY = {str(project)!r}") + "\nprint(root, missing)"
    execute(notebook, elsewhere)
    printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
    assert f"{elsewhere / 'nanoduo'} []" in printed and (elsewhere / "nanoduo/zoo.py").exists()


def test_the_file_is_small_and_holds_nothing_but_pictures():
    notebook = read()
    nbformat.validate(notebook)
    assert PATH.stat().st_size < WHOLE
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            for output in cell.outputs:
                assert list(output.data) == ["image/png"] and not output.metadata
    assert len(pictures(notebook)) == PICTURES
    assert max(map(len, pictures(notebook))) <= PICTURE


def test_it_defines_nothing_of_the_project_again():
    """Its only functions are its own small helpers: all logic is imported."""
    notebook = read()
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert names == {"show"}


def keep_pictures(notebook):
    """Strip all outputs but pictures, these in 256 colours, and write the file."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count, cell.metadata = None, {key: v for key, v in cell.metadata.items() if key == "tags"}
        kept = []
        for data in pictures(nbformat.v4.new_notebook(cells=[cell])):
            small = io.BytesIO()
            Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(small, "png", optimize=True)
            png = base64.b64encode(small.getvalue()).decode()
            kept.append(nbformat.v4.new_output("display_data", {"image/png": png}))
        cell.outputs = kept
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    done = read()
    took = execute(done)
    print(json.dumps(results(done), indent=1))
    keep_pictures(done)
    print(f"{PATH}: ran in {took:.0f} s, {PATH.stat().st_size / 1e3:.0f} KB with {len(pictures(done))} pictures")
