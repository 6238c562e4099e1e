"""One writer for a run's folder: a lock file that names the process which trains there."""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from moekit.data.paths import require_file

if sys.platform != "win32":
    import fcntl

LOCK = "run.lock"
MAX_BYTES = 2**16  # of a lock file
HEARTBEAT_SECONDS = 60
STALE_SECONDS = 600  # without a heartbeat, for a process that cannot be looked up
logger = logging.getLogger(__name__)


class RunInUse(OSError):
    """Another process trains in the folder."""


@dataclass(frozen=True)
class Writer:
    """The process that a lock names.

    Args:
      host: name of its host.
      pid: number of the process on its host.
      boot: of the host since it was started.
      namespace: in which the number counts: containers have their own.
      process_start: of the process, in the kernel's ticks since the boot; empty where unknown.
      since: local time at which it took the lock.
    """

    host: str
    pid: int
    boot: str
    namespace: str
    process_start: str
    since: str

    @classmethod
    def current(cls) -> "Writer":
        """This process."""
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, _boot(), _namespace(), _process_start(pid), since)

    @classmethod
    def read(cls, content: str) -> "Writer | None":
        """The writer in the content of a lock; None if it is damaged."""
        try:
            writer = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        return writer if isinstance(writer.pid, int) else None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    def is_alive(self, heartbeat_age: float) -> bool:
        """Whether the process still exists.

        Args:
          heartbeat_age: seconds since its last sign of life, which decides for processes of other
            hosts and containers.
        """
        if self.host == socket.gethostname():
            if self.boot != _boot():
                return False  # the host was started anew
            if self.namespace == _namespace():
                return _exists(self.pid) and self.process_start == _process_start(self.pid)
        return heartbeat_age < STALE_SECONDS


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _process_start(pid: int) -> str:
    """When a process started; empty if it ended or where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # the name, in parentheses, may contain anything; the state and 19 more fields follow it
    _, _, fields = status.rpartition(")")
    state, *others = fields.split()
    return "" if state == "Z" else others[18]


class RunLock:
    """The lock of a folder, from `acquire` to `release`.

    A lock whose process is gone is taken over with a warning. Another thread renews the lock's time
    every minute, for processes on other hosts.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._writer = Writer.current()
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Become the folder's writer.

        Raises:
          RunInUse: another process is it.
          OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _opened_alone(self.path) as file:
            content = file.read()
            former = Writer.read(content)
            age = time.time() - self.path.stat().st_mtime
            if former is not None and former.is_alive(age):
                raise RunInUse(
                    f"{self.path.parent} is in use by {former}: wait for that run, stop it, or "
                    "choose another workdir"
                )
            if content:
                gone = former or "a process whose lock is damaged"
                logger.warning("%s: taken over from %s, which is gone", self.path.parent, gone)
            file.seek(0)
            file.truncate()
            file.write(json.dumps(asdict(self._writer)))
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        """Remove the lock, if it is still this one."""
        self._ended.set()
        with contextlib.suppress(OSError), _opened_alone(self.path) as file:
            if Writer.read(file.read()) == self._writer:
                self.path.unlink()

    def require(self) -> None:
        """Raise RunInUse if another process took the lock over, as after a long suspension."""
        current = read_writer(self.path.parent)
        if current is not None and current != self._writer:
            raise RunInUse(
                f"{self.path.parent} was taken over by {current} while this process was suspended: "
                "this run ends without saving"
            )

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def read_writer(folder: Path) -> Writer | None:
    """The process that the lock of a folder names, if it is alive."""
    path = folder / LOCK
    try:
        require_file(path, MAX_BYTES)
        writer = Writer.read(path.read_text())
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    return writer if writer is not None and writer.is_alive(age) else None


@contextlib.contextmanager
def _opened_alone(path: Path) -> Iterator[TextIO]:
    """The lock file, which no other process opens this way at the same time."""
    while True:
        with path.open("a+", errors="replace") as file:
            _lock_file(file)
            # the former holder may have deleted the file in the meantime
            is_current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
            if is_current:
                file.seek(0)
                yield file
                return


def _lock_file(file: TextIO) -> None:
    """Wait for other processes that have the file open; where the file system cannot, do not."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def write_alone(folder: Path | None) -> Iterator[RunLock | None]:
    """Hold the lock of a folder on process 0; an OSError there is raised on all processes.

    Without a folder there is nothing to hold. Yields the lock on process 0.
    """
    from moekit.distributed import run_on_first  # which imports jax; `moekit runs` does without

    held: list[RunLock] = []

    def acquire() -> None:
        lock = RunLock(folder)
        lock.acquire()
        held.append(lock)

    if folder is not None:
        run_on_first(acquire)
    try:
        yield held[0] if held else None
    finally:
        for lock in held:
            lock.release()
