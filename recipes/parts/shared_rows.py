"""Answers of different lengths side by side in rows, for updates whose padding would cost most.

N answers  T positions of prompt and answer  R rows  W positions of a row
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.recipes.parts.logprobs import Scored, score
from deepzoo.zoo.config import Config
from deepzoo.zoo.model import Params

ROWS = 8  # rows come in multiples of it: few programs are compiled, and meshes divide them


def shared(batch: dict[str, np.ndarray], width: int, packed: bool = True) -> dict[str, np.ndarray]:
    """Puts each answer with its prompt into the fullest row that has room, longest first.

    Args:
        batch: "tokens" int32 [N, T]; "ends" int [N], how many of them are no padding; "mask"
            float32 [N, T - 1], 1 where token t + 1 counts; and arrays [N] and [N, T - 1].
        width: W.
        packed: False leaves all as it is, but for "ends".

    Returns:
        `batch` with these in place of the first two: "rows" int32 [R, W]; "segments" int32 [R, W],
        the answer's number within its row, -1 for padding; "counted" bool [R, W - 1], the mask in
        its new place; "place" int32 [N, W - 1], where in those W - 1 positions of R rows, one row
        after the other, position t of answer n lies; behind its end it points anywhere. All arrays
        of T - 1 positions are as wide, so that only R makes another program.

    Raises:
        ValueError: an answer is longer than a row.
    """
    batch = dict(batch)
    ends = batch.pop("ends")
    if not packed:
        return batch
    tokens, spare = batch.pop("tokens"), width - batch["mask"].shape[1] - 1
    batch = {k: a if a.ndim == 1 else np.pad(a, ((0, 0), (0, spare))) for k, a in batch.items()}
    mask = batch["mask"]
    if ends.max() > width:
        raise ValueError(f"an answer of {ends.max()} tokens does not fit in rows of {width}")
    room: list[int] = []  # of each row
    count: list[int] = []  # of answers in it
    at = np.zeros((len(ends), 3), int)  # row, first position, segment
    for n in np.argsort(-ends, kind="stable").tolist():
        size = int(ends[n])
        fits = [r for r, left in enumerate(room) if left >= size]
        row = min(fits, key=lambda r: room[r]) if fits else len(room)
        if not fits:
            room.append(width)
            count.append(0)
        at[n] = row, width - room[row], count[row]
        room[row] -= size
        count[row] += 1
    rows = -(-len(room) // ROWS) * ROWS
    out = {
        "rows": np.zeros((rows, width), np.int32),
        "segments": np.full((rows, width), -1, np.int32),
        "counted": np.zeros((rows, width - 1), bool),
        "place": np.zeros(mask.shape, np.int32),
    }
    for n, (row, first, segment) in enumerate(at.tolist()):
        size = int(ends[n])
        whole, inner = slice(first, first + size), slice(first, first + size - 1)
        out["rows"][row, whole] = tokens[n, :size]
        out["segments"][row, whole] = segment
        out["counted"][row, inner] = mask[n, : size - 1] > 0
        out["place"][n, : size - 1] = row * (width - 1) + np.arange(first, first + size - 1)
    return batch | out


def scored(
    config: Config, params: Params, batch: dict[str, jax.Array], **options: Any
) -> tuple[Scored, jax.Array]:
    """What the model says of the answers of a batch, whether it went through `shared` or not.

    Args:
        config: the model.
        params: its parameters.
        batch: "tokens" [N, T] and "mask", optionally "experts" int32 [N, L, T - 1, K] to be
            replayed; or what `shared` makes of it.
        options: of `logprobs.score`.

    Returns:
        `Scored` with log-probabilities and entropies [N, T - 1], an answer a row; its routing is
        that of the rows as they were. And which of these rows' positions count, bool.
    """
    if "place" in batch:
        found = score(config, params, batch["rows"], batch["segments"], **options)
        logprobs, entropy = (a.reshape(-1)[batch["place"]] for a in found[:2])
        return Scored(logprobs, entropy, found.routing), batch["counted"]
    experts = batch.get("experts")
    given = None if experts is None else jnp.moveaxis(experts, 0, 1)
    return score(config, params, batch["tokens"], experts=given, **options), batch["mask"] > 0
