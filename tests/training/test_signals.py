"""Signals: what is received, restored and written after a terminal was closed."""

import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from moekit import cli
from moekit.training.signals import Stopped, StopSignal

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def handlers():
    return {number: signal.getsignal(number) for number in CODES}


@pytest.mark.parametrize("number", CODES)
def test_the_first_signal_is_a_request_and_restores_all_handlers(number):
    former = handlers()
    with StopSignal() as stop:
        assert not stop.should_stop() and handlers() != former
        os.kill(os.getpid(), number)
        assert stop.should_stop() and stop.number == number
        assert handlers() == former  # the second signal of any kind acts at once
    with StopSignal() as stop:
        assert not stop.should_stop()
    assert handlers() == former


def test_the_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.should_stop()
    finally:
        signal.signal(signal.SIGHUP, former)


def test_another_thread_leaves_signals_alone():
    former = handlers()
    seen = []

    def run():
        with StopSignal() as stop:
            seen.append((handlers(), stop.should_stop()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(former, False)]


@pytest.mark.parametrize("number", CODES)
def test_exit_codes(number, monkeypatch, capsys):
    def stop(argv):
        raise Stopped("saved at step 3", number)

    monkeypatch.setattr(cli, "run", stop)
    assert cli.main(["train"]) == CODES[number]
    assert capsys.readouterr().err == "stopped: saved at step 3\n"


PROGRAM = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from moekit.training.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.should_stop():
        time.sleep(0.01)
    print("a line to a terminal that is gone", flush=True)
    print("another", file=sys.stderr, flush=True)
sys.exit(128 + stop.number)
"""


def test_a_closed_terminal_does_not_stop_the_run_before_it_is_saved():
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert process.wait(timeout=60) == 129
