"""Draws what r1-nano writes, the picture of the README: python docs/thinking.py"""

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from deepzoo import zoo

ASKED = "Make 75 from 12, 7, 9."


def main() -> None:
    """Writes docs/thinking.svg."""
    (made,) = zoo.generate(zoo.load("r1-nano", dtype="float32"), [ASKED], max_tokens=552)
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True)
    console.print(Text(f'$ deepzoo generate r1-nano "{ASKED}"', style="bold"))
    console.print(Text("<think>", style="dim"))
    for line in (made.thinking or "").strip().split("\n"):
        console.print(Text(line, style="bold green" if line.endswith("yes") else "dim"))
    console.print(Text("</think>", style="dim"))
    console.print(Text(made.answer.strip(), style="bold"))
    path = Path(__file__).parent / "thinking.svg"
    path.write_text(console.export_svg(title="r1-nano, 1.4M parameters"), encoding="utf-8")


if __name__ == "__main__":
    main()
