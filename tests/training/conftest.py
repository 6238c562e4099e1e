import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_signal_is_ignored() -> Iterator[None]:
    """nohup, and a shell that starts the tests in the background, let them ignore some signals.

    A run leaves ignored signals ignored, and processes inherit them.
    """
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)
