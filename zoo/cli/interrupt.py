"""Ctrl-C where Python code must not be left at any line whatever: between two pieces of an answer.

A `KeyboardInterrupt` that is raised inside a function that C code calls may come out as a
`SystemError`, and one inside a function that jax is tracing may leave a half-made cache. So while
an answer is made, Ctrl-C is only noted, and `check` raises it at a place that can be left.
"""

import signal
import threading
from types import FrameType
from typing import Self


class Held:
    """`with Held() as held:` notes the first Ctrl-C until `held.check()`; the second one raises
    `KeyboardInterrupt` at once, for what takes too long. Outside the main thread, where Python
    handles no signals, it changes nothing."""

    def __init__(self) -> None:
        self._pressed = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed since the last call."""
        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt
        self._pressed = True

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        # Where Ctrl-C is ignored (a job in the background) or somebody else's, it stays so.
        self._main &= signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._main:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:  # a press behind the last check is not lost
            self.check()


def is_interrupt(error: BaseException) -> bool:
    """Whether this is Ctrl-C, or what C code has made of it."""
    if isinstance(error, SystemError):
        return isinstance(error.__cause__ or error.__context__, KeyboardInterrupt)
    return isinstance(error, KeyboardInterrupt)
