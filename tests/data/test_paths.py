"""What is named like a data file but is none: named in an error, never left out, never opened."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

import moekit as mk
from moekit.data import check as data_check
from moekit.data.files import is_data_file, read_json, scan
from moekit.data.paths import file_problem, named_files, require_file, require_file_name

KINDS = {
    "pipe": "a named pipe",
    "link": "a link to .*nothing",
    "loop": "a link to .*which is no file",
    "folder": "a folder",
    "device": "a device",
    "socket": "a socket",
}
ROW = '{"question": "one and one?", "answer": "two"}\n'


def make(path: Path, kind: str) -> Path:
    """Something that is not a file at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        current = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(current)
    return path


@pytest.fixture(params=KINDS)
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A path in a folder with a good file, and what is wrong with it."""
    path = make(tmp_path / "data/x.jsonl", request.param)
    (path.parent / "good.jsonl").write_text(ROW * 30)
    return path, KINDS[request.param]


def test_what_is_no_file_is_named_before_it_is_opened(no_file):
    path, problem = no_file
    assert re.match(problem, file_problem(path))
    with pytest.raises((ValueError, OSError), match=f"{re.escape(str(path))}: {problem}"):
        require_file(path)
    with pytest.raises(ValueError, match=problem):
        list(scan(path))
    with pytest.raises(ValueError, match=problem):
        read_json(path)


def test_it_stops_training_on_its_folder(no_file):
    path, problem = no_file
    for read in (mk.task, mk.corpus):
        with pytest.raises((ValueError, OSError), match=f"{re.escape(str(path))}.*{problem}"):
            read(path.parent)


def test_the_check_of_a_folder_names_it(no_file):
    path, problem = no_file
    (fault,) = data_check.check(path.parent).faults
    assert fault.path == path.name and re.match(problem, fault.problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "niv2/tasks.jsonl.gz",
        "niv2/task1_x.json",
        "templates/x/templates.yaml",
        "text/books/train-0.parquet",
        "mmlu/test.jsonl.gz",
        "hub/SetFit/sst2/train.jsonl",
    ],
)
def test_the_check_names_it_wherever_it_is(name, kind, tmp_path):
    make(tmp_path / name, kind)
    faults = data_check.check(tmp_path).faults
    assert {fault.path for fault in faults} == {name}
    assert any(re.match(KINDS[kind], fault.problem) for fault in faults)


def test_linked_folders_are_entered_and_folders_of_parts_are_no_files(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    data = tmp_path / "data"
    for path in (elsewhere / "a.jsonl", data / "table.parquet/part-0.parquet", data / ".x/b.jsonl"):
        path.parent.mkdir(parents=True)
        path.write_text(ROW)
    (data / "linked").symlink_to(elsewhere)
    (data / "back").symlink_to(data)
    found = [str(path.relative_to(data)) for path in named_files(data, is_data_file)]
    assert found == ["linked/a.jsonl", "table.parquet/part-0.parquet"]


@pytest.mark.parametrize("change", ["grows", "shrinks", "vanishes"])
def test_a_file_that_changes_while_it_is_read_is_named(change, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(ROW * 3)
    rows = scan(path)
    next(rows)
    if change == "vanishes":
        path.unlink()
    else:
        path.write_text(ROW * (5 if change == "grows" else 2))
    with pytest.raises(ValueError, match="vanished" if change == "vanishes" else "changed"):
        list(rows)


def test_a_file_has_a_size(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps("x" * 98))
    require_file(path, 100)
    with pytest.raises(ValueError, match=r"x\.json: the file is larger than 99 bytes"):
        require_file(path, 99)


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a\n", "\x1b[31m", "x" * 101])
def test_names_lead_nowhere_else(name):
    require_file_name("st-nano_2.1", "the name")
    with pytest.raises(ValueError, match=r"the name .* cannot be part of a file's name"):
        require_file_name(name, "the name")


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("question,question,answer\na,b,c\n")
    with pytest.raises(ValueError, match=r"x\.csv:1: column 'question' occurs twice"):
        mk.task(path)
