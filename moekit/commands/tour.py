"""Executes the notebooks in order: progress, warnings as errors, results in one folder."""

import os
import time
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 900  # seconds a cell may take


def notebooks(folder: Path = Path("notebooks")) -> list[Path]:
    """The notebooks (percent-format sources) in order; FileNotFoundError if there are none."""
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not found:
        raise FileNotFoundError(f"no notebooks in {folder.absolute()}: run this in the repository")
    return found


def tour(out: Path = Path("tour"), *, in_place: bool = False, only: str = "") -> list[dict]:
    """Execute every notebook in its small setting.

    Args:
      out: executed notebooks and their figures go here.
      in_place: store the outputs in notebooks/ as well.
      only: prefix of the notebooks to run, such as "01".

    Raises:
      ValueError: a cell failed or warned; the message has notebook, cell and error, and `out` has
        the notebook as far as it came.
    """
    import jupytext

    sources = [path for path in notebooks() if path.name.startswith(only)]
    if not sources:
        raise ValueError(f"no notebook starts with {only!r}: {[p.stem for p in notebooks()]}")
    figures = (out / "figures").absolute()
    figures.mkdir(parents=True, exist_ok=True)
    # the kernel inherits these: warnings are errors there too, and figures go where we can see them
    os.environ["MOEKIT_FIGURES"] = str(figures)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    rows = []
    with tqdm(sources, unit="notebook") as bar:
        for path in bar:
            bar.set_description(path.stem)
            start = time.perf_counter()
            notebook = jupytext.read(path)
            try:
                cells = _execute(notebook, path)
            except ValueError:
                _write(notebook, out / f"{path.stem}.ipynb")
                raise
            seconds = round(time.perf_counter() - start, 1)
            for folder in (out, path.parent) if in_place else (out,):
                _write(notebook, folder / f"{path.stem}.ipynb")
            row = {"notebook": path.stem, "seconds": seconds, "cells": cells}
            rows.append(row)
            tqdm.write(f"{path.stem}: {cells} cells in {seconds} s")
    return rows


def _execute(notebook, path: Path) -> int:
    import nbclient
    import nbformat

    # the kernel's own shutdown may warn
    strict = "import warnings; warnings.simplefilter('error')"
    strict += "; warnings.filterwarnings('ignore', module='ipykernel')"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(strict))
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": "."}},
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
        failed = next(
            number
            for number, cell in enumerate(notebook.cells)
            if any(output.output_type == "error" for output in cell.get("outputs", ()))
        )
        raise ValueError(f"notebook {path.stem}, cell {failed}: {problem[:400]}") from None
    except nbclient.exceptions.CellTimeoutError:
        raise ValueError(f"notebook {path.stem}: a cell took more than {TIMEOUT} s") from None
    del notebook.cells[0]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.metadata.pop("execution", None)  # dates would differ every time
        cell.execution_count = count
        cell.outputs = [_clean(output, count) for output in cell.outputs if _kept(output)]
    return len(code)


def _kept(output) -> bool:
    """Progress bars are for watching, not for keeping."""
    return not (output.output_type == "stream" and output.name == "stderr")


def _clean(output, count: int):
    if "execution_count" in output:
        output["execution_count"] = count
    return output


def _write(notebook, path: Path) -> None:
    import nbformat

    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    notebook.metadata.pop("language_info", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
