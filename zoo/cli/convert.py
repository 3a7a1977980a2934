"""`deepzoo convert SRC DST`: a checkpoint in the other layout, or in another dtype."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepzoo.zoo.cli import options


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in the other layout or in another dtype.

    Every tensor is checked; DST appears whole or not at all.

    Example: deepzoo convert ./my-model ./my-model-fp8 --to hf --dtype float8
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A model that ships with deepzoo, or a local directory in either layout."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """A directory that does not exist yet, or is empty."""
    to: Literal["hf", "orbax"]
    """hf, the published layout, or orbax, the one of the recipes."""
    dtype: Annotated[options.Storage, options.hint("as stored")] = None
    """bfloat16 or float32, FP8 weights multiplied out; or float8, in blocks of 128 x 128."""
    no_mtp: options.Flag = False
    """Leave out the multi-token-prediction layers."""


def run(command: Convert) -> int:
    """Converts, says where the result is, and returns the exit status.

    Raises:
        DeepzooError: the source is damaged or the destination taken; nothing is written then.
    """
    options.check_name(command.source)
    from deepzoo.zoo.convert import convert

    written = convert(
        command.source,
        command.destination,
        to=command.to,
        dtype=command.dtype,
        mtp=not command.no_mtp,
    )
    print(written)
    return 0
