"""Adds to the site what lies elsewhere in the repository: its pages, what they link to, the API.

The API's pages are written here from the names that the packages export; mkdocstrings fills them in
from the sources. Nothing of deepzoo is imported, so that building needs no JAX.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FIRST = ["README.md", "zoo/cookbook_*.md", "recipes/README.md", "kernels/README.md"]
LAST = ["[a-z]*/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ROADMAP.md", "SECURITY.md"]

# Where a page of the reference has its heading already.
_BARE = "    options: {show_root_heading: false, show_root_toc_entry: false}\n"
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s:]+)(?:#[^)]*)?\)|<img[^>]* src=\"([^\":]+)\"")


def on_config(config: Any) -> Any:
    """Writes the navigation: the pages, then the reference."""
    reference = [
        {title: [{_heading(text): name} for name, text in pages.items()]}
        for title, pages in api().items()
    ]
    config.nav = [*({_heading(_read(name)): name} for name in guides()), *reference]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds every page, and every file that one of them links to."""
    names = guides()
    for name in names:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            names += [linked for linked in _linked(name) if linked not in names]
    for pages in api().values():
        for name, text in pages.items():
            files.append(File.generated(config, name, content=text))
    return files


def guides() -> list[str]:
    """The repository's pages, in the order of the navigation."""
    found = [p for pattern in FIRST + LAST for p in sorted(ROOT.glob(pattern))]
    return list(dict.fromkeys(p.relative_to(ROOT).as_posix() for p in found))


def api() -> dict[str, dict[str, str]]:
    """The pages of the reference by section: path -> Markdown."""
    kernels = {
        f"api/kernels/{path.parent.name}.md": _package(path)
        for path in sorted(ROOT.glob("kernels/*/__init__.py"))
    }
    return {
        "API: zoo": {
            "api/zoo.md": _package(ROOT / "zoo/__init__.py"), "api/cli.md": command_line(),
        },
        "API: kernels": kernels,
        "API: recipes": _modules("recipes"),
        "API: parts of recipes": _modules("recipes/parts"),
    }  # fmt: skip


def _package(path: Path) -> str:
    """A package's docstring, and every name of its `__all__` from the module that has it."""
    tree = _parse(path)
    package = _module(path.parent)
    homes = dict(_imports(tree))
    parts = [f"# {package}", ast.get_docstring(tree) or ""]
    parts += [f"::: {homes[name]}.{name}" for name in _constant(tree, "__all__")]
    return "\n\n".join(parts) + "\n"


def _modules(folder: str) -> dict[str, str]:
    """A page for every module of a folder."""
    names = [_module(p.with_suffix("")) for p in sorted((ROOT / folder).glob("[a-z]*.py"))]
    return {
        f"api/{folder}/{name.rsplit('.', 1)[1]}.md": f"# {name}\n\n::: {name}\n{_BARE}"
        for name in names
    }


def command_line() -> str:
    """Every subcommand: what it does, its options, their defaults."""
    parts = ["# The command line", "`deepzoo COMMAND --help` tells the same."]
    shared = _classes(ROOT / "zoo/cli/options.py")
    for name in _constant(_parse(ROOT / "zoo/cli/__init__.py"), "COMMANDS"):
        classes = _classes(ROOT / f"zoo/cli/{name}.py")
        command = classes[name.capitalize()]
        bases = [ast.unparse(base).rpartition(".")[2] for base in command.bases]
        nodes = [*(shared[base] for base in bases if base in shared), command]
        rows = [row for node in nodes for row in _options(node)]
        table = ["| option | default | |", "|---|---|---|", *rows]
        parts += [f"## deepzoo {name}", ast.get_docstring(command) or "", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def _options(node: ast.ClassDef) -> Iterator[str]:
    for field, told in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(told, ast.Expr)):
            continue
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        option = f"--{name.replace('_', '-')}"
        default = "" if field.value is None else ast.unparse(field.value)
        if "Positional" in kind:
            shown = re.search(r"metavar='(.+?)'", kind)
            option = shown[1] if shown else name.upper()
        if hint := re.search(r"hint\((['\"])(.+?)\1\)", kind):
            default = hint[2]
        default = "" if default in ("''", "False", "None", "()") else default.strip("'")
        text = " ".join(ast.literal_eval(told.value).split()).replace("|", "\\|")
        yield f"| `{option}` | {default} | {text} |"


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _parse(path).body if isinstance(node, ast.ClassDef)}


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)


def _constant(tree: ast.Module, name: str) -> Any:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"no {name}")


def _linked(name: str) -> Iterator[str]:
    """Files of the repository that a page links to."""
    for found in _LINK.finditer(_read(name)):
        target = ((ROOT / name).parent / (found[1] or found[2])).resolve()
        if target.is_file() and target.is_relative_to(ROOT):
            yield target.relative_to(ROOT).as_posix()


def _module(path: Path) -> str:
    return ".".join(("deepzoo", *path.relative_to(ROOT).parts))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _heading(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.M)
    return found[1].replace("`", "") if found else "?"
