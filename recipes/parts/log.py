"""What a run says while it runs: a table, a bar with the time left, metrics.jsonl, TensorBoard."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepzoo.recipes.parts.events import Events
from deepzoo.recipes.parts.flops import peak_flops
from deepzoo.recipes.parts.step import Mean, Metrics, Peak, State, culprits
from deepzoo.zoo.cli.display import visible

METRICS = "metrics.jsonl"

# The values of a row that depend on the machine. All others are the same in two runs with the same
# settings, however often one of them was killed.
TIMES = frozenset(
    "time seconds tokens_per_second flops_per_second utilisation missed_saves".split()
)

# Key of a row -> its title in the table and its format. What a row lacks has no column; keys that
# begin with "reward/" follow "reward".
_COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "d"),
    "loss": ("loss", ".4f"),
    "nll": ("nll", ".4f"),
    "reward": ("reward", ".3f"),
    "accuracy": ("right", ".1%"),
    "length": ("length", ".0f"),
    "entropy": ("entropy", ".3f"),
    "truncated": ("cut off", ".1%"),
    "dead_groups": ("dead groups", ".0%"),
    "kl": ("KL", ".4f"),
    "clipped": ("clipped", ".1%"),
    "mismatch": ("|dlogp|", ".1e"),
    "mismatch_max": ("max", ".1e"),
    "norm": ("norm", ".2f"),
    "load": ("load", ".2f"),
    "dead_experts": ("dead", ".0f"),
    "bias_min": ("bias from", ".3f"),
    "bias_max": ("to", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "utilisation": ("MFU", ".1%"),
    "skipped": ("skipped", "d"),
}


class Log:
    """A hook for `fit` that writes a row every so many steps, and rows of others through `note`.

    Attributes:
        missed: checkpoints that could not be written; part of each row once there is one.
    """

    def __init__(
        self, out: Path, *, every: int = 10, tensorboard: bool = True, quiet: bool = False
    ):
        """Opens nothing yet: `go_on` does."""
        self.missed = 0
        self._path, self._every, self._quiet = out / METRICS, max(every, 1), quiet
        self._events_in = out / "tensorboard" if tensorboard else None
        self._file: Any = None
        self._events: Events | None = None
        self._console = _console(quiet)
        self._progress: Progress | None = None
        self._begin = time.perf_counter()
        self._steps, self._columns, self._rows = 0, [], 0
        self._tokens: Callable[[int], float] = lambda step: 0.0
        self._flops = 0.0
        self._shown = -math.inf

    def go_on(self, step: int) -> None:
        """Cuts what is behind `step` off metrics.jsonl and opens it for more.

        The event files are written anew from what is left, so that both say the same.
        """
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        partial = self._path.with_suffix(".tmp")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        os.replace(partial, self._path)
        self._begin = time.perf_counter() - max(
            (r.get("seconds") or 0.0 for r in kept), default=0.0
        )
        self._file = self._path.open("a", encoding="utf-8")
        if self._events_in is not None:
            shutil.rmtree(self._events_in, ignore_errors=True)
            self._events = Events(self._events_in)
            for row in kept:
                self._events.add(row)

    @contextmanager
    def watch(
        self, at: int, steps: int, tokens: Callable[[int], float], flops: float
    ) -> Iterator[None]:
        """Shows the bar while the block lasts; see `Run.fit`."""
        self._steps, self._tokens, self._flops = steps, tokens, flops
        self._last, self._last_step = time.perf_counter(), at
        self._made = self._work = 0.0
        with Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("left"), console=self._console, transient=True,
            disable=self._quiet or not self._console.is_terminal,
        ) as self._progress:  # fmt: skip
            self._task = self._progress.add_task("steps", total=steps, completed=at)
            yield
        self._progress = None

    def __call__(self, state: State, metrics: Metrics) -> None:
        """Takes note of a step."""
        step = int(state.step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        made, work = done(metrics)
        self._made += made or 0.0
        self._work += work or (made or 0.0) * self._flops
        bad = not bool(metrics["finite"])
        if step % self._every and step not in (1, self._steps) and not bad:
            return
        now = time.perf_counter()
        row = {"step": step, **figures(state, metrics)}
        row |= {"time": time.time(), "seconds": now - self._begin}
        row |= self._speed(step, made, max(now - self._last, 1e-9))
        if bad:
            row["not_finite"] = ", ".join(culprits(state, metrics)[:5]) or "loss"
        if self.missed:
            row["missed_saves"] = self.missed
        self._last, self._last_step = now, step
        self._made = self._work = 0.0
        self._write(row)
        self._show(row, now)

    def _speed(self, step: int, made: float | None, seconds: float) -> dict[str, float]:
        """Tokens and operations since the last row, by the second."""
        total = self._tokens(step)
        row = {"tokens": total} if total else {}
        if made is not None:
            row, tokens, work = row | {"step_tokens": made}, self._made, self._work
        elif total:
            tokens = total - self._tokens(self._last_step)
            work = tokens * self._flops
        else:
            return {}
        row["tokens_per_second"] = tokens / seconds
        if work:
            row["flops_per_second"] = work / seconds
            if peak := peak_flops():
                row["utilisation"] = row["flops_per_second"] / (peak * jax.device_count())
        return row

    def note(self, step: int, **values: Any) -> None:
        """Adds a row of numbers and texts, such as an evaluation or a sample, and prints it."""
        if not values:
            return
        clean = {k: v if isinstance(v, str) else _number(v) for k, v in values.items()}
        self._write({"step": step, **clean, "time": time.time()})
        for name, value in clean.items():
            told = value if isinstance(value, str) else "-" if value is None else f"{value:.4g}"
            self.print(f"step {step}: {name.replace('_', ' ')} {visible(told)}")

    def print(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def flush(self) -> None:
        """Everything so far is on the disk: before a checkpoint, whose rows must not be lost."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.add(row)

    def _show(self, row: dict[str, Any], now: float) -> None:
        """A line of the table: on a terminal at most one in two seconds, else twenty in all."""
        if self._console.is_terminal:
            due = now - self._shown > 2
        else:
            part = max(self._steps, 1) / 20
            due = row["step"] // part > (row["step"] - self._every) // part
        if not (due or row["step"] in (1, self._steps)):
            return
        self._shown = now
        columns = list(_present(row))
        if columns != self._columns or self._rows % 20 == 0:
            self._columns = columns
            self.print("  ".join(f"{title:>{_width(title)}}" for _, title, _ in columns))
        self._rows += 1
        cells = (
            "-" if row.get(key) is None else format(int(row[key]) if how == "d" else row[key], how)
            for key, _, how in columns
        )
        self.print(
            "  ".join(f"{c:>{_width(t)}}" for c, (_, t, _) in zip(cells, columns, strict=True))
        )


def _console(quiet: bool) -> Console:
    """Of stderr. In a notebook, of stdout and as plain text: stderr is shown in red there, and rich
    would make every line a block of HTML."""
    found = Console(stderr=True, quiet=quiet)
    return Console(quiet=quiet, force_jupyter=False) if found.is_jupyter else found


def done(metrics: Metrics) -> tuple[float | None, float | None]:
    """(tokens, floating-point operations) of a step as it counted them itself; None if it did not.

    Counts are sums "tokens" and "flops"; a `Mean` called "length", of the tokens of an answer, is
    a count of tokens, too. Speeds are of these rather than of the constants that `Run.fit` was
    given, which count padding.
    """
    sums = metrics["sums"]
    tokens, length, flops = (sums.get(name) for name in ("tokens", "length", "flops"))
    if tokens is None and isinstance(length, Mean):
        tokens = length.total
    return tuple(None if n is None else float(n) for n in (tokens, flops))  # pyright: ignore


def figures(state: State, metrics: Metrics) -> dict[str, float | None]:
    """The numbers of a step, by name; None stands for NaN and infinities.

    The loss's own: a sum divided by the batch's weight, a `Mean` by its own weight, a `Peak` as it
    is; of the experts' load: "load", tokens of the busiest expert over the mean in the worst layer,
    and "dead_experts", how many got no token; of router biases, "bias_min" and "bias_max".
    """
    metrics = jax.device_get(metrics)
    weight = float(metrics["weight"])
    row: dict[str, Any] = {"loss": metrics["loss"], "norm": metrics["norm"]}
    row["skipped"] = int(state.skipped)
    for name, value in metrics["sums"].items():
        if name in ("tokens", "flops"):
            continue
        if name == "load":
            if value:
                row |= spread(value)
        elif isinstance(value, Mean):
            row[name] = float(value.total) / max(float(value.weight), 1e-9)
        elif isinstance(value, Peak):
            row[name] = float(value.value)
        else:
            row[name] = float(value) / max(weight, 1e-9)
    if state.bias:
        biases = [np.asarray(b) for b in jax.tree.leaves(state.bias)]
        row["bias_min"] = min(b.min() for b in biases)
        row["bias_max"] = max(b.max() for b in biases)
    return {name: _number(value) for name, value in row.items()}


def spread(load: dict[str, Any]) -> dict[str, float]:
    """How evenly experts are used: {"load": busiest over mean, worst layer; "dead_experts"}."""
    layers = [np.asarray(stack, float) for stack in load.values()]
    worst = max(float((a.max(-1) / np.maximum(a.mean(-1), 1e-9)).max()) for a in layers)
    return {"load": worst, "dead_experts": float(sum((a == 0).sum() for a in layers))}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed process left unfinished is dropped."""
    path, rows = Path(path), []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
            assert isinstance(row["step"], int)
        except (ValueError, KeyError, TypeError, AssertionError):
            continue
        rows.append(row)
    return rows


def _number(value: Any) -> Any:
    if isinstance(value, bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _present(row: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key, (title, how) in _COLUMNS.items():
        if key in row:
            yield key, title, how
        if key == "reward":
            yield from (
                (k, k.removeprefix("reward/"), ".3f") for k in row if k.startswith("reward/")
            )


def _width(title: str) -> int:
    return max(len(title), 7)
