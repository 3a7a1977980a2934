"""`deepzoo generate MODEL PROMPT...`: answers."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deepzoo.zoo.cli import display, options
from deepzoo.zoo.errors import RequestError

if TYPE_CHECKING:
    from deepzoo.zoo.generate import Statistics
    from deepzoo.zoo.prompt import Messages
    from deepzoo.zoo.types import Model


@dataclass(frozen=True, kw_only=True)
class Generate(options.Sampling, options.Source):
    """Answer prompts.

    Example: deepzoo generate v2-nano "47 + 38 ="
    """

    prompts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[PROMPT ...]", help_behavior_hint=""),
    ] = ()
    """What to answer; - reads one prompt from stdin. After -- a prompt may begin with a dash."""
    file: Annotated[options.File, options.hint("none")] = None
    """Read more prompts from a file, one a line; - is stdin."""
    system: Annotated[options.Text, options.hint("none")] = None
    """What the model is told before each prompt."""
    raw: options.Flag = False
    """Continue the prompt as it is, without the chat format."""
    json: options.Flag = False
    """Print one JSON object a line for each prompt."""
    stats: options.Flag = False
    """Say on stderr how long it took."""


def run(command: Generate) -> int:
    """Answers every prompt and returns the exit status.

    Raises:
        DeepzooError: a prompt, an option or a model that cannot be used; nothing is printed then.
    """
    chosen = options.sampling(command) | {"raw": command.raw}
    prompts = _prompts(command)
    if command.raw and command.system is not None:
        raise RequestError("--raw continues a text, which has no place for --system; leave out one")
    begun = time.perf_counter()
    model = options.load_model(command)
    clock = _Clock(begun, time.perf_counter())
    if command.system is not None:
        options.check_roles(model, command.format)
    asked = [_with_system(prompt, command.system) for prompt in prompts]
    if command.json or len(prompts) > 1:
        _all(command, model, prompts, asked, chosen, clock)
    else:
        _one(command, model, asked[0], chosen, clock)
    return 0


@dataclass
class _Clock:
    begun: float
    loaded: float
    first: float | None = None

    def timing(self, statistics: "Statistics") -> dict[str, Any]:
        """Seconds and rates, compilation included; drafts only where there were any."""
        now = time.perf_counter()
        timing: dict[str, Any] = {"load_seconds": self.loaded - self.begun}
        if self.first is not None:
            timing["first_text_seconds"] = self.first - self.loaded
        timing["seconds"] = now - self.loaded
        timing["tokens"] = statistics.tokens
        timing["tokens_per_second"] = statistics.tokens / (now - self.loaded)
        timing = {k: round(v, 3) if isinstance(v, float) else v for k, v in timing.items()}
        if len(statistics.finish) == 1:
            timing["finish"] = statistics.finish[0]
        if statistics.drafted:
            timing |= {"drafted": statistics.drafted, "accepted": statistics.accepted}
        return timing


def _one(
    command: Generate,
    model: "Model",
    asked: "str | Messages",
    chosen: dict[str, Any],
    clock: _Clock,
) -> None:
    """Shows one answer as it comes."""
    from deepzoo.zoo.generate import Statistics, stream
    from deepzoo.zoo.prompt import encode

    shape = {name: chosen[name] for name in ("raw", "format", "thinking")}
    thought = encode(model, asked, **shape).thought
    statistics = Statistics()
    screen = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(display.waiting("preparing"))
        for piece in stream(model, asked, statistics=statistics, **chosen):
            if screen is None:
                stack.close()
                clock.first = time.perf_counter()
                screen = display.Screen(sys.stdout, thought)
                stack.callback(screen.close)
            screen.push(piece)
    if screen is None:
        print()
    if command.stats:
        _tell(clock.timing(statistics))


def _all(
    command: Generate, model: "Model", prompts: Sequence[str],
    asked: "Sequence[str | Messages]", chosen: dict[str, Any], clock: _Clock,
) -> None:  # fmt: skip
    """Answers all prompts as one batch, then prints them."""
    from deepzoo.zoo.generate import Statistics, generate
    from deepzoo.zoo.prompt import encode

    statistics = Statistics()
    with display.waiting(f"answering {len(prompts)} prompts"):
        done = generate(model, asked, statistics=statistics, **chosen)
    timing = clock.timing(statistics)
    shape = {name: chosen[name] for name in ("raw", "format", "thinking")}
    for number, (prompt, one) in enumerate(zip(prompts, done, strict=True), 1):
        if command.json:
            answer = {"prompt": prompt} | one._asdict()
            answer["logprobs"] = options.finite(one.logprobs)
            print(json.dumps(answer | {"timing": timing}, ensure_ascii=False))
            continue
        title = f"== {number}: {_title(prompt)}"
        print(f"{display.BOLD}{title}{display.PLAIN}" if display.styled(sys.stdout) else title)
        screen = display.Screen(sys.stdout, encode(model, asked[number - 1], **shape).thought)
        screen.push(one.text)
        screen.close()
        if number < len(done):
            print()
    if command.stats:
        _tell(timing)


def _tell(timing: dict[str, Any]) -> None:
    parts = [
        f"{timing['tokens']} tokens in {timing['seconds']:.2f} s"
        f" ({timing['tokens_per_second']:.1f} a second, compilation included)"
    ]
    if "first_text_seconds" in timing:
        parts.append(f"first text after {timing['first_text_seconds']:.2f} s")
    parts.append(f"model loaded in {timing['load_seconds']:.2f} s")
    if "finish" in timing:
        parts.append(f"ended by {timing['finish']}")
    if "drafted" in timing:
        share = timing["accepted"] / timing["drafted"]
        parts.append(f"{timing['accepted']} of {timing['drafted']} drafts accepted ({share:.0%})")
    print(f"deepzoo: {', '.join(parts)}", file=sys.stderr)


def _title(prompt: str) -> str:
    line = display.visible(" ".join(prompt.split()))
    return line if len(line) <= 70 else line[:69] + "…"


def _with_system(prompt: str, system: str | None) -> "str | Messages":
    if system is None:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _prompts(command: Generate) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        RequestError: none, an empty one, stdin asked for twice, or bytes that are not UTF-8.
    """
    stdin = [*command.prompts, str(command.file)].count("-")
    if stdin > 1:
        raise RequestError("stdin can be read once; give - once")
    prompts = [_stdin().removesuffix("\n") if p == "-" else p for p in command.prompts]
    if command.file is not None:
        here = str(command.file) == "-"
        name = "stdin" if here else str(command.file)
        text = (
            _stdin() if here else options.utf8(Path(command.file).expanduser().read_bytes(), name)
        )
        lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
        if not lines:
            raise RequestError(f"{name} holds no prompt; write one a line")
        prompts += lines
    if not prompts:
        raise RequestError("no prompt given; write one after the model, or - to read it from stdin")
    if not all(prompts):
        raise RequestError("a prompt is empty; give it some text")
    return prompts


def _stdin() -> str:
    return options.utf8(options.stdin().read(), "stdin")
