"""Records from files: JSONL, Parquet, folders of text; each can be read by its number.

What is wrong with a file is told with its name and line before training begins.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepzoo.zoo.errors import DeepzooError

type Record = Mapping[str, Any]


class DataError(DeepzooError):
    """Training data that cannot be used; the message names file, line and what was expected."""


def read(path: str | Path) -> "Records":
    """The records of a file or of all files in a folder.

    Args:
        path: *.jsonl, *.parquet (needs pyarrow), *.txt (one record {"text": ...} a file), or a
            folder of one of these kinds, read in the order of the names.

    Raises:
        DataError: nothing there, several kinds, an empty file, a line that is no JSON object.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{root}: does not exist; name a .jsonl, .parquet or .txt file or a folder")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    kinds = {p.suffix for p in files if p.suffix in _READERS}
    if len(kinds) != 1:
        found = " and ".join(sorted(kinds)) or "none of them"
        raise DataError(f"{root}: expected .jsonl, .parquet or .txt files of one kind, got {found}")
    kind = kinds.pop()
    records: list[Record] = []
    places: list[str] = []
    for file in (p for p in files if p.suffix == kind):
        before = len(records)
        for place, record in _READERS[kind](file):
            records.append(record)
            places.append(place)
        if len(records) == before:
            raise DataError(f"{file}: is empty; remove it or fill it")
    return Records(records, places)


class Records(Sequence):
    """Records with the place each came from, such as "train.jsonl:17", for messages."""

    def __init__(self, records: list[Record], places: list[str]):
        self._records, self.places = records, places

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def field(self, index: int, name: str) -> str:
        """A text of a record.

        Raises:
            DataError: it is missing, empty or no text; with file and line.
        """
        value = self._records[index].get(name)
        if not isinstance(value, str) or not value:
            kind = "is missing" if value is None else "is empty" if value == "" else "is no text"
            has = ", ".join(sorted(map(str, self._records[index]))) or "nothing"
            raise DataError(f"{self.places[index]}: field {name!r} {kind}; the record has {has}")
        return value


def _jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = getattr(error, "msg", None) or str(error).split("\n")[0]
                raise DataError(f"{path}:{number}: is not JSON ({what}); mend the line") from None
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise DataError(f"{path}:{number}: expected a JSON object, got {kind}")
            yield f"{path}:{number}", record


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install 'deepzoo[parquet]'"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        what = str(error).split("\n")[0]
        raise DataError(f"{path}: cannot be read as Parquet ({what})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _text(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}") from None
    if text:
        yield str(path), {"text": text}


_READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _text}
