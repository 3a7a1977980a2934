"""How generated text looks: thoughts dimmed on a terminal, exactly as generated everywhere else."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from deepzoo.zoo.tokenizer_file import THINK_TAGS

OPEN, CLOSE = THINK_TAGS
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"

# A model may write escape sequences, and a terminal would obey them. Unicode has pictures for the
# first 32 control characters and for DEL.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def styled(out: TextIO) -> bool:
    """Whether `out` is a terminal on which text may be dimmed."""
    return out.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def visible(text: str) -> str:
    """Text in which control characters, other than tabs and line ends, are replaced by pictures."""
    return text.translate(_PICTURES)


class Screen:
    """Writes one answer piece by piece.

    On a terminal the `<think>` tags become dimmed text and a blank line, and control characters are
    made harmless. Anywhere else the text comes out as it is.
    """

    def __init__(self, out: TextIO, thought: bool):
        """`thought`: the prompt has opened the thought, so the text begins inside it."""
        self.out = out
        self.styled = styled(out)
        self.terminal = out.isatty()
        self.thought = thought
        self.state = "start"
        self.held = ""
        self.last = ""
        self.fresh = True  # nothing of this part is written yet: line ends are left out

    def push(self, piece: str) -> None:
        """Writes what is certain of the text so far."""
        if self.styled:
            self.held += piece
            self._split(final=False)
        else:
            self._write(piece)
        self.out.flush()

    def close(self) -> None:
        """Writes the rest and ends the line."""
        if self.styled:
            self._split(final=True)
        if self.last != "\n":
            self.out.write("\n")
        self.out.flush()

    def _split(self, *, final: bool) -> None:
        if self.state == "start":
            body = self.held.lstrip()
            if body.startswith(OPEN):
                self.state, self.held = "thought", body.removeprefix(OPEN)
            elif final or not OPEN.startswith(body):
                self.state, self.fresh = ("thought", True) if self.thought else ("answer", False)
        if self.state == "thought":
            text, found, rest = self.held.partition(CLOSE)
            # A tag that may follow, and line ends that it would swallow, wait.
            certain = text if final else text.rstrip("\n") if found else _certain(text)
            self._part(certain, dim=True)
            self.held = text[len(certain) :]
            if found:
                if not self.fresh:
                    self._write("\n\n")
                self.state, self.held, self.fresh = "answer", rest, True
        if self.state == "answer":
            self._part(self.held)
            self.held = ""

    def _part(self, text: str, *, dim: bool = False) -> None:
        text = text.lstrip("\n") if self.fresh else text
        if text:
            self.fresh = False
            # Dimmed piece by piece, so that whatever interrupts finds the terminal as it was.
            self._write(text, dim)

    def _write(self, text: str, dim: bool = False) -> None:
        if text:
            shown = visible(text) if self.terminal else text
            self.out.write(f"{DIM}{shown}{PLAIN}" if dim else shown)
            self.last = text[-1]


def _certain(thought: str) -> str:
    """The part of a thought that is sure to be shown as it stands, whatever follows."""
    cut = next((n for n in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:n])), 0)
    return thought[: len(thought) - cut].rstrip("\n")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on a terminal's stderr what takes so long; gone when the block ends."""
    if not styled(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
