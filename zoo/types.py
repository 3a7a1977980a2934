"""What the functions of this package hand to each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deepzoo.zoo.config import Config

if TYPE_CHECKING:
    from deepzoo.zoo.tokenizer import Tokenizer


class Model(NamedTuple):
    """A loaded model: everything that the functions of this package need, and no behaviour.

    Attributes:
        config: describes `params` exactly, also after a cast or after dropping the MTP layer.
        params: plain nested dict of jax.Array.
        tokenizer: None where the checkpoint has no tokenizer.json.
        name: of the shipped model, the hub repository or the directory.
        source: the directory that the weights were read from, None for a model made in memory.
    """

    config: Config
    params: dict[str, Any]
    tokenizer: "Tokenizer | None" = None
    name: str = ""
    source: Path | None = None
