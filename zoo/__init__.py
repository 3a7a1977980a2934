"""Models, weights, tokenizers and generation for the V2 and R1 families."""

if __name__ != "deepzoo.zoo":  # a bare `import zoo` would make a second copy of every class
    raise ImportError(f"import this package as `deepzoo.zoo`, not as `{__name__}`")

from deepzoo.zoo.cache import Cache, cache
from deepzoo.zoo.catalog import card, config, models
from deepzoo.zoo.checkpoint import save
from deepzoo.zoo.config import Config, Quantization
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
from deepzoo.zoo.load import load
from deepzoo.zoo.model import Output
from deepzoo.zoo.rope import RopeScaling
from deepzoo.zoo.types import Model

__all__ = [
    "Cache",
    "Config",
    "DeepzooError",
    "Model",
    "Output",
    "Quantization",
    "RopeScaling",
    "abstract",
    "apply",
    "apply_mtp",
    "axes",
    "bind",
    "cache",
    "card",
    "config",
    "init",
    "load",
    "models",
    "save",
    "shardings",
    "stack",
    "unstack",
]
