"""From a list of messages to a prompt, and from a completion to its thought and its answer.

`chat_format(name)` gives the format of a model; calling it with messages gives pieces, in which the
control tokens stand apart from the text. `render` joins them, for eyes; `encode_chat` turns them
into ids, for models: there, text that spells a control token stays text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepzoo.zoo import chat_formats as formats
from deepzoo.zoo.chat_formats import BOS, THINK, THINK_END, Call, Message
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.tokenizer import Control, Piece, Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """One chat format.

    Attributes:
        name: as in `chat_format(name)`.
        build: checked messages, bos, whether to add a generation prompt, thinking mode -> pieces.
        modes: the thinking modes the model has, the default one first. (True,): it always thinks.
        forces: in thinking mode the prompt itself opens the thought, so that completions start
            inside it and hold only the closing tag.
        tools: whether the format has tool calls and tool outputs.
        chat: False for base models, which take one text and no roles.
    """

    name: str
    build: Callable[[Sequence[Message], str, bool, bool], list[Piece]]
    modes: tuple[bool, ...] = (False,)
    forces: bool = False
    tools: bool = True
    chat: bool = True

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        bos: str = BOS,
    ) -> list[Piece]:
        """Pieces of a prompt. `thinking=None` is the model's default mode; `bos=""` leaves it out.

        Each message is `{"role": ..., "content": ...}`; an assistant message may have `tool_calls`
        (`[{"type": "function", "function": {"name": ..., "arguments": JSON text}}]`).

        Raises:
            RequestError: a message or an option that this format cannot express.
        """
        checked = self._check(messages)
        return self.build(checked, bos, add_generation_prompt, self.mode(thinking))

    def mode(self, thinking: bool | None) -> bool:
        """The thinking mode asked for, or the default; raises RequestError if there is none."""
        mode = self.modes[0] if thinking is None else thinking
        if mode not in self.modes:
            always = "always thinks" if self.modes[0] else "has no thinking mode"
            raise RequestError(f"the chat format {self.name} {always}; leave out thinking={mode}")
        return mode

    def forced(self, thinking: bool | None = None) -> bool:
        """Whether a completion in this mode starts inside the thought: see `split_thinking`."""
        return self.forces and self.mode(thinking)

    def _check(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise RequestError(f"messages must be a list of messages, got {_kind(messages)}")
        if not messages:
            raise RequestError("messages is empty: give at least one user message")
        checked = [_message(m, f"messages[{n}]") for n, m in enumerate(messages)]
        if not self.chat and (len(checked) > 1 or checked[0].role != "user"):
            raise RequestError(
                f"the chat format {self.name} takes exactly one user message: "
                "a base model has no roles and no turns"
            )
        for n, m in enumerate(checked):
            if not self.tools and (m.role == "tool" or m.calls):
                raise RequestError(f"messages[{n}]: the chat format {self.name} has no tool calls")
        return checked


_ALL = [
    ChatFormat("plain", formats.plain, tools=False, chat=False),
    ChatFormat("v2_chat", formats.v2_chat, tools=False),
    ChatFormat("v2_0628", formats.v2_0628, tools=False),
    ChatFormat("v2_5", formats.v2_5),
    ChatFormat("v3", formats.v3),
    ChatFormat("v3_0324", formats.v3_0324),
    ChatFormat("r1_first", formats.r1_first, modes=(True,), forces=True),
    ChatFormat("r1", formats.r1, modes=(True,), forces=True),
    ChatFormat("r1_0528", formats.r1_0528, modes=(True,)),
    ChatFormat("v3_1", formats.v3_1, modes=(False, True), forces=True),
    ChatFormat("v3_1_terminus", formats.v3_1_terminus, modes=(False, True), forces=True),
    ChatFormat("moonlight", formats.moonlight, tools=False),
]
CHAT_FORMATS: dict[str, ChatFormat] = {made.name: made for made in _ALL}


def chat_format(name: str) -> ChatFormat:
    """The chat format called `name`; raises RequestError, naming the valid ones."""
    if name == "kimi_k2":
        raise RequestError(
            "no published chat template of Kimi-K2 was at hand, so there is no format kimi_k2; "
            'give it text prompts (chat format "plain")'
        )
    if name not in CHAT_FORMATS:
        raise RequestError(f"unknown chat format {name!r}; choose from {', '.join(CHAT_FORMATS)}")
    return CHAT_FORMATS[name]


def render(
    messages: Sequence[Mapping[str, Any]],
    format: str | ChatFormat,
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    bos: str = BOS,
) -> str:
    """The prompt as one text, equal to what the published template renders. For reading only:
    encoding this text again would let a message's text become control tokens."""
    pieces = _format(format)(
        messages, add_generation_prompt=add_generation_prompt, thinking=thinking, bos=bos
    )
    return "".join(map(str, pieces))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    format: str | ChatFormat,
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
) -> list[int]:
    """Ids of a chat prompt, with the tokenizer's own bos once, and with the text of messages kept
    as text whatever it spells."""
    pieces = _format(format)(
        messages,
        add_generation_prompt=add_generation_prompt,
        thinking=thinking,
        bos=tokenizer.bos_token or "",
    )
    return tokenizer.encode_pieces(pieces)


def in_thought(pieces: Sequence[Piece]) -> bool:
    """Whether a completion of this prompt starts inside a thought."""
    controls = [piece for piece in pieces if isinstance(piece, Control)]
    return bool(controls) and controls[-1] == THINK


def split_thinking(text: str, forced: bool) -> tuple[str, str]:
    """Splits a completion at its first `</think>` into (thinking, answer).

    `forced` says that the prompt had opened the thought. Otherwise a completion that does not begin
    with `<think>` has no thought. A thought that was never closed leaves the answer empty. Line
    breaks around both parts are dropped.
    """
    body = text.lstrip()
    opened = body.startswith(THINK.text)
    if not forced and not opened:
        return "", text
    body = body.removeprefix(THINK.text) if opened else text
    thinking, _, answer = body.partition(THINK_END.text)
    return thinking.strip("\n"), answer.lstrip("\n")


def _format(format: str | ChatFormat) -> ChatFormat:
    return chat_format(format) if isinstance(format, str) else format


def _kind(value: object) -> str:
    return type(value).__name__


def _message(raw: object, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where}: must be a table with role and content, got {_kind(raw)}")
    role, content, calls = raw.get("role"), raw.get("content"), raw.get("tool_calls")
    if role not in ROLES:
        raise RequestError(f"{where}: unknown role {role!r}; choose from {', '.join(ROLES)}")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise RequestError(f"{where}: tool_calls must be a list in an assistant message")
        if not calls:
            raise RequestError(f"{where}: tool_calls is empty; leave it out")
    if not isinstance(content, str) and not (content is None and calls):
        raise RequestError(f"{where}: content must be text, got {_kind(content)}")
    made = tuple(_call(c, f"{where}.tool_calls[{n}]") for n, c in enumerate(calls or ()))
    return Message(role, content, made, role == "assistant" and bool(raw.get("prefix")))


def _call(raw: object, where: str) -> Call:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{where}: must be a table with function: name and arguments")
    name, arguments = function.get("name"), function.get("arguments")
    kind = raw.get("type", "function")
    if not isinstance(name, str) or not isinstance(kind, str):
        raise RequestError(f"{where}: type and function.name must be text")
    if not isinstance(arguments, str):
        raise RequestError(
            f"{where}: function.arguments must be JSON text, got {_kind(arguments)}; "
            "pass json.dumps(arguments)"
        )
    return Call(name, arguments, kind)
