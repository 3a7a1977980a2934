"""The command line of a recipe file: flags from its dataclass, the same for all of them.

if __name__ == "__main__":
    main(train, PRESETS, __doc__)
"""

import dataclasses
import difflib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.run import Options
from deepzoo.recipes.parts.settings import plain
from deepzoo.zoo.cli import guarded, usage

type Train = Callable[[Any, Path, Options], Any]
"""(recipe, directory, options) -> whatever it made."""


def main(train: Train, presets: Mapping[str, Any], doc: str | None) -> None:
    """Runs the file as a program and ends the process: status 0, 2 for a user's mistake."""
    prog = f"python {Path(sys.argv[0]).name}"
    sys.exit(guarded(lambda: run(train, presets, doc, sys.argv[1:], prog)))


def run(
    train: Train, presets: Mapping[str, Any], doc: str | None, args: Sequence[str], prog: str
) -> int:
    """Parses `args` and trains; returns the exit status.

    In several processes, if the environment says so: see `processes.initialize`.

    Args:
        train: the recipe's entry.
        presets: name -> settings; the first is the default.
        doc: the recipe's head; its first paragraph is the help's.
        args: the command line behind the recipe's name.
        prog: what help calls the command.

    Raises:
        UsageError: a flag that does not exist or cannot be read; an unknown preset.
        RequestError: the processes cannot find each other, or were given different commands.
    """
    try:
        recipe, out, options = parse(presets, doc, args, prog)
    except SystemExit:  # after help
        return 0
    begin = time.perf_counter(), time.process_time()
    processes.initialize()
    processes.same({"recipe": plain(recipe), "options": plain(options)})
    train(recipe, out, options)
    processes.barrier()  # one that ended earlier would give the others a minute only
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    if not options.quiet and processes.is_first():
        print(f"{out}: done in {wall / 60:.1f} minutes ({cpu / 60:.1f} minutes of CPU time)")
    return 0


def parse(
    presets: Mapping[str, Any], doc: str | None, args: Sequence[str], prog: str
) -> tuple[Any, Path, Options]:
    """(recipe, out, options) of a command line; flags override the preset's values."""
    name, rest = _preset(presets, args)
    default = presets[name]
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        raise TypeError(f"{prog}: preset {name} is no dataclass instance")
    told = (doc or "").strip().split("\n\n")[0].replace("\n", " ")
    flat = tyro.conf.arg(name="")
    kind = dataclasses.make_dataclass(
        "Arguments",
        [
            ("out", Path),
            ("recipe", Annotated[type(default), flat], dataclasses.field(default=default)),
            ("options", Annotated[Options, flat], dataclasses.field(default=Options())),
        ],
        frozen=True,
        kw_only=True,
    )
    names = ", ".join(presets)
    kind.__doc__ = (
        f"{told}\n\nPreset {name}, whose values are the defaults below; others with --preset NAME:"
        f" {names}.\nA run that was interrupted goes on with the same command.\n\n"
        f"Example: {prog} --preset {name} --out runs/{name}"
    )
    found = usage.parse(kind, "train", rest, program=prog)
    return found.recipe, found.out, found.options


def _preset(presets: Mapping[str, Any], args: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--preset NAME` out of the arguments."""
    name, rest, words = next(iter(presets)), [], iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--preset":
            rest.append(word)
            continue
        name = value if equals else next(words, "")
        if name not in presets:
            near = difflib.get_close_matches(name, presets, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(presets)}"
            raise usage.UsageError(f"--preset {name or 'needs a name'}: unknown; {hint}")
    return name, rest
