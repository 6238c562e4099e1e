"""Progress bars: widgets where a notebook can show them, else text.

A bar says "compiling" while a program compiles, and leaves that time out of its estimate.
"""

import contextlib
import time
import warnings
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # without ipywidgets a notebook shows bars of text
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

# the shapes that each program of this process has run on
_known_shapes: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()


class ProgressBar(tqdm):
    """A tqdm bar whose estimate leaves out compilation; its arguments are those of tqdm.

    TQDM_DISABLE=1 hides all bars.
    """

    untimed_seconds = 0.0
    untimed_steps = 0

    @contextlib.contextmanager
    def compiling(self, program: Hashable, shape: Hashable = (), steps: int = 1) -> Iterator[bool]:
        """Say "compiling" the first time that a program runs on arrays of a shape.

        Its time is then left out of the estimate. Yields whether it is the first time; the
        program's results must then be waited for within the context.

        Args:
          steps: steps of the bar that are done within.
        """
        shapes = _known_shapes.setdefault(program, set())
        if self.disable or shape in shapes:
            yield False
            return
        description = (self.desc or "").removesuffix(": ")
        self.set_description(f"{description} (compiling)")
        start = time.perf_counter()
        yield True
        shapes.add(shape)
        self.untimed_seconds += time.perf_counter() - start
        self.untimed_steps += steps
        self.set_description(description)

    def reset_to(self, step: int) -> None:
        """Show an earlier step; its estimate starts anew."""
        self.reset()
        self.initial = step
        self.n = step
        self.untimed_seconds = 0.0
        self.untimed_steps = 0
        self.refresh()

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm formats. A rate of 0 shows as unknown."""
        values = super().format_dict
        if self.disable:
            return values
        num_timed = self.n - self.initial - self.untimed_steps
        seconds = values["elapsed"] - self.untimed_seconds
        is_known = num_timed > 0 and seconds > 0
        values["rate"] = num_timed / seconds if is_known else 0.0
        return values
