"""What a run says while it runs: a line of progress, a table row now and then, metrics.jsonl."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepzoo.recipes.parts.train import State


class Log:
    """A hook for `fit`; use it as a context manager.

    Every `every` steps one JSON object goes to `path`: step, loss, nll (of the next token),
    tokens, seconds, tokens_per_second, norm, skipped, load (tokens of the busiest expert over the
    mean, worst layer), balance, mtp0 where there is one.
    """

    def __init__(self, path: Path, steps: int, tokens_per_step: int, every: int = 10):
        self._path, self._steps, self._tokens, self._every = path, steps, tokens_per_step, every
        self._begin = self._last = time.perf_counter()
        self._rows = 0
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("compiling", total=steps)

    def __enter__(self) -> Self:
        self._file = self._path.open("w", encoding="utf-8")
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()

    def __call__(self, state: State, metrics: dict[str, Any]) -> None:
        """Takes note of a step."""
        step = int(state.step)
        if step % self._every and step not in (1, self._steps):
            self._progress.update(self._task, completed=step)
            return
        now = time.perf_counter()
        count = 1 if step == 1 else step % self._every or self._every
        sums, weight = metrics["sums"], float(metrics["weight"])
        row = {
            "step": step,
            "loss": float(metrics["loss"]),
            "nll": float(sums["nll"]) / weight,
            "tokens": step * self._tokens,
            "seconds": now - self._begin,
            "tokens_per_second": count * self._tokens / (now - self._last),
            "norm": float(metrics["norm"]),
            "skipped": int(state.skipped),
            "load": imbalance(sums["load"]),
            "balance": float(sums["balance"]) / weight,
        }
        if "mtp0" in sums:
            row["mtp0"] = float(sums["mtp0"]) / max(float(sums["mtp0_weight"]), 1.0)
        self._last = now
        json.dump(row, self._file)
        self._file.write("\n")
        self._file.flush()
        line = (
            f"nll {row['nll']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"busiest expert {row['load']:.2f}x  skipped {row['skipped']}"
        )
        self._progress.update(self._task, completed=step, description=line)
        if step * 20 // self._steps > self._rows or step == 1:
            self._rows = step * 20 // self._steps
            left = (now - self._begin) / step * (self._steps - step)
            self._console.print(
                f"step {step:>6}  {line}  {left / 60:.1f} min left", highlight=False
            )


def imbalance(load: dict[str, Any]) -> float:
    """Tokens of the busiest expert over the mean, in the worst layer; NaN without experts."""
    layers = [np.asarray(stack, float) for stack in load.values()]
    return max((float((a.max(-1) / a.mean(-1)).max()) for a in layers), default=float("nan"))
