"""Documents packed into rows."""

from collections.abc import Iterator

import numpy as np


def pack(
    documents: Iterator[tuple[list[int], int]], rows: int, length: int
) -> dict[str, np.ndarray]:
    """Fills rows with documents one after the other; the last of each row is cut off.

    Args:
        documents: endless pairs of token ids and how many of the first ones are given: they are
            read, not learned.
        rows: rows of the batch.
        length: positions the model sees; one more is stored, since targets lie one to the right.

    Returns:
        Arrays [rows, length + 1]: "tokens" int32; "segments" int32, a document's number within its
        row; "weights" float32, what each token counts as a target: 0 for given ones, else 1.
    """
    tokens = np.zeros((rows, length + 1), np.int32)
    segments = np.zeros((rows, length + 1), np.int32)
    weights = np.zeros((rows, length + 1), np.float32)
    for row in range(rows):
        filled, segment = 0, 0
        while filled <= length:
            document, given = next(documents)
            end = min(filled + len(document), length + 1)
            tokens[row, filled:end] = document[: end - filled]
            segments[row, filled:end] = segment
            weights[row, filled + given : end] = 1
            filled, segment = end, segment + 1
    return {"tokens": tokens, "segments": segments, "weights": weights}
