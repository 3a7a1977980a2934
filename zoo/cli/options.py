"""Options that several commands share: which model, and how to sample from it."""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from deepzoo.zoo import catalog
from deepzoo.zoo.errors import RequestError

if TYPE_CHECKING:
    from deepzoo.zoo.types import Model


def _value(
    name: str, kind: Callable[[str], Any], expected: str, choices: tuple[str, ...] | None = None
) -> PrimitiveConstructorSpec[Any]:
    """One word from the command line as `kind`; a mistake says what was expected."""

    def convert(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"expected {expected}, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=name,
        choices=choices,
        instance_from_str=convert,
        is_instance=lambda value: value is None or isinstance(value, int | float | str | Path),
        str_from_instance=lambda value: [str(value)],
    )


def hint(text: str) -> Any:
    """What help says of a default that is not a value itself."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


_DTYPES = ("bfloat16", "float32")

Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Number = Annotated[float | None, _value("NUMBER", float, "a number")]
Count = Annotated[int, _value("COUNT", int, "a whole number")]
Seed = Annotated[int, _value("NUMBER", int, "a whole number")]
Text = Annotated[str | None, _value("TEXT", str, "text")]
Name = Annotated[str | None, _value("NAME", str, "a name")]
File = Annotated[Path | None, _value("FILE", Path, "a file")]
Dtype = Annotated[str | None, _value("DTYPE", str, "a dtype", _DTYPES)]
Storage = Annotated[str | None, _value("DTYPE", str, "a dtype", (*_DTYPES, "float8"))]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model, and in which form."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model that ships with deepzoo, a local directory, or with --download a hub id."""
    dtype: Annotated[Dtype, hint("as stored")] = None
    """Cast to bfloat16 or float32."""
    no_mtp: Flag = False
    """Leave out the multi-token-prediction layers; only --speculative uses them."""
    download: Flag = False
    """Fetch the model from the hub if it is not here."""
    revision: Annotated[Name, hint("the newest")] = None
    """Of the hub repository; a commit hash pins it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens."""

    max_tokens: Count = 256
    """The longest answer, in tokens."""
    temperature: Annotated[Number, hint("the model's")] = None
    """0 always takes the likeliest token."""
    top_p: Annotated[Number, hint("the model's")] = None
    """Choose among the likeliest tokens that reach this share together."""
    top_k: Annotated[Count, hint("0, all")] = 0
    """Choose among this many of the likeliest tokens."""
    min_p: Annotated[Number, hint("0, all")] = 0.0
    """Choose among tokens at least this share as likely as the likeliest."""
    seed: Seed = 0
    """The same seed and options give the same answer."""
    stop: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="TEXT", help_behavior_hint="(may be repeated)"),
    ] = ()
    """End the answer before this text."""
    speculative: Flag = False
    """Draft tokens with the MTP layer: the same distribution, in fewer passes."""
    thinking: Flag = False
    """Think before answering, for models with both modes."""
    no_thinking: Flag = False
    """Answer at once, for models with both modes."""
    format: Annotated[Name, hint("the model's")] = None
    """Chat format to use instead of the model's own, such as r1 or plain."""


def sampling(options: Sampling) -> dict[str, Any]:
    """Keyword arguments of `zoo.generate` and `zoo.stream`, checked before a model is loaded.

    Raises:
        RequestError: an option out of its range, an unknown format, options that exclude each
            other.
    """
    from deepzoo.zoo.chat import chat_format
    from deepzoo.zoo.generate import check_options

    temperature = 0.0 if options.temperature is None else options.temperature
    top_p = 1.0 if options.top_p is None else options.top_p
    min_p = 0.0 if options.min_p is None else options.min_p
    check_options(
        options.max_tokens, temperature, top_p, options.top_k, min_p, options.seed, options.stop
    )
    if options.thinking and options.no_thinking:
        raise RequestError("--thinking and --no-thinking exclude each other; give one")
    if options.speculative and isinstance(options, Source) and options.no_mtp:
        raise RequestError("--speculative needs the layers that --no-mtp leaves out; give one")
    if options.format is not None:
        chat_format(options.format)
    return {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": min_p,
        "seed": options.seed,
        "stop": options.stop,
        "speculative": options.speculative,
        "thinking": True if options.thinking else False if options.no_thinking else None,
        "format": options.format,
    }


def load_model(options: Source) -> "Model":
    """The model that the options name.

    Raises:
        DeepzooError: there is none, or it is damaged.
    """
    if options.revision is not None and not options.download:
        raise RequestError("--revision is of a hub repository; add --download")
    check_name(options.model)
    from deepzoo.zoo.load import load

    return load(
        options.model,
        dtype=options.dtype,
        mtp=not options.no_mtp,
        download=options.download,
        revision=options.revision,
    )


def check_roles(model: "Model", format: str | None) -> None:
    """Raises RequestError if the model, or the format asked for, has no roles."""
    from deepzoo.zoo.prompt import format_of

    if not format_of(model, format).chat:
        raise RequestError(
            f"{model.name} continues plain text and has no place for a system message; leave it out"
        )


def check_name(source: str) -> None:
    """Raises ConfigError with the nearest names if `source` is a name that nobody knows."""
    if not source or (os.sep not in source and not os.path.lexists(Path(source).expanduser())):
        catalog.card(source)


def stdin() -> BinaryIO:
    """Bytes of the standard input; raises RequestError where it is closed."""
    if sys.stdin is None:
        raise RequestError("stdin is closed, so nothing can be read from it")
    return sys.stdin.buffer


def utf8(data: bytes, name: str) -> str:
    """Text of `data`; raises RequestError that names where it came from and the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def finite(numbers: list[float]) -> list[float | None]:
    """Numbers as JSON can hold them: null for infinities and NaN."""
    return [number if math.isfinite(number) else None for number in numbers]
