"""How far a load, a save or a download has come: bytes, rate and time left, on stderr."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

type Progress = bool | Callable[[int, int], None] | None
"""True or False: show a bar or not. None: show one if stderr is a terminal; of several processes
the first does. A function: called with (bytes done, bytes in all) after every piece, from one
thread at a time."""


@contextmanager
def track(what: str, total: int, progress: Progress = None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the size of each finished piece; safe from several threads."""
    if progress is None:
        progress = sys.stderr.isatty() and _first()
    if progress is False:
        yield lambda n: None
    elif callable(progress):
        yield _counter(total, progress)
    else:
        with _bar(what, total) as advance:
            yield advance


def _first() -> bool:
    """Of several processes of one program only the first speaks."""
    import jax  # asked without starting a backend where there is one process

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _counter(total: int, report: Callable[[int, int], None]) -> Callable[[int], None]:
    lock, done = threading.Lock(), 0

    def advance(n: int) -> None:
        nonlocal done
        with lock:
            done += n
            report(done, total)

    return advance


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    # Imported here: most loads are of small models or without a terminal.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
