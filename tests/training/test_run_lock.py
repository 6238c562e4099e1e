"""One writer for a folder: live, dead and damaged locks."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from moekit.training.run_lock import (
    LOCK,
    STALE_SECONDS,
    RunInUse,
    RunLock,
    Writer,
    read_writer,
    write_alone,
)


def write_lock(folder, writer, age=0):
    path = folder / LOCK
    path.write_text(json.dumps(asdict(writer)))
    then = time.time() - age
    os.utime(path, (then, then))


@pytest.fixture(scope="module")
def dead():
    """A process of this host that was killed and not waited for: a zombie."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = Writer.current()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield replace(start, pid=process.pid)
    process.communicate()


def test_the_second_run_is_refused_and_named_the_first(tmp_path):
    with write_alone(tmp_path):
        message = f"{tmp_path} is in use by process {os.getpid()} on .*choose another workdir"
        with pytest.raises(RunInUse, match=message), write_alone(tmp_path):
            pass
        assert read_writer(tmp_path).pid == os.getpid()
    assert not (tmp_path / LOCK).exists() and read_writer(tmp_path) is None
    with write_alone(tmp_path):
        pass


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_alone(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new" / LOCK).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, dead, caplog):
    write_lock(tmp_path, dead)
    assert read_writer(tmp_path) is None
    with caplog.at_level(logging.WARNING), write_alone(tmp_path):
        assert read_writer(tmp_path).pid == os.getpid()
    (message,) = caplog.messages
    assert f"taken over from process {dead.pid} on {dead.host}" in message


@pytest.mark.parametrize(
    ("changes", "age", "alive"),
    [
        ({}, 9 * STALE_SECONDS, True),  # a process that exists needs no heartbeat
        ({"process_start": "1"}, 0, False),  # the number belongs to another process now
        ({"boot": "another"}, 0, False),
        ({"host": "another"}, STALE_SECONDS - 60, True),
        ({"host": "another"}, STALE_SECONDS + 60, False),
        ({"namespace": "another container"}, STALE_SECONDS - 60, True),
        ({"namespace": "another container"}, STALE_SECONDS + 60, False),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_which_locks_are_alive(tmp_path, changes, age, alive):
    write_lock(tmp_path, replace(Writer.current(), **changes), age)
    assert (read_writer(tmp_path) is not None) == alive
    if alive:
        with pytest.raises(RunInUse), write_alone(tmp_path):
            pass
    else:
        with write_alone(tmp_path):
            pass


@pytest.mark.parametrize("content", ["{", "[]", '{"pid": 1}', "\x00" * 40, '"text"'])
def test_a_damaged_lock_is_taken_over(tmp_path, content, caplog):
    (tmp_path / LOCK).write_text(content)
    assert read_writer(tmp_path) is None
    with caplog.at_level(logging.WARNING), write_alone(tmp_path):
        assert read_writer(tmp_path).pid == os.getpid()
    assert "a process whose lock is damaged" in caplog.text


def test_a_lock_that_was_taken_over_is_noticed_and_left(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.require()
    other = replace(Writer.current(), host="another")
    write_lock(tmp_path, other)
    with pytest.raises(RunInUse, match=r"taken over by process .* on another"):
        lock.require()
    lock.release()
    assert read_writer(tmp_path) == other


def test_of_many_processes_one_gets_the_lock(tmp_path, dead):
    """All find the lock of the same dead process at the same time."""
    write_lock(tmp_path, dead)
    program = (
        "import sys, pathlib\n"
        "from moekit.training.run_lock import RunInUse, RunLock\n"
        "input()\n"
        "try:\n"
        "    RunLock(pathlib.Path(sys.argv[1])).acquire()\n"
        "    print('got', flush=True)\n"
        "except RunInUse:\n"
        "    print('refused', flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        process.stdin.write("start\n")
        process.stdin.flush()
    found = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate("end\n")
    assert found == ["got", "refused", "refused", "refused"]
