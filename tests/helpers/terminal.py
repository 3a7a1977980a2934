"""A program on a pseudo-terminal, as a person meets it: type, press Ctrl-C, read what it shows."""

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time
from typing import Self

CTRL_C, CTRL_D = "\x03", "\x04"

# Opening a terminal makes it the one whose Ctrl-C counts. Done in a program of its own, because a
# process that has started jax must not fork.
_TAKE = (
    "import os, sys; os.open(os.ttyname(0), os.O_RDWR);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """`python args...` on a terminal of 24 rows and `columns`; leaving the `with` block ends it.

    Attributes:
        text: everything that was shown so far, escape sequences included.
    """

    def __init__(self, *args: str, columns: int = 80, env: dict[str, str] | None = None):
        self.text = ""
        self._seen = 0
        self._outer, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
        environment.pop("COLUMNS", None)
        command = [sys.executable, "-W", "error", "-c", _TAKE, *args]
        self._process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment,
            start_new_session=True, cwd=os.path.dirname(os.path.abspath(__file__)),
        )  # fmt: skip
        os.close(inner)

    def press(self, text: str) -> None:
        """Presses these keys."""
        os.write(self._outer, text.encode())

    def insist(self, key: str, text: str) -> str:
        """Presses a key until `text` is shown, as a person would: Python looks for signals before
        it waits for the next key, and one that comes just in between is seen only after that key.
        """
        for _ in range(3):
            self.press(key)
            try:
                return self.wait_for(text, timeout=10)
            except AssertionError:
                continue
        self.press(key)
        return self.wait_for(text)

    def wait_for(self, text: str, timeout: float = 30) -> str:
        """What was shown since the last call, up to and with `text`.

        Raises:
            AssertionError: it did not come; the message shows what did.
        """
        end = time.monotonic() + timeout
        while (at := self.text.find(text, self._seen)) < 0:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} did not come; shown: {self.text[self._seen :]!r}")
        shown = self.text[self._seen : at + len(text)]
        self._seen = at + len(text)
        return shown

    def finish(self, timeout: float = 120) -> tuple[int, str]:
        """Waits for the program to end: its exit status, and what it showed since the last call."""
        end = time.monotonic() + timeout
        while self._read(end - time.monotonic()):
            pass
        return self._process.wait(timeout=10), self.text[self._seen :]

    def _read(self, timeout: float) -> bool:
        if not select.select([self._outer], [], [], max(timeout, 0))[0]:
            return False
        try:
            data = os.read(self._outer, 1 << 16)
        except OSError:  # how Linux says that nobody holds the terminal any more
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._outer)
