"""moekit tour: the notebooks, executed in order, with warnings as errors."""

import asyncio
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from moekit.commands.environment import keep_freed_memory
from moekit.commands.output import AsJson, print_result
from moekit.progress import ProgressBar

TIMEOUT = 900  # seconds a cell may take
AT_ONCE = 2  # notebooks: much of their time goes into tracing and compiling, on one core each
# notebooks that start from what others trained
CONTINUES = {"05": ("03",), "08": ("03", "05")}
# except what libraries say of each other: on Colab, the kernel is old for its Python, and matplotlib
# for its pyparsing
WARNINGS_ARE_ERRORS = """import warnings
warnings.simplefilter('error')
warnings.filterwarnings('ignore', module='(ipykernel|jupyter_client|tornado|traitlets|zmq)')
warnings.filterwarnings('ignore', category=DeprecationWarning, module='(matplotlib|pyparsing)')"""


def tour(
    out: Path = Path("tour"), in_place: bool = False, only: str = "", json: AsJson = False
) -> int:
    """Execute the notebooks in their small setting; `make tour` calls this.

    Args:
      out: Folder for the executed notebooks and their figures.
      in_place: Store the outputs in notebooks/ as well.
      only: Prefixes of the notebooks to execute, such as 01 or 00,01,05.
    """
    keep_freed_memory()  # the kernels inherit it
    start = time.perf_counter()
    rows = execute_notebooks(out, in_place=in_place, only=only)
    minutes = (time.perf_counter() - start) / 60
    text = (
        f"{len(rows)} notebooks ran in {minutes:.1f} minutes.\n"
        f"Executed notebooks: {out}/*.ipynb\nFigures: {out}/figures/*.png"
    )
    print_result(rows, text, json)
    return 0


COMMAND = tour


def notebooks(folder: Path = Path("notebooks")) -> list[Path]:
    """The notebooks (percent-format sources) in order.

    Raises:
      FileNotFoundError: the folder has none.
    """
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not found:
        raise FileNotFoundError(f"no notebooks in {folder.absolute()}: run this in the repository")
    return found


def execute_notebooks(
    out: Path = Path("tour"), *, in_place: bool = False, only: str = ""
) -> list[dict[str, Any]]:
    """Execute every notebook in its small setting; returns name, seconds and cells of each.

    Two run at a time, except with `in_place`.

    Args:
      out: folder for the executed notebooks and their figures.
      in_place: store the outputs in notebooks/ as well.
      only: prefixes of the notebooks to execute, separated by commas, such as "00,01".

    Raises:
      ValueError: a cell failed or warned. The message has notebook, cell and error; `out` has the
        notebook up to that cell.
    """
    prefixes = tuple(only.split(","))
    sources = [path for path in notebooks() if path.name.startswith(prefixes)]
    if not sources:
        raise ValueError(f"no notebook starts with {only!r}: {[p.stem for p in notebooks()]}")
    figures = (out / "figures").absolute()
    figures.mkdir(parents=True, exist_ok=True)
    # the kernels inherit these
    os.environ["MOEKIT_FIGURES"] = str(figures)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["TQDM_DISABLE"] = "1"  # a stored notebook has no use for bars
    # programs that several notebooks, or the next run, compile alike are compiled once
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".jax_cache").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    progress = ProgressBar(total=len(sources), desc="notebooks", unit="notebook")
    # stored times are those of a notebook that runs alone
    pool = ThreadPoolExecutor(1 if in_place else AT_ONCE)
    futures: dict[str, Future[dict[str, Any]]] = {}

    def execute(path: Path) -> dict[str, Any]:
        for number in CONTINUES.get(path.name[:2], ()):
            if number in futures:
                futures[number].result()
        row = _execute_one(path, out, in_place)
        ProgressBar.write(f"{path.stem}: {row['cells']} cells in {row['seconds']} s")
        progress.update()
        return row

    for path in sources:
        futures[path.name[:2]] = pool.submit(execute, path)
    try:
        return [future.result() for future in futures.values()]
    finally:
        # after a failure no further notebook starts
        pool.shutdown(cancel_futures=True)
        progress.close()


def _execute_one(path: Path, out: Path, in_place: bool) -> dict[str, Any]:
    """Execute a notebook and write it; one that fails is written up to the cell that failed."""
    import jupytext

    start = time.perf_counter()
    notebook = jupytext.read(path)
    try:
        cells = _execute(notebook, path.stem)
    except ValueError:
        _write(notebook, out / f"{path.stem}.ipynb")
        raise
    seconds = round(time.perf_counter() - start, 1)
    _write(notebook, out / f"{path.stem}.ipynb")
    if in_place:
        _write(notebook, path.with_suffix(".ipynb"))
    return {"notebook": path.stem, "seconds": seconds, "cells": cells}


def _execute(notebook: NotebookNode, name: str) -> int:
    """Execute a notebook in place; returns the number of its code cells."""
    import nbclient

    notebook.cells.insert(0, nbformat.v4.new_code_cell(WARNINGS_ARE_ERRORS))
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": "."}},
    )
    try:
        asyncio.run(client.async_execute())
    except nbclient.exceptions.CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"[:400]
        raise ValueError(f"notebook {name}, cell {_failed_cell(notebook)}: {problem}") from None
    except nbclient.exceptions.CellTimeoutError:
        raise ValueError(f"notebook {name}: a cell took more than {TIMEOUT} s") from None
    del notebook.cells[0]
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code_cells, 1):
        _tidy(cell, count)
    return len(code_cells)


def _failed_cell(notebook: NotebookNode) -> int:
    """Index of the cell with an error, counted from 1 without the inserted one."""
    for index, cell in enumerate(notebook.cells):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            return index
    return 0


def _tidy(cell: NotebookNode, count: int) -> None:
    """Remove what differs between executions: dates, counters, progress bars."""
    cell.metadata.pop("execution", None)
    cell.execution_count = count
    kept = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if "execution_count" in output:
            output["execution_count"] = count
        kept.append(output)
    cell.outputs = kept


def _write(notebook: NotebookNode, path: Path) -> None:
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    notebook.metadata.pop("language_info", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
