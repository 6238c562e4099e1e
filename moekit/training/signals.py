"""Signals that end a run after its current step: Ctrl-C, SIGTERM and a closed terminal."""

import contextlib
import itertools
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
STANDARD_STREAMS = (1, 2)  # file descriptors of the output and the errors
_SYNC_POINTS = itertools.count(1)  # of this process, over all its runs


class Stopped(KeyboardInterrupt):
    """A signal stopped a run, which was saved if it has a workdir.

    Args:
      message: what was saved.
      number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a program that the signal ended."""
        return 128 + self.number


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop after the current step.

    The second one acts at once, as without this class. Signals that are ignored (as SIGHUP is under
    nohup) stay ignored. Only the main thread handles signals: elsewhere nothing changes.

    With several processes, jax listens for SIGTERM and for the maintenance events of TPUs: one that
    reaches any of them stops all of them after the same step.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that was received
        self._former_handlers: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "StopSignal":
        self._terminals = [number for number in STANDARD_STREAMS if os.isatty(number)]
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or (number == signal.SIGTERM and jax.process_count() > 1):
                continue
            former = signal.getsignal(number)
            # None: a handler in C, which Python could not restore
            if former not in (signal.SIG_IGN, None):
                self._former_handlers[number] = former
                signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        """Whether to stop now; every process must call it after every step."""
        if jax.process_count() > 1:
            # numbered since the process started: a notice may arrive before the first step
            is_notified = multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS))
            if is_notified and not self.number:
                self.number = signal.SIGTERM
            return is_notified
        return self.number > 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore_handlers()
        if number == getattr(signal, "SIGHUP", None):
            mute_closed_terminals(self._terminals)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which jax makes known to all processes


def mute_closed_terminals(streams: list[int]) -> None:
    """Discard what is written to terminals that were closed: it would raise OSError."""
    for stream in streams:
        if not os.isatty(stream):
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream)
