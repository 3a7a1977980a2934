"""`from deepzoo import zoo`: every public name is there, whatever was imported before."""

import ast
import inspect
from pathlib import Path
from types import ModuleType

import child
import pytest

from deepzoo import zoo

FILE = Path(inspect.getfile(zoo))


def _typed() -> dict[str, str]:
    """Name -> module of the imports that a type checker sees."""
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    (block,) = (
        n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    )
    return {
        alias.name: node.module.removeprefix("deepzoo.zoo.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def test_the_three_lists_of_names_agree():
    assert zoo.__all__ == sorted(zoo.__all__)
    assert _typed() == zoo._HOME  # pyright: ignore[reportAttributeAccessIssue]
    assert set(zoo.__all__) == set(_typed())


@pytest.mark.parametrize("name", zoo.__all__)
def test_a_name_is_the_object_of_its_module_and_no_submodule(name: str):
    assert not isinstance(getattr(zoo, name), ModuleType)
    assert getattr(zoo, name).__name__ == name
    assert name in dir(zoo)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        zoo.lode  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_functions_keep_their_names_when_submodules_of_that_name_are_imported_first():
    names = sorted(n for n in zoo.__all__ if (FILE.parent / f"{n}.py").is_file())
    assert {"cache", "card", "config", "convert", "generate", "load", "save"} <= set(names)
    child.run(
        f"""
        import importlib
        from deepzoo import zoo
        for name in {names}:
            module = importlib.import_module("deepzoo.zoo." + name)
            assert module.__name__ == "deepzoo.zoo." + name
            assert callable(getattr(zoo, name)), name
            assert getattr(module, name, None) in (None, getattr(zoo, name)), name
        """
    )


def test_the_package_imports_no_jax_until_something_needs_it():
    child.run("import sys; from deepzoo import zoo; assert not {'jax', 'flax'} & set(sys.modules)")


def test_listing_the_models_imports_no_jax():
    """It would take four times as long."""
    child.run(
        """
        import sys
        from deepzoo.zoo.cli import main
        assert main(["models"]) == 0
        assert not {"jax", "flax"} & set(sys.modules)
        """
    )
