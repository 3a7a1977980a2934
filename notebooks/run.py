"""Runs notebooks in clean kernels and empty folders, and writes their outputs back.

    python notebooks/run.py                   # all of them
    python notebooks/run.py 02 05             # those whose names begin so
    python notebooks/run.py --html DIR 02     # the same, and pages as a browser shows them

A cell that fails, warns, or prints a path of this machine ends it, and nothing is written: what is
committed is what everybody sees. Needs the extras `notebooks` and `aot`.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
LIMIT = 240  # seconds of a notebook
# One machine's notebook is not to differ from another's, so without its GPU; Python's warnings are
# shown, the compiler's remarks on how slow this machine is are not.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default", "TF_CPP_MIN_LOG_LEVEL": "3"}
_MEMORY = re.compile(r" at 0x[0-9a-f]+")


class NotebookError(RuntimeError):
    """A notebook that must not be committed as it is."""


def names(begin: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of `begin`, all without any.

    Raises:
        NotebookError: none does.
    """
    found = sorted(FOLDER.glob("[0-9]*.ipynb"))
    for start in begin:
        if not any(path.name.startswith(start) for path in found):
            raise NotebookError(f"no notebook begins with {start!r}")
    return [p for p in found if not begin or p.name.startswith(tuple(begin))]


def read(path: Path) -> Any:
    """A notebook as nbformat has it."""
    return nbformat.read(path, as_version=4)


def executed(path: Path, limit: float = LIMIT) -> Any:
    """The notebook with the outputs of a fresh run, each cell of which may take `limit` seconds.

    Raises:
        NotebookError: a cell failed, took too long, warned, or named this machine.
    """
    book = read(path)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENT)
        try:
            client = NotebookClient(
                book, timeout=limit, kernel_name="python3", record_timing=False,
                resources={"metadata": {"path": folder}},
                extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
            client.execute()
        except Exception as error:
            raise NotebookError(f"{path.name}: {error}") from error
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        machine = {str(Path.home()), str(FOLDER.parent), folder, sys.prefix}
    clean(book)
    for number, text in enumerate(map(printed, book.cells)):
        if named := [place for place in machine if len(place) > 4 and place in text]:
            raise NotebookError(f"{path.name}, cell {number}: its output names {named[0]}")
    return book


def clean(book: Any) -> None:
    """Takes out what differs from run to run, and joins what a cell printed in pieces.

    Raises:
        NotebookError: something was written to stderr, where warnings go.
    """
    book.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(book.cells):
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        joined: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookError(f"cell {number} wrote to stderr: {output.text.strip()}")
            output.pop("transient", None)
            if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if "data" in output and "text/plain" in output.data:
                output.data["text/plain"] = _MEMORY.sub("", output.data["text/plain"])
        cell.outputs = joined


def printed(cell: Any) -> str:
    """All the text a code cell's outputs hold."""
    texts = []
    for output in cell.get("outputs", ()):
        texts.append(output.get("text", ""))
        texts.append(output.get("data", {}).get("text/plain", ""))
    return "\n".join("".join(text) for text in texts)


def html(book: Any, path: Path) -> None:
    """Writes the page that JupyterLab's own templates make of it."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(template_name="lab").from_notebook_node(book)
    path.write_text(page, encoding="utf-8")


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--html", type=Path, help="folder for rendered pages")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a cell may take")
    told = parser.parse_args()
    try:
        for path in names(told.names):
            begin = time.perf_counter()
            book = executed(path, told.limit)
            nbformat.write(book, path)
            size = path.stat().st_size / 1024
            print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {size:.0f} KiB", flush=True)
            if told.html:
                told.html.mkdir(parents=True, exist_ok=True)
                html(book, told.html / f"{path.stem}.html")
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
