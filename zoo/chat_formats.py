"""The chat formats of the two families as functions from messages to pieces.

Each function returns text and `Control` pieces; joined, they equal what the model's published
template renders, oddities included. Where the published text has a bug, the model was used with it,
so it is kept and marked "Known bug kept".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepzoo.zoo.tokenizer import Control, Piece
from deepzoo.zoo.tokenizer_file import BAR, THINK_TAGS

_LOW = "\u2581"  # LOWER ONE EIGHTH BLOCK, in place of a space within the marks

type Role = Literal["system", "user", "assistant", "tool"]


def _mark(words: str) -> Control:
    return Control(f"<{BAR}{words.replace(' ', _LOW)}{BAR}>")


BOS = _mark("begin of sentence").text
EOS, USER, ASSISTANT = _mark("end of sentence"), _mark("User"), _mark("Assistant")
THINK, THINK_END = map(Control, THINK_TAGS)
CALLS, CALLS_END = _mark("tool calls begin"), _mark("tool calls end")
CALL, CALL_END = _mark("tool call begin"), _mark("tool call end")
OUTPUTS, OUTPUTS_END = _mark("tool outputs begin"), _mark("tool outputs end")
OUTPUT, OUTPUT_END = _mark("tool output begin"), _mark("tool output end")
SEP = _mark("tool sep")
IM_SYSTEM, IM_MIDDLE, IM_END = map(Control, ("<|im_system|>", "<|im_middle|>", "<|im_end|>"))
IM_USER, IM_ASSISTANT = map(Control, ("<|im_user|>", "<|im_assistant|>"))


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call: `arguments` is JSON text, passed through as it is."""

    name: str
    arguments: str
    type: str = "function"


@dataclass(frozen=True, slots=True)
class Message:
    """One checked message. `content` is None only beside `calls`; `prefix` marks an assistant
    message that the model is to continue (V3.1)."""

    role: Role
    content: str | None
    calls: tuple[Call, ...] = ()
    prefix: bool = False

    @property
    def text(self) -> str:
        return self.content or ""


def plain(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """A base model's prompt: bos and the text, nothing else."""
    return [*_bos(bos), *(m.text for m in messages)]


def v2_chat(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """V2-Lite-Chat, V2-Chat and both Coder-V2-Instruct: roles are plain words. No space follows the
    last "Assistant:"; one there breaks the 16B model."""
    out = _bos(bos)
    for m in messages:
        if m.role == "assistant":
            out += ["Assistant: ", m.text, EOS]
        else:
            out += ["User: " if m.role == "user" else "", m.text, "\n\n"]
    return [*out, "Assistant:"] if prompt else out


def v2_0628(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """V2-Chat-0628: role marks; a blank line after system text."""
    out = _bos(bos)
    for m in messages:
        if m.role == "assistant":
            out += [ASSISTANT, m.text, EOS]
        else:
            out += [USER, m.text] if m.role == "user" else [m.text, "\n\n"]
    return [*out, ASSISTANT] if prompt else out


def v2_5(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """V2.5 and V2.5-1210: only the last system message counts."""
    return _early(messages, bos, prompt, system=_last_system(messages))


def v3(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """V3."""
    return _early(messages, bos, prompt, system=_all_systems(messages))


def r1_first(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """R1 and its students as first published: the last system message only, thoughts cut from
    earlier turns, the next one forced."""
    return _early(messages, bos, prompt, system=_last_system(messages), think=True)


def _early(
    messages: Sequence[Message], bos: str, prompt: bool, *, system: str, think: bool = False
) -> list[Piece]:
    """Known bugs kept: the end marks of a list of calls come after every call but the first, so
    never for a single call; tool calls beside text are left out; the flags for "first call" and
    "first output" are never reset, so later tool turns begin as if they went on."""
    out: list[Piece] = [*_bos(bos), system]
    after_tool = called = answered = False
    for m in messages:
        match m.role:
            case "user":
                after_tool = False
                out += [USER, m.text]
            case "assistant" if m.content is None:
                after_tool = False
                for call in m.calls:
                    if called:
                        out += ["\n", *_fenced(call), CALLS_END, EOS]
                    else:
                        out += [ASSISTANT, CALLS, *_fenced(call)]
                    called = True
            case "assistant":
                cut = think and not after_tool
                out += [OUTPUTS_END if after_tool else ASSISTANT]
                out += [_after_thought(m.text) if cut else m.text, EOS]
                after_tool = False
            case "tool":
                out += [*([] if answered else [OUTPUTS]), "\n" if answered else ""]
                out += [OUTPUT, m.text, OUTPUT_END]
                after_tool = answered = True
    return out + _close(after_tool, prompt, [ASSISTANT, THINK, "\n"] if think else [ASSISTANT])


def r1(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """R1, R1-Zero and the six R1-Distill students: earlier thoughts are cut at their last end tag,
    the next thought is forced open.

    Known bugs kept: the flags for "first call" and "first output" are never reset; text beside tool
    calls, and text after tool outputs, keeps its thought; tool outputs are not separated by lines.
    """
    out: list[Piece] = [*_bos(bos), _all_systems(messages)]
    after_tool = called = answered = False
    for m in messages:
        match m.role:
            case "user":
                after_tool = False
                out += [USER, m.text]
            case "assistant" if m.calls:
                after_tool = False
                for call in m.calls:
                    out += ["\n"] if called else [ASSISTANT, m.text, CALLS]
                    out += _fenced(call)
                    called = True
                out += [CALLS_END, EOS]
            case "assistant":
                out += [OUTPUTS_END, m.text] if after_tool else [ASSISTANT, _after_thought(m.text)]
                out += [EOS]
                after_tool = False
            case "tool":
                out += [*([] if answered else [OUTPUTS]), OUTPUT, m.text, OUTPUT_END]
                after_tool = answered = True
    return out + _close(after_tool, prompt, [ASSISTANT, THINK, "\n"])


def v3_0324(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """V3-0324 and Prover-V2-671B: the assistant's mark follows the user's text at once, with or
    without a generation prompt."""
    return _late(messages, bos, prompt, cut=False)


def r1_0528(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """R1-0528 and R1-0528-Qwen3-8B: as V3-0324, with earlier thoughts cut. The model opens its
    thought itself. (The published text cannot render tool calls without content; this can.)"""
    return _late(messages, bos, prompt, cut=True)


def _late(messages: Sequence[Message], bos: str, prompt: bool, *, cut: bool) -> list[Piece]:
    out: list[Piece] = [*_bos(bos), _all_systems(messages)]
    after_tool = after_user = answered = False
    for m in messages:
        text = _after_thought(m.text) if cut and m.role == "assistant" else m.text
        match m.role:
            case "user":
                out += [USER, text, ASSISTANT]
                after_tool, after_user = False, True
            case "assistant":
                out += [OUTPUTS_END, text] if after_tool else [text]
                for n, call in enumerate(m.calls):
                    out += ["\n" if n else CALLS, *_fenced(call)]
                if m.calls:
                    out += [CALLS_END]
                    answered = False
                out += [EOS]
                after_tool = after_user = False
            case "tool":
                out += ["\n" if answered else OUTPUTS, OUTPUT, text, OUTPUT_END]
                after_tool = answered = True
                after_user = False
    return out + _close(after_tool, prompt and not after_user, [ASSISTANT])


def v3_1(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """V3.1: the generation prompt opens a thought or closes an empty one."""
    return _hybrid(messages, bos, prompt, thinking, terminus=False)


def v3_1_terminus(
    messages: Sequence[Message], bos: str, prompt: bool, thinking: bool
) -> list[Piece]:
    """V3.1-Terminus (and V3.2-Exp): as V3.1, with a generation prompt also where no user message
    comes last, unless an assistant message was marked as a prefix."""
    return _hybrid(messages, bos, prompt, thinking, terminus=True)


def _hybrid(
    messages: Sequence[Message], bos: str, prompt: bool, thinking: bool, *, terminus: bool
) -> list[Piece]:
    """Known bugs kept: an answer that directly follows an assistant message has no mark; a prefix
    is closed by the end-of-sentence mark that it should leave open."""
    out: list[Piece] = [*_bos(bos), _all_systems(messages)]
    after_tool = after_user = prefixed = False
    only_system = terminus and any(m.role == "system" for m in messages)
    for m in messages:
        match m.role:
            case "user":
                out += [USER, m.text]
                after_tool, after_user = False, True
            case "assistant" if m.calls:
                if after_user or only_system:
                    out += [ASSISTANT, THINK_END]
                out += [m.text, CALLS]
                for call in m.calls:
                    out += [CALL, call.name, SEP, call.arguments, CALL_END]
                out += [CALLS_END, EOS]
                after_tool = after_user = False
            case "assistant":
                if after_user:
                    out += [ASSISTANT, THINK if m.prefix and thinking else THINK_END]
                out += [m.text if after_tool else m.text.split(THINK_END.text, 1)[-1], EOS]
                after_tool = after_user = False
                prefixed |= m.prefix
            case "tool":
                out += [OUTPUT, m.text, OUTPUT_END]
                after_tool, after_user = True, False
        only_system &= m.role == "system"
    wanted = after_user or (terminus and (only_system or not prefixed))
    if prompt and wanted and not after_tool:
        out += [ASSISTANT, THINK if thinking else THINK_END]
    return out


def moonlight(messages: Sequence[Message], bos: str, prompt: bool, thinking: bool) -> list[Piece]:
    """Moonlight-16B-A3B-Instruct: no bos; a default system text unless the first message is one."""
    out: list[Piece] = []
    if messages[0].role != "system":
        out += [IM_SYSTEM, "system", IM_MIDDLE, "You are a helpful assistant", IM_END]
    marks = {"system": IM_SYSTEM, "user": IM_USER, "assistant": IM_ASSISTANT}
    for m in messages:
        out += [marks[m.role], m.role, IM_MIDDLE, m.text, IM_END]
    return [*out, IM_ASSISTANT, "assistant", IM_MIDDLE] if prompt else out


def _bos(bos: str) -> list[Piece]:
    return [Control(bos)] if bos else []


def _last_system(messages: Sequence[Message]) -> str:
    return next((m.text for m in reversed(messages) if m.role == "system"), "")


def _all_systems(messages: Sequence[Message]) -> str:
    return "\n\n".join(m.text for m in messages if m.role == "system")


def _after_thought(text: str) -> str:
    return text.rsplit(THINK_END.text, 1)[-1]


def _fenced(call: Call) -> list[Piece]:
    return [CALL, call.type, SEP, f"{call.name}\n```json\n{call.arguments}\n```", CALL_END]


def _close(after_tool: bool, prompt: bool, opening: list[Piece]) -> list[Piece]:
    """The end of a prompt: after tool outputs the answer follows without a mark of its own."""
    if after_tool:
        return [OUTPUTS_END]
    return opening if prompt else []
