"""Every recipe's head says which papers it follows, and where it does not."""

import ast
import re
from pathlib import Path

import pytest

from deepzoo.zoo.cli import recipes

FILES = sorted(p for p in recipes.path("sft").parent.glob("*.py") if p.stem != "__init__")


def lacking(head: str) -> list[str]:
    """What the head of a recipe ought to have: a paper's number before a list of deviations."""
    told, *behind = re.split(r"^Deviations\b.*?:", head, maxsplit=1, flags=re.MULTILINE)
    found = []
    if not re.search(r"^Papers?: ", told, re.MULTILINE) or not re.search(
        r"\(arXiv\s\d{4}\.\d{5}\b", told
    ):
        found.append("Paper: name (arXiv number)")
    if not behind or not re.match(r"\s*(\* )?[\w`]", behind[0]):
        found.append("Deviations:")
    return found


def test_there_are_all_recipes():
    names = "distill dpo evaluate extend grpo pretrain r1 reject sft".split()
    assert [p.stem for p in FILES] == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_head_names_papers_and_deviations(path: Path):
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert head is not None
    assert lacking(head) == []


@pytest.mark.parametrize(
    ("head", "lacks"),
    [
        ("It trains.\n\nPaper: X (arXiv 2501.12948, 2.3).\n\nDeviations:\n* one", 0),
        ("It trains.\n\nPaper: X (arXiv 2501.12948).\n\nDeviations: more than one", 0),
        ("It trains.\n\nPaper: X (arXiv 2501.12948).", 1),
        ("It trains.\n\nPaper: X (arXiv 2501.12948).\n\nDeviations:\n", 1),
        ("It trains.\n\nPaper: X (Nature 645).\n\nDeviations:\n* one", 1),
        ("It trains.\n\nDeviations:\n* from X (arXiv 2501.12948)", 1),
        ("It trains.", 2),
    ],
)
def test_what_is_left_out_is_found(head: str, lacks: int):
    assert len(lacking(head)) == lacks
