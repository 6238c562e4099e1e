import gzip
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from moekit.data.builtin import entries as embedded
from moekit.data.cache import cache_folder, cached_json

CONTENT = {"train": [["1", {"x": "2 + 2 = \u00e9"}, "4"]], "valid": []}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def not_built():
    raise AssertionError("the stored file should have been used")


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("MOEKIT_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("MOEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/moekit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert cache_folder() == Path("/home/ann/.cache/moekit")


def test_content_is_built_once(folder):
    assert cached_json("a/tasks", lambda: CONTENT) == CONTENT
    assert cached_json("a/tasks", not_built) == CONTENT
    assert cached_json("b/tasks", lambda: [1]) == [1]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert files == {"a/tasks.json.gz", "b/tasks.json.gz"}  # no temporary files


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_built_again(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MOEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        cached_json("tasks", lambda: CONTENT)
        path = cache_folder() / "tasks.json.gz"
        stored = path.read_bytes()
        if data.draw(st.booleans()):
            damaged = stored[: data.draw(st.integers(0, len(stored) - 1))]
        else:
            position = data.draw(st.integers(0, len(stored) - 1))
            flipped = stored[position] ^ data.draw(st.integers(1, 255))
            damaged = stored[:position] + bytes([flipped]) + stored[position + 1 :]
        path.write_bytes(damaged)
        assert cached_json("tasks", lambda: CONTENT) == CONTENT
        assert cached_json("tasks", lambda: CONTENT) == CONTENT
        # other content under a checksum that is not its own
        checksum = hashlib.sha256(b"[1]").hexdigest().encode()
        path.write_bytes(gzip.compress(checksum + b"\n[2]"))
        assert cached_json("tasks", lambda: CONTENT) == CONTENT


def test_several_writers_at_once(folder):
    everyone_builds = threading.Barrier(4)
    found = []

    def build():
        everyone_builds.wait(timeout=30)
        return CONTENT

    threads = [
        threading.Thread(target=lambda: found.append(cached_json("tasks", build))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert cached_json("tasks", not_built) == CONTENT
    assert [path.name for path in folder.iterdir()] == ["tasks.json.gz"]


def test_without_a_writable_folder_content_is_built(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "file"))
    assert cached_json("tasks", lambda: CONTENT) == CONTENT


@pytest.fixture
def package(tmp_path, folder, monkeypatch):
    """The only package that the embedded text is read from."""
    root = tmp_path / "package"
    root.mkdir()
    (root / "one.py").write_text('def first():\n    """Returns one."""\n')
    monkeypatch.setattr(embedded, "_roots", lambda: [("package", root)])
    yield root
    embedded.sources_digest.cache_clear()
    embedded.entries.cache_clear()


def read_again():
    """The entries of the package as a new process reads them."""
    embedded.sources_digest.cache_clear()
    embedded.entries.cache_clear()
    return {entry.name: entry.text for entry in embedded.entries() if entry.domain == "package"}


def test_a_changed_package_is_parsed_again(package, monkeypatch):
    assert read_again() == {"first": "Returns one."}
    with monkeypatch.context() as patched:
        patched.setattr(embedded, "_parse_all", not_built)
        assert read_again() == {"first": "Returns one."}
    before = (package / "one.py").stat().st_mtime_ns
    (package / "one.py").write_text('def first():\n    """Returns two."""\n')  # of equal size
    os.utime(package / "one.py", ns=(before, before + 1_000_000))
    assert read_again() == {"first": "Returns two."}
    (package / "two.py").write_text('class Second:\n    """A class."""\n')
    assert read_again() == {"first": "Returns two.", "Second": "A class."}


def test_definitions_are_found_in_the_order_of_ast_walk():
    import ast

    text = Path(embedded.__file__).read_text() + Path(__file__).read_text()
    tree = ast.parse(
        text + "try:\n  def a(): pass\nexcept E:\n  def b(): pass\nelse:\n  class C: 1\n"
    )
    kinds = tuple(embedded.KINDS)
    walked = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert [node for node in embedded._statements(tree) if isinstance(node, kinds)] == walked
