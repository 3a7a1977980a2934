"""`deepzoo chat MODEL`: a conversation on a terminal, or a script of one from a pipe."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from deepzoo.zoo.cli import display, options
from deepzoo.zoo.cli.interrupt import Held, is_interrupt
from deepzoo.zoo.errors import DeepzooError, RequestError

if TYPE_CHECKING:
    from deepzoo.zoo.types import Model

PROMPT = ">>> "
HELP = """\
/reset        forget the conversation
/system TEXT  what the model is told first; without TEXT, nothing
/save FILE    write the conversation as JSON, into a new file
/save! FILE   the same, and replace a file that is there
/help         this list
/exit         leave; Ctrl-D does, too
Ctrl-C stops an answer and keeps the conversation. A message that begins with a slash: write //."""


@dataclass(frozen=True, kw_only=True)
class Chat(options.Sampling, options.Source):
    """Talk to a model.

    Thoughts are dimmed. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the rest.

    Example: deepzoo chat ./DeepSeek-R1-Distill-Qwen-1.5B --temperature 0.6
    """

    system: Annotated[options.Text, options.hint("none")] = None
    """What the model is told first."""


def run(command: Chat) -> int:
    """Talks until the input ends and returns the exit status; from a pipe, 2 after any mistake.

    Raises:
        DeepzooError: an option or a model that cannot be used.
    """
    chosen = options.sampling(command)
    model = options.load_model(command)
    talk = Talk(model, chosen, interactive=_is_terminal())
    if command.system is not None:
        talk.tell(command.system)
    return talk.run()


class Talk:
    """A conversation: what was said, how to answer, and where lines come from."""

    def __init__(self, model: "Model", chosen: dict[str, Any], *, interactive: bool):
        """Checks what can be checked before the first line.

        Raises:
            DeepzooError: no tokenizer, a chat format that is not known or lacks the thinking mode.
        """
        from deepzoo.zoo.prompt import format_of, tokenizer_of

        tokenizer_of(model)
        self.format = format_of(model, chosen["format"])
        self.format.mode(chosen["thinking"])
        self.model = model
        self.chosen = chosen
        self.interactive = interactive
        self.system: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0  # oldest messages that no longer fit the context
        self.answers = 0

    def run(self) -> int:
        """Reads lines until /exit or the end of the input."""
        status = 0
        if self.interactive:
            self._greet()
        while (line := self._read()) is not None and line.strip() != "/exit":
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line.strip():
                    self.say(line.removeprefix("/") if line.startswith("//") else line)
            except (DeepzooError, OSError) as error:
                status = 2
                self._note(_line(error))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._note("stopped; the conversation is as it was before this line")
        return 0 if self.interactive else status

    def say(self, text: str) -> None:
        """Answers one message; what was said stays only if there is an answer.

        Raises:
            DeepzooError: the message cannot be answered, such as one longer than the context.
        """
        from deepzoo.zoo.chat import split_thinking

        if not self.format.chat:
            self._answer(text)
            return
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fit()
            text, thought, stopped = self._answer(prompt)
        except BaseException:
            self.messages.pop()
            raise
        thinking, answer = split_thinking(text, thought)
        said: dict[str, Any] = {"role": "assistant", "content": answer}
        if thinking:
            said["thinking"] = thinking
        if stopped:
            said["interrupted"] = True
        self.messages.append(said)

    def tell(self, system: str) -> None:
        """Sets what the model is told first; an empty text removes it.

        Raises:
            RequestError: a base model, which has no roles.
        """
        options.check_roles(self.model, self.chosen["format"])
        self.system = [{"role": "system", "content": system}] if system else []

    def save(self, name: str, *, replace: bool) -> None:
        """Writes the conversation as a JSON list of messages; the file appears whole or not at all.

        Raises:
            RequestError: no name, or there is something of this name that may not be replaced.
            OSError: it cannot be written.
        """
        if not name:
            raise RequestError("name a file: /save talk.json")
        path = Path(name).expanduser()
        if os.path.lexists(path) and not replace:
            raise RequestError(f"{name} exists; say /save! {name} to replace it")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("x", encoding="utf-8") as file:
                json.dump(self.system + self.messages, file, ensure_ascii=False, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None
        finally:
            part.unlink(missing_ok=True)
        self._note(f"{len(self.system + self.messages)} messages are in {name}")

    def _command(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/reset":
            self.messages, self.left_out = [], 0
            self._note("the conversation is forgotten")
        elif word == "/system":
            self.tell(rest)
            self._note(
                "the model is told this first" if rest else "the model is told nothing first"
            )
        elif word in ("/save", "/save!"):
            self.save(rest, replace=word == "/save!")
        elif word == "/help":
            print(HELP)
        else:
            raise RequestError(f"no command is called {word}; /help lists them")

    def _fit(self) -> list[dict[str, Any]]:
        """The messages that the model gets: without the oldest turns where they leave no room.

        Raises:
            RequestError: the newest message alone is too long.
        """
        from deepzoo.zoo.prompt import encode

        context = self.model.config.max_position_embeddings
        room = min(self.chosen["max_tokens"], context // 4)
        before = self.left_out
        while True:
            prompt = self.system + self.messages[self.left_out :]
            used = len(encode(self.model, prompt, **self._shape()).tokens)
            if used + room <= context or self.left_out == len(self.messages) - 1:
                break
            self.left_out += 2
        if used >= context:
            self.left_out = before
            raise RequestError(
                f"this message has {used:,} tokens and the context of this model is {context:,};"
                " shorten it"
            )
        if self.left_out > before:
            self._note(
                f"the conversation outgrew the context of {context:,} tokens: the model no longer"
                f" sees the first {self.left_out} messages; /reset forgets all"
            )
        return prompt

    def _answer(self, prompt: "str | list[dict[str, Any]]") -> tuple[str, bool, bool]:
        """Shows an answer; returns it, whether it began in a thought, whether it was stopped."""
        from deepzoo.zoo.generate import Statistics, stream
        from deepzoo.zoo.prompt import encode

        thought = encode(self.model, prompt, **self._shape()).thought
        chosen = self.chosen | {"seed": (self.chosen["seed"] + self.answers) % (1 << 32)}
        pieces: list[str] = []
        statistics = Statistics()
        stopped = False
        screen = None
        try:
            with Held() as held:
                with display.waiting("preparing"):
                    source = stream(self.model, prompt, statistics=statistics, **chosen)
                    pieces.append(next(source, ""))
                screen = display.Screen(sys.stdout, thought)
                screen.push(pieces[0])
                held.check()
                for piece in source:
                    pieces.append(piece)
                    screen.push(piece)
                    held.check()
        except (KeyboardInterrupt, SystemError) as error:
            if not is_interrupt(error):
                raise
            if not self.interactive or not any(pieces):
                raise KeyboardInterrupt from None
            stopped = True
        finally:
            if screen is not None:
                screen.close()
        if statistics.finish == ["length"] and not stopped:
            self._note(f"cut off after {statistics.tokens} tokens; --max-tokens allows more")
        if stopped:
            self._note("stopped; what was said so far stays in the conversation")
        self.answers += 1
        return "".join(pieces), thought, stopped

    def _shape(self) -> dict[str, Any]:
        return {name: self.chosen[name] for name in ("format", "thinking")}

    def _greet(self) -> None:
        try:
            import readline  # noqa: F401  line editing and history in input()
        except ImportError:
            pass
        kind = "" if self.format.chat else ", a base model: it continues each line by itself"
        self._note(f"{self.model.name}{kind}. /help lists the commands, Ctrl-D leaves.")

    def _read(self) -> str | None:
        """The next line, None at the end of the input."""
        if not self.interactive:
            line = options.stdin().readline()
            return options.utf8(line, "stdin").rstrip("\r\n") if line else None
        while True:
            try:
                return input(PROMPT)
            except KeyboardInterrupt:
                print()
                self._note("Ctrl-D or /exit leaves")
            except UnicodeDecodeError:
                self._note("that line is not UTF-8")
            except EOFError:
                print()
                return None

    def _note(self, text: str) -> None:
        """A line from the program, not from the model: on stderr, dimmed on a terminal."""
        sys.stdout.flush()
        dim = self.interactive and display.styled(sys.stderr)
        print(
            f"{display.DIM}{text}{display.PLAIN}" if dim else f"deepzoo: {text}",
            file=sys.stderr,
            flush=True,
        )


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return str(error)
