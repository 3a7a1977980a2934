"""What a person sees of a run, and what is kept of it: a progress line, and one JSON line a step in metrics.jsonl."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepzoo.recipes.parts.train import Hook, State


def row(state: State, metrics: dict[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
    """One line of metrics.jsonl: means, where the sums and weights of the step are divided.

    `expert_load` is the fullest expert's share over the mean, over all layers; 1 is perfectly even.
    """
    sums, weight = dict(metrics["sums"]), max(float(metrics["weight"]), 1e-9)
    load = sums.pop("load", {})
    made = {
        "step": int(state.step),
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "loss": float(metrics["loss"]),
        "norm": float(metrics["norm"]),
        "finite": bool(metrics["finite"]),
        "skipped": int(state.skipped),
    }
    for name, value in sums.items():
        if not name.endswith("_weight"):
            own = float(sums.get(f"{name}_weight", weight))
            made[name] = float(value) / max(own, 1e-9)
    if load:
        made["expert_load"] = max(float(np.max(imbalance(np.asarray(x)))) for x in load.values())
    return made


def imbalance(load: np.ndarray) -> np.ndarray:
    """[L, E] tokens of each expert -> [L] largest over mean; a layer that saw nothing counts as even."""
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.maximum(mean, 1e-9), 1.0)


@contextmanager
def reporting(
    total: int, tokens_per_step: int, file: Path | None, console: Console | None = None
) -> Iterator[Hook]:
    """A hook that shows loss, tokens a second, expert load and time left, and writes metrics.jsonl.

    Args:
        total: steps of the run.
        tokens_per_step: positions of a batch.
        file: where to append a line a step; None for nowhere.
        console: stderr by default. On a terminal one line is rewritten; elsewhere a line appears every 2% of the run.
    """
    console = console or Console(stderr=True)
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
    )
    began = last = time.monotonic()
    every, count, seen = max(1, total // 50), 0, 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=total)
        with open(file, "a", encoding="utf-8") if file else _nowhere() as lines:

            def hook(state: State, metrics: dict[str, Any]) -> None:
                nonlocal last, count, seen
                count += 1
                made = row(state, metrics, time.monotonic() - began, count * tokens_per_step)
                if lines is not None:
                    lines.write(json.dumps(made) + "\n")
                    lines.flush()
                text = f"loss {made['loss']:.3f}  load {made.get('expert_load', 1.0):.2f}"
                if count % every == 0 or count == 1:
                    now = time.monotonic()
                    rate = (count - seen) * tokens_per_step / max(now - last, 1e-9)
                    last, seen = now, count
                    bar.update(task, description=f"{text}  {rate:,.0f} tokens/s")
                    if not console.is_terminal:
                        left = (now - began) / count * (total - count)
                        console.print(
                            f"{made['step']}/{total}  {text}  {rate:,.0f} tokens/s  {left:.0f} s left",
                            highlight=False,
                        )
                bar.advance(task)

            yield hook


@contextmanager
def _nowhere() -> Iterator[None]:
    yield None
