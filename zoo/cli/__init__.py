"""The command line: `deepzoo COMMAND ...`.

Only the module of the command that was asked for is imported, so that help and mistakes answer at
once. A module `deepzoo.zoo.cli.<name>` holds one frozen dataclass, `<Name>`, whose fields are the
options, and `run(command) -> int`; if its options depend on its arguments, `parse(args)` as well.
"""

import difflib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from deepzoo.zoo.cli import usage
from deepzoo.zoo.cli.interrupt import is_interrupt
from deepzoo.zoo.errors import DeepzooError

COMMANDS = {
    "models": "List the released models and those that ship with the package.",
    "show": "Show a model's parameters, bytes of weights and cache, and its traps.",
    "generate": "Answer prompts.",
    "chat": "Talk to a model.",
    "convert": "Write a checkpoint in the other layout or in another dtype.",
    "recipes": "List, show or copy the training recipes.",
    "train": "Run a training recipe, or go on with one.",
    "evaluate": "Measure how often a model is right.",
    "plot": "Draw the curves of runs.",
    "bench": "Measure speed on this machine.",
    "seeds": "Show or check what is claimed of V2 and R1.",
    "doctor": "Check this machine: what works, what does not, what to do.",
}

TRACEBACK = "DEEPZOO_TRACEBACK"  # set to 1: errors print where they come from, too


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0 success, 2 a mistake of the user (one line on stderr), 1 a mistake of the program or a check
    that failed, 130 Ctrl-C, 141 the reader of stdout went away.
    """
    _spell_what_the_terminal_cannot()
    return guarded(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def guarded(call: Callable[[], int]) -> int:
    """The status that `call` returns; what it raises becomes one line on stderr and a status."""
    try:
        status = call()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except DeepzooError as error:
        return _fail(error, 2)
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{named}{error.strerror or error}", 2)
    except Exception as error:
        if is_interrupt(error):
            return _fail("interrupted", 130)
        text = str(error).strip().split("\n")[0]
        what = f"{type(error).__name__}{': ' if text else ''}{text}"
        return _fail(f"unexpected {what} ({TRACEBACK}=1 shows where)", 1)


def _spell_what_the_terminal_cannot() -> None:
    """Where stdout is not UTF-8, a character that it lacks comes out as its number."""
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper) and out.encoding.lower() not in ("utf-8", "utf8"):
            out.reconfigure(errors="backslashreplace")


def _dispatch(args: list[str]) -> int:
    name, *rest = args or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"deepzoo {version('deepzoo')}")
        return 0
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else "`deepzoo --help` lists all"
        raise usage.UsageError(f"no {what} is called {name!r}; {hint}")
    module = import_module(f"deepzoo.zoo.cli.{name}")
    try:
        if hasattr(module, "parse"):
            command = module.parse(rest)
        else:
            command = usage.parse(getattr(module, name.capitalize()), name, rest)
    except SystemExit:  # after help
        return 0
    return module.run(command)


def overview() -> str:
    """What `deepzoo --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {told}" for name, told in COMMANDS.items()]
    return "\n".join(
        [
            "usage: deepzoo COMMAND [OPTIONS]",
            "",
            "DeepSeek's V2 and R1 model families in JAX.",
            "",
            *lines,
            "",
            "`deepzoo COMMAND --help` tells a command's options; `deepzoo --version` the version.",
        ]
    )


def _fail(message: object, status: int) -> int:
    """One line on stderr, whatever line breaks and control characters the message holds."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exc()
    line = " ".join(str(message).split())
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    print(f"deepzoo: {shown}", file=sys.stderr)
    return status
