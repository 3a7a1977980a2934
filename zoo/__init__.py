"""Models, weights, tokenizers and generation for the V2 and R1 families.

The names below are imported when they are first used, so that the command line and programs that
need only a config start at once. To add one: a line in the imports, one in `__all__`, one in
`_HOMES`; tests/zoo/test_public.py compares the three.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ != "deepzoo.zoo":  # a bare `import zoo` would make a second copy of every class
    raise ImportError(f"import this package as `deepzoo.zoo`, not as `{__name__}`")

if TYPE_CHECKING:
    from deepzoo.zoo.cache import Cache, cache
    from deepzoo.zoo.catalog import card, config, models
    from deepzoo.zoo.checkpoint import save
    from deepzoo.zoo.config import Config, Quantization
    from deepzoo.zoo.convert import convert
    from deepzoo.zoo.errors import DeepzooError
    from deepzoo.zoo.functional import (
        abstract,
        apply,
        apply_mtp,
        axes,
        bind,
        init,
        shardings,
        stack,
        unstack,
    )
    from deepzoo.zoo.generate import Completion, Options, Statistics, generate, stream
    from deepzoo.zoo.load import load
    from deepzoo.zoo.model import Output
    from deepzoo.zoo.rope_scaling import RopeScaling
    from deepzoo.zoo.save import save_hf
    from deepzoo.zoo.types import Model

__all__ = [
    "Cache",
    "Completion",
    "Config",
    "DeepzooError",
    "Model",
    "Options",
    "Output",
    "Quantization",
    "RopeScaling",
    "Statistics",
    "abstract",
    "apply",
    "apply_mtp",
    "axes",
    "bind",
    "cache",
    "card",
    "config",
    "convert",
    "generate",
    "init",
    "load",
    "models",
    "save",
    "save_hf",
    "shardings",
    "stack",
    "stream",
    "unstack",
]

_HOMES = {
    "cache": "Cache cache",
    "catalog": "card config models",
    "checkpoint": "save",
    "config": "Config Quantization",
    "convert": "convert",
    "errors": "DeepzooError",
    "functional": "abstract apply apply_mtp axes bind init shardings stack unstack",
    "generate": "Completion Options Statistics generate stream",
    "load": "load",
    "model": "Output",
    "rope_scaling": "RopeScaling",
    "save": "save_hf",
    "types": "Model",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package; a function of it that is called like a submodule keeps the name.

    The import system binds every submodule to its name in the package, here `load` to the module
    `deepzoo.zoo.load`; left to it, `zoo.load` would be either by the order of imports.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
