"""Models, weights, tokenizers and generation for the V2 and R1 families."""

if __name__ != "deepzoo.zoo":  # a bare `import zoo` would make a second copy of every class
    raise ImportError(f"import this package as `deepzoo.zoo`, not as `{__name__}`")

from deepzoo.zoo.cache import Cache, cache
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
from deepzoo.zoo.model import Output
from deepzoo.zoo.rope import RopeScaling

__all__ = [
    "Cache",
    "Config",
    "DeepzooError",
    "Output",
    "Quantization",
    "RopeScaling",
    "abstract",
    "apply",
    "apply_mtp",
    "axes",
    "bind",
    "cache",
    "init",
    "shardings",
    "stack",
    "unstack",
]
