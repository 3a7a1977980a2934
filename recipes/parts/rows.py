"""Documents to rows of a batch; row r of epoch e is a pure function of (seed, e, r).

The order of documents comes from grain, another one each epoch; what goes into a row follows from
the lengths alone, so nothing has to be remembered for resuming.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import numpy as np

from deepzoo.recipes.parts.documents import Documents
from deepzoo.recipes.parts.records import DataError

type Overlong = Literal["error", "cut", "drop"]


class Plan(NamedTuple):
    """Which part of which document lies where, for all rows of an epoch.

    Attributes:
        first: int64 [R + 1], the spans of row r are first[r] to first[r + 1].
        document: int64 [S], tokens begin to end of a document.
        begin: int64 [S], its first token in that document.
        end: int64 [S], behind its last one.
    """

    first: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.first) - 1


class Rows:
    """Batches of packed documents for next-token losses.

    Args:
        made: the documents.
        rows: of a batch.
        length: positions the model sees; one more is stored, since targets lie one to the right.
        split: True joins all documents and cuts the stream into rows (pretraining: no position is
            empty); False keeps each document whole and starts the next row where it does not fit
            (fine-tuning).
        masked: True gives every document a segment of its own, so that it sees only itself; False
            one for the whole row (V3 report, 4.1, pretrains like that).
        overlong: what to do with a document longer than a row, where they are kept whole.
        seed: of the order.

    Raises:
        DataError: a document does not fit and `overlong` is "error", with its place; or nothing is
            left.
    """

    def __init__(
        self,
        made: Documents,
        *,
        rows: int,
        length: int,
        split: bool = False,
        masked: bool = True,
        overlong: Overlong = "error",
        seed: int = 0,
    ):
        self.documents, self.rows, self.length = made, rows, length
        self._split, self._masked = split, masked
        lengths = made.lengths
        room = length + 1
        keep = np.arange(len(lengths))
        if not split:
            too_long = np.flatnonzero(lengths > room)
            if len(too_long) and overlong == "error":
                where = int(too_long[0])
                raise DataError(
                    f"{made.places[where]}: has {lengths[where]} tokens, a row holds {room}"
                    f" ({len(too_long)} of {len(lengths)} documents are too long); take longer"
                    " rows, or say that such documents are cut or dropped"
                )
            if overlong == "drop":
                keep = np.setdiff1d(keep, too_long)
                if not len(keep):
                    raise DataError(f"no document fits into {room} tokens")
        self._keep, self._lengths = keep, lengths if split else np.minimum(lengths, room)
        if split and lengths.sum() < room:
            raise DataError(
                f"the data has {lengths.sum()} tokens, fewer than one row of {room}; take shorter"
                " rows"
            )
        # Reading a MapDataset by its index: shuffled anew each time round.
        import grain

        order = grain.MapDataset.source(range(len(keep))).seed(seed).shuffle().repeat()
        self._order = cast(Callable[[int], int], order.__getitem__)
        self._ends = [0]  # rows of all epochs before
        self.plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> Plan:
        count = len(self._keep)
        order = self._keep[[self._order(epoch * count + i) for i in range(count)]]
        lengths = self._lengths[order]
        if self._split:
            return _stream(order, lengths, self.length)
        return _whole(order, lengths, self.length + 1)

    def epoch_of(self, row: int) -> tuple[int, int]:
        """(epoch, row within it) of a row counted from the beginning of the run."""
        while row >= self._ends[-1]:
            self._ends.append(self._ends[-1] + self.plan(len(self._ends) - 1).rows)
        epoch = int(np.searchsorted(self._ends, row, side="right")) - 1
        return epoch, row - self._ends[epoch]

    def steps(self, epochs: int) -> int:
        """Batches of so many epochs; the last may reach into the next epoch."""
        total = sum(self.plan(epoch).rows for epoch in range(epochs))
        return -(-total // self.rows)

    def __call__(self, step: int, first: int | None = None, rows: int | None = None):
        """The batch of a step.

        Args:
            step: from 0 on.
            first: the first row, where batches are of different sizes (`schedules.ramp`).
            rows: of this batch, instead of all batches'.

        Returns:
            Arrays [rows, length + 1]: "tokens" int32; "segments" int32; "weights" float32, what
            each token counts as a target. Empty places have weight 0 and a segment of their own.
        """
        rows = self.rows if rows is None else rows
        first = step * self.rows if first is None else first
        shape = (rows, self.length + 1)
        out = {
            "tokens": np.zeros(shape, np.int32),
            "segments": np.full(shape, -1, np.int32),
            "weights": np.zeros(shape, np.float32),
        }
        for row in range(rows):
            epoch, at = self.epoch_of(first + row)
            plan = self.plan(epoch)
            filled = 0
            for number, span in enumerate(range(plan.first[at], plan.first[at + 1])):
                document, begin, end = plan.document[span], plan.begin[span], plan.end[span]
                place = slice(filled, filled + end - begin)
                start = self.documents.starts[document]
                out["tokens"][row, place] = self.documents.tokens[start + begin : start + end]
                out["segments"][row, place] = number if self._masked else 0
                learned = np.arange(begin, end) >= self.documents.given[document]
                out["weights"][row, place] = learned
                filled = place.stop
        return out


def _whole(order: np.ndarray, lengths: np.ndarray, room: int) -> Plan:
    """Each document whole, in order, in the row that is being filled or the next one."""
    first, filled = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if filled + length > room and filled:
            first.append(i)
            filled = 0
        filled += length
    first.append(len(order))
    return Plan(np.array(first), order, np.zeros_like(lengths), lengths)


def _stream(order: np.ndarray, lengths: np.ndarray, length: int) -> Plan:
    """All documents end to end; rows overlap by one token, the last target of one is read in the
    next. What does not fill a last row waits for another epoch's order."""
    ends = np.cumsum(lengths)
    rows = int((ends[-1] - 1) // length)
    cuts = np.arange(rows) * length
    first, document, begin, end = [0], [], [], []
    for cut in cuts.tolist():
        low, high = cut, cut + length + 1
        i = int(np.searchsorted(ends, low, side="right"))
        while low < high:
            start = int(ends[i] - lengths[i])
            stop = min(high, int(ends[i]))
            document.append(int(order[i]))
            begin.append(low - start)
            end.append(stop - start)
            low, i = stop, i + 1
        first.append(len(document))
    return Plan(np.array(first), np.array(document), np.array(begin), np.array(end))
