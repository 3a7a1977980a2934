"""Digests of published files, which prove equality key by key and tensor by tensor without a copy.

The tables `tests/data/configs.json` and `tests/data/tensors.json` were made by

    python tests/helpers/digests.py configs FOLDER     FOLDER: <repository name>.json, each one a
                                                       published config.json
    python tests/helpers/digests.py tensors LISTING    LISTING: JSON, architecture -> {models,
                                                       on_disk: {pattern: {shape, dtype}}}

from files that are not part of this repository.
"""

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
FAMILIES = {"deepseek_v2", "deepseek_v3", "kimi_k2", "qwen2", "qwen3", "llama"}


def digest_config(config: dict) -> str:
    """SHA-256 of the canonical text: keys sorted, no blanks, 1 and 1.0 told apart."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def line(name: str, shape: Iterable[int], dtype: str) -> str:
    """One tensor as a line of the digested text."""
    return f"{name} {'x'.join(map(str, shape))} {dtype}"


def digest_tensors(lines: Iterable[str]) -> str:
    """SHA-256 of the sorted lines of all tensors of a checkpoint."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def expand(pattern: str) -> Iterator[str]:
    """`layers.{0..2}.x` -> three names; `{a,b..c,d}` lists numbers and ranges."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices: list[list[str]] = [[part] for part in parts]
    for i in range(1, len(parts), 2):
        choices[i] = []
        for piece in parts[i].split(","):
            first, _, last = piece.partition("..")
            choices[i] += map(str, range(int(first), int(last or first) + 1))
    return map("".join, itertools.product(*choices))


def tensor_lines(on_disk: dict[str, dict]) -> Iterator[str]:
    """The lines of every tensor of a listing with collapsed indices."""
    for pattern, tensor in on_disk.items():
        for name in expand(pattern):
            yield line(name, tensor["shape"], tensor["dtype"])


def _configs(folder: Path) -> dict[str, str]:
    published = {p.stem.lower(): json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    return {n: digest_config(c) for n, c in published.items() if c.get("model_type") in FAMILIES}


def _tensors(listing: Path, models: Iterable[str]) -> dict[str, dict]:
    found = {}
    for architecture, entry in json.loads(listing.read_text()).items():
        names = sorted(m.lower() for m in entry.get("models", ()) if m.lower() in models)
        if not names or "on_disk" not in entry:
            continue
        lines = list(tensor_lines(entry["on_disk"]))
        shapes = [text.split(" ")[1] for text in lines]
        found[architecture] = {
            "models": names,
            "tensors": len(lines),
            "elements": sum(math.prod(map(int, shape.split("x"))) for shape in shapes),
            "sha256": digest_tensors(lines),
        }
    return found


if __name__ == "__main__":
    what, source = sys.argv[1], Path(sys.argv[2])
    if what == "configs":
        table: dict = _configs(source)
    else:
        table = _tensors(source, json.loads((DATA / "configs.json").read_text()))
    (DATA / f"{what}.json").write_text(json.dumps(table, indent=1) + "\n")
