"""The cookbooks do what they say: their blocks are run in order, or their flags are checked."""

from pathlib import Path

import child
import pages
import pytest

from deepzoo import zoo
from deepzoo.zoo.errors import DeepzooError

FOLDER = Path(str(zoo.__file__)).parent
NAMES = sorted(path.stem for path in FOLDER.glob("cookbook_*.md"))
PARTS = ["Load", "Generate", "Fine-tune", "Export", "Pitfalls"]


def test_there_is_one_for_each_family():
    assert NAMES == ["cookbook_r1", "cookbook_students", "cookbook_v2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_all_parts_and_right_flags(name: str):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == PARTS
    for block in pages.blocks(text):
        pages.check(block)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_runs(name: str, tmp_path: Path):
    source = """
        import os, sys, pages
        from pathlib import Path
        os.chdir(sys.argv[2])
        assert pages.run_all(Path(sys.argv[1])) >= 5
    """
    # In a child that spends half the time on compiling, as it runs each program once.
    child.run(source, str(FOLDER / f"{name}.md"), str(tmp_path))


PAGE = """
```python
x = 3
print(x)
```
```text
{printed}
```

*Needs a GPU.* And more
than a line.
```sh
deepzoo generate {flags}
```
"""


def test_a_page_that_lies_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    first, second = pages.blocks(PAGE.format(printed="3", flags="m p --json"))
    assert (first.marked, second.marked) == (False, True)
    assert pages.run(first, {}) == "3\n"
    pages.check(second)
    wrong, other = pages.blocks(PAGE.format(printed="4", flags="m p --jsno"))
    with pytest.raises(AssertionError, match="line 2 prints\n3"):
        pages.run(wrong, {})
    with pytest.raises(DeepzooError, match="--jsno"):
        pages.check(other)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("```sh\nrm -r x\n```", "not a command of deepzoo"),
        ("```bash\nls\n```", "neither run nor compared"),
        ("```text\n3\n```", "no block above"),
        ("```python\nzoo.laod('x')\n```", "zoo.laod does not exist"),
        ("```python\nzoo.load('x', dowload=True)\n```", "unexpected keyword argument 'dowload'"),
        ("```sh\ndeepzoo train sft --out x --stpes 3\n```", "no option --stpes"),
        ("```sh\ndeepzoo trian sft\n```", "no command trian"),
    ],
)
def test_a_block_that_cannot_be_right_is_found(source: str, told: str):
    with pytest.raises((ValueError, AssertionError, TypeError, DeepzooError), match=told):
        for block in pages.blocks(source):
            pages.check(block)
