"""Text in, text out: prompts through the engine, stop strings, thoughts split from answers,
streaming."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

from deepzoo.zoo.chat import split_thinking
from deepzoo.zoo.engine import Engine, Request
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.prompt import Messages, Prompt, encode, sampling_defaults, tokenizer_of
from deepzoo.zoo.types import Model


class Completion(NamedTuple):
    """One answer.

    Attributes:
        text: everything generated, without the end token; with a stop string, up to it.
        thinking: what stands before `</think>`, empty for models that do not think.
        answer: the rest.
        tokens: the ids, the end token included.
        logprobs: of each id under the model itself, at temperature 1 and with nothing excluded.
        finish: "eos", "stop" (a stop string) or "length".
    """

    text: str
    thinking: str
    answer: str
    tokens: list[int]
    logprobs: list[float]
    finish: str


class Options(TypedDict, total=False):
    """How to answer: the options that `generate` and `stream` share.

    Attributes:
        max_tokens: per answer, 256 by default; less where the context ends before.
        temperature: 0 for greedy; the model's published default where None or left out.
        top_p: nucleus; the published default where None or left out.
        top_k: 0 for all, the default.
        min_p: 0 for all, the default.
        seed: answer i is drawn with seed + i, whatever stands beside it; 0 by default.
        stop: string or strings that end an answer; they are not part of it.
        speculative: draft with the MTP layer: the same distribution, fewer passes.
        raw: continue texts as they are, without a chat format.
        format: name of a chat format instead of the model's own.
        thinking: for models with both modes.
    """

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    speculative: bool
    raw: bool
    format: str | None
    thinking: bool | None


_DEFAULTS = Options(
    max_tokens=256, temperature=None, top_p=None, top_k=0, min_p=0.0, seed=0, stop=(),
    speculative=False, raw=False, format=None, thinking=None,
)  # fmt: skip


class Statistics:
    """Filled by `generate` and `stream` when passed in: what the run did, for reports.

    Attributes:
        finish: why each answer ended, in the order of the prompts: "eos", "stop" (a stop string) or
            "length"; None while it goes on.
        tokens: ids generated.
        drafted: drafts of the MTP layer that were checked.
        accepted: drafts that stood.
    """

    def __init__(self) -> None:
        self.finish: list[str | None] = []
        self.tokens = self.drafted = self.accepted = 0

    @property
    def acceptance(self) -> float:
        """Share of drafts that stood, NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class _Text:
    """Decodes one row as it grows and watches for stop strings."""

    def __init__(self, model: Model, stop: Sequence[str]):
        self.decoder = tokenizer_of(model).decoder()
        self.stop = stop
        self.text = ""
        self.shown = 0
        self.stopped = False
        self.finish: str | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def push(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self._add(self.decoder.push(token))

    def flush(self) -> None:
        if not self.stopped:
            self._add(self.decoder.flush())

    def _add(self, piece: str) -> None:
        self.text += piece
        found = [at for s in self.stop if (at := self.text.find(s)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self, *, final: bool) -> str:
        """New text that is certain not to be the beginning of a stop string."""
        hold = 0
        if not (final or self.stopped):
            for s in self.stop:
                sizes = range(min(len(s) - 1, len(self.text)), 0, -1)
                hold = max(hold, next((n for n in sizes if self.text.endswith(s[:n])), 0))
        end = max(len(self.text) - hold, self.shown)
        piece, self.shown = self.text[self.shown : end], end
        return piece


def generate(
    model: Model,
    prompts: str | Sequence[str | Messages],
    *,
    slots: int = 8,
    statistics: Statistics | None = None,
    **options: Unpack[Options],
) -> list[Completion]:
    """Answers every prompt.

    Args:
        model: a model with a tokenizer. Parameters loaded with `stacked=False` are used as they
            are.
        prompts: one text, or a list of texts or of message lists. A text is what the user says; the
            model's chat format is put around it.
        slots: prompts decoded together.
        statistics: filled with counts.
        options: see `Options`.

    Raises:
        RequestError: an option or a prompt that cannot be served; the message says which and why.
        TokenizerError: the model has no tokenizer.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    plan = _plan(model, listed, slots, options)
    for _ in _follow(plan, chunk=32):
        pass
    if statistics is not None:
        _count(plan, statistics)
    out = []
    for prompt, row in zip(plan.prompts, plan.rows, strict=True):
        thought, answer = split_thinking(row.text, prompt.thought)
        assert row.finish is not None
        out.append(Completion(row.text, thought, answer, row.tokens, row.logprobs, row.finish))
    return out


def stream(
    model: Model,
    prompt: str | Messages,
    *,
    statistics: Statistics | None = None,
    **options: Unpack[Options],
) -> Iterator[str]:
    """Yields the answer's text as it is decoded; joined, it is `generate`'s text.

    Args:
        model: as in `generate`.
        prompt: one of those of `generate`.
        statistics: filled as the answer grows; `finish` says in the end why it ended.
        options: as in `generate`.

    Raises:
        RequestError, TokenizerError: as `generate`, when the first piece is asked for.
    """
    plan = _plan(model, [prompt], 1, options)
    for _, piece in _follow(plan, chunk=4):
        if statistics is not None:
            _count(plan, statistics)
        if piece:
            yield piece


class _Plan(NamedTuple):
    engine: Engine
    prompts: list[Prompt]
    requests: list[Request]
    rows: list[_Text]


def _plan(model: Model, prompts: Sequence[str | Messages], slots: int, options: Options) -> _Plan:
    if unknown := [name for name in options if name not in _DEFAULTS]:
        raise RequestError(f"no option is called {unknown[0]}; there are {', '.join(_DEFAULTS)}")
    chosen: dict[str, Any] = {**_DEFAULTS, **options}
    stop = chosen["stop"]
    stops = [stop] if isinstance(stop, str) else list(stop)
    temperature, top_p = (
        default if chosen[name] is None else chosen[name]
        for name, default in zip(("temperature", "top_p"), sampling_defaults(model), strict=True)
    )
    max_tokens, top_k, min_p, seed = (chosen[n] for n in ("max_tokens", "top_k", "min_p", "seed"))
    check_options(max_tokens, temperature, top_p, top_k, min_p, seed, stops)
    if not prompts:
        raise RequestError("no prompts: give at least one")
    if slots < 1:
        raise RequestError(f"slots is {slots}; expected at least 1")
    raw, format, thinking = chosen["raw"], chosen["format"], chosen["thinking"]
    encoded = [encode(model, p, raw=raw, format=format, thinking=thinking) for p in prompts]
    context = model.config.max_position_embeddings
    requests = []
    for i, prompt in enumerate(encoded):
        if len(prompt.tokens) >= context:
            raise RequestError(
                f"prompt {i + 1} has {len(prompt.tokens)} tokens and the context of this model is"
                f" {context}; shorten it by at least {len(prompt.tokens) - context + 1}"
            )
        room = min(max_tokens, context - len(prompt.tokens))
        how = (float(temperature), float(top_p), top_k, float(min_p), seed + i)
        requests.append(Request(prompt.tokens, room, *how))
    longest = max(len(r.tokens) + r.max_tokens for r in requests)
    engine = Engine(
        model.config,
        model.params,
        slots=min(slots, len(requests)),
        # A power of two, so that calls of similar size share one compiled program.
        capacity=max(64, 1 << (longest - 1).bit_length()),
        eos_ids=tokenizer_of(model).eos_ids,
        speculative=chosen["speculative"],
    )
    return _Plan(engine, encoded, requests, [_Text(model, stops) for _ in requests])


def _follow(plan: _Plan, *, chunk: int) -> Iterator[tuple[int, str]]:
    """Runs the engine and yields (row, new certain text)."""
    for event in plan.engine.run(plan.requests, chunk=chunk):
        row = plan.rows[event.request]
        for token, logprob in zip(event.tokens, event.logprobs, strict=True):
            if token in plan.engine.ends:
                row.tokens.append(token)
                row.logprobs.append(logprob)
            elif not row.stopped:
                row.push(token, logprob)
        if event.finish is not None:
            row.flush()
            row.finish = "stop" if row.stopped else event.finish
        elif row.stopped:
            plan.engine.release(event.request)
            row.finish = "stop"
        yield event.request, row.take(final=row.finish is not None)


def _count(plan: _Plan, statistics: Statistics) -> None:
    statistics.finish = [row.finish for row in plan.rows]
    statistics.tokens = sum(len(row.tokens) for row in plan.rows)
    statistics.drafted, statistics.accepted = plan.engine.drafted, plan.engine.accepted


def check_options(
    max_tokens: Any,
    temperature: Any,
    top_p: Any,
    top_k: Any,
    min_p: Any,
    seed: Any,
    stop: Sequence[Any],
) -> None:
    """Raises RequestError naming the first option out of its range."""
    checks = [
        ("max_tokens", max_tokens, int, lambda v: v >= 1, "an integer of at least 1"),
        ("temperature", temperature, float, lambda v: 0 <= v <= 100, "a number from 0 to 100"),
        ("top_p", top_p, float, lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
        ("top_k", top_k, int, lambda v: v >= 0, "0 for all, or a number of tokens"),
        ("min_p", min_p, float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        ("seed", seed, int, lambda v: 0 <= v < 1 << 32, "an integer from 0 to 2^32 - 1"),
    ]
    for name, value, kind, good, expected in checks:
        kinds = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not good(value):
            raise RequestError(f"{name} is {value!r}; expected {expected}")
    if any(not isinstance(s, str) or not s for s in stop):
        raise RequestError("stop strings must be non-empty text")
