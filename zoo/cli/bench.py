"""`deepzoo bench`: speed of models on CPU and GPU, of the kernels, of speculative decoding."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from deepzoo.zoo.cli.options import Count, File, Flag, Text
from deepzoo.zoo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure a small model on the CPU, the kernels or whole models on a GPU, or MTP drafts.

    cpu: decode, prefill and a training step of a 135M-parameter V2 model with random weights, in
    float32.
    kernels: every kernel against float64, the hardware's limit and its peers; without a GPU, what
    compiling them for absent GPUs tells.
    gpu: prefill, decode and training of models with random weights.
    speculative: decoding with the MTP layer's drafts against plain decoding, batch 1, in float32.

    Example: deepzoo bench cpu --against transformers --peer-python peer/bin/python
    """

    what: Annotated[Literal["cpu", "kernels", "gpu", "speculative"], tyro.conf.Positional]
    """What to measure."""
    against: Annotated[str | None, tyro.conf.arg(metavar="PEER")] = None
    """A peer to measure with us (cpu, gpu): transformers."""
    peer_python: Annotated[str | None, tyro.conf.arg(metavar="PYTHON")] = None
    """The Python of an environment in which the peer is installed; for kernels, one with torch."""
    rounds: Count = 5
    """Measured rounds of each case (cpu, gpu, speculative); medians are printed."""
    model: str = "r1-nano"
    """A shipped model or a directory (speculative)."""
    task: str = "countdown"
    """Whose held-out problems it answers (speculative)."""
    problems: Count = 50
    """How many of them (speculative)."""
    filter: Text = None
    """Only cases whose operation and name hold this text (kernels)."""
    minutes: float = 30
    """When no further case begins (kernels, gpu)."""
    size: Annotated[Literal["full", "nano"], tyro.conf.arg(metavar="SIZE")] = "full"
    """Of the models (gpu): full needs a GPU of 80 GB or more, nano runs anywhere."""
    out: File = None
    """Write the figures there as JSON while they come (kernels, gpu)."""
    write: Flag = False
    """Write the table into kernels/README.md of this checkout, too (kernels)."""
    json: bool = False
    """Print the figures as JSON."""


def run(command: Bench) -> int:
    """Prints the table and returns the exit status.

    Raises:
        RequestError: options that do not go together, or a peer that does not work.
    """
    if command.rounds < 1:
        raise RequestError(f"--rounds is {command.rounds}; expected at least 1")
    if not command.minutes > 0:
        raise RequestError(f"--minutes is {command.minutes:g}; expected more than 0")
    if command.write and (command.filter is not None or command.what != "kernels"):
        raise RequestError("--write is for `bench kernels` with all cases, without --filter")
    if command.problems < 1:
        raise RequestError(f"--problems is {command.problems}; expected at least 1")
    runs = {"cpu": _cpu, "kernels": _kernels, "gpu": _gpu, "speculative": _speculative}
    return runs[command.what](command)


def _has_gpu() -> bool:
    # Before JAX looks for devices: what it would reserve at once, the peers need, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax.default_backend() == "gpu"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says on stderr what is being done: in place on a terminal, else a line each."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda text: status.update(text)
    else:
        yield lambda text: print(text, file=sys.stderr, flush=True)


def _kernels(command: Bench) -> int:
    from deepzoo.kernels import aot
    from deepzoo.zoo.bench import kernel_peers, kernels

    gpu = _has_gpu()
    chosen = kernels.select(command.filter)
    readme = kernels.readme() if command.write else None
    known = kernels.facts()
    torch = None
    if gpu:
        python = command.peer_python
        if python is None and importlib.util.find_spec("torch") is not None:
            python = sys.executable
        torch = None if python is None else kernel_peers.Torch(python)
        known["versions"] |= {} if torch is None else torch.versions
        header, line, marker = kernels.HEADER, kernels.line, "bench kernels"
    else:
        print("no GPU here: nothing is timed; what compiling for absent GPUs tells:")
        if reasons := aot.unavailable():
            print(f"nothing either: {'; '.join(reasons)}")
            return 0
        header, line, marker = kernels.COMPILED_HEADER, kernels.compiled_line, "compiled kernels"
    rows: list[Any] = []

    def save() -> None:
        text = kernels.as_json(rows, known)
        if command.out is not None:
            command.out.write_text(text, encoding="utf-8")
        if readme is not None:
            shown = kernels.markdown(header, [line(row) for row in rows])
            kernels.write_between(readme, marker, f"{_about(known)}\n\n{shown}")

    try:
        with _progress() as told:
            if gpu:
                found: Any = kernels.bench(chosen, minutes=command.minutes, told=told, torch=torch)
            else:
                found = kernels.compiled(chosen, kernels.COMPILED_FOR, told)
            for row in found:
                rows.append(row)
                save()  # what is measured is kept if the rest is not
    finally:
        if torch is not None:
            torch.close()
    if command.json:
        print(kernels.as_json(rows, known))
        return 0
    _show([header, *(line(row) for row in rows)])
    print(_about(known))
    return 0


def _about(known: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    return f"{known['date']}, {known['device']}; {versions}"


def _show(table: Sequence[Sequence[str]]) -> None:
    """A table for people on a terminal, markdown elsewhere."""
    if sys.stdout.isatty():
        shown = Table(*table[0])
        for line in table[1:]:
            shown.add_row(*line)
        Console().print(shown)
        return
    for n, line in enumerate(table):
        print("| " + " | ".join(line) + " |")
        if n == 0:
            print("|" + " --- |" * len(line))


def _gpu(command: Bench) -> int:
    if not _has_gpu() and command.size == "full":
        print("no GPU here: nothing is measured; `--size nano` runs the same program on a CPU")
        return 0
    from deepzoo.zoo.bench import gpu

    rows: list[Any] = []
    known = gpu.facts(command.size)
    with _progress() as told:
        for row in gpu.bench(
            command.size,
            command.against,
            command.peer_python,
            command.rounds,
            command.minutes,
            told,
        ):
            rows.append(row)
            if command.out is not None:
                command.out.write_text(gpu.as_json(rows, known), encoding="utf-8")
    if command.json:
        print(gpu.as_json(rows, known))
        return 0
    _show([gpu.HEADER, *(gpu.line(row) for row in rows)])
    print(_about(known))
    return 0


def _speculative(command: Bench) -> int:
    from deepzoo.zoo.bench import cpu, speculative
    from deepzoo.zoo.load import load

    # The zoo knows no tasks; the recipes do, and are looked for when the command runs.
    tasks = importlib.import_module("deepzoo.recipes.parts.problems")
    accuracy = importlib.import_module("deepzoo.recipes.parts.accuracy")
    asked = accuracy.held_out(tasks.task(command.task), command.problems)
    model = load(command.model, dtype="float32")
    with _progress() as told:
        rows = speculative.bench(
            model, [p.prompt for p in asked], raw=asked[0].raw, rounds=command.rounds, told=told
        )
    known = cpu.facts()
    if command.json:
        found = [row._asdict() | {"acceptance": row.acceptance} for row in rows]
        print(json.dumps(known | {"rows": found}, indent=2))
        return 0
    _show([speculative.HEADER, *(speculative.line(row) for row in rows)])
    print(
        f"{command.model}, {command.problems} problems of {command.task} one after the other,"
        f" float32, medians of {command.rounds} rounds; {_machine(known)}"
    )
    return 0


def _cpu(command: Bench) -> int:
    from deepzoo.zoo.bench import cpu

    with Console(stderr=True).status("starting") as status:
        rows, facts = cpu.bench(
            command.against, command.peer_python, command.rounds, lambda text: status.update(text)
        )
    if command.json:
        print(json.dumps(facts | {"rows": [row._asdict() for row in rows]}, indent=2))
        return 0
    _show(_table(rows, command.against))
    print(
        f"{facts['parameters'] / 1e6:.0f}M parameters, {facts['dtype']}, medians of"
        f" {facts['rounds']} rounds; {_machine(facts)}"
    )
    return 0


def _machine(known: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    return f"{known['threads']} threads of {known['cpu']}, {known['date']}; {versions}"


def _table(rows: list[Any], against: str | None) -> list[list[str]]:
    peer = [] if against is None else [f"{against}, tokens/s", "ratio"]
    lines = [["case", "deepzoo, tokens/s", *peer]]
    for row in rows:
        other = [] if against is None else [f"{row.peer_rate:.1f}", f"{row.ratio:.2f}"]
        lines.append([row.name, f"{row.rate:.1f}", *other])
    return lines
