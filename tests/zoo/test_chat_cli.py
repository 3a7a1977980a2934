"""`deepzoo chat`: through a pipe, on a terminal, and how answers are shown."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chain
import pytest
from chain import END
from hypothesis import given
from hypothesis import strategies as st
from terminal import CTRL_C, CTRL_D, Terminal

from deepzoo.zoo.chat import split_thinking
from deepzoo.zoo.cli import display, main

ASSISTANT = "<\uff5cAssistant\uff5c>"
PROMPT = ">>> "
# r1: the prompt ends with "\n", inside a thought. v3: the answer follows the assistant mark and has
# no end. Plain: it follows the last letter of the prompt.
SUCCESSORS = (
    {"\n": "h", "h": "m", "m": "</think>", "</think>": "4", "4": "2", "2": END}
    | {"=": "8", "8": "5", "5": END, ASSISTANT: "a", "l": "a"}
    | chain.spelled("abcdefgijkl")
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain.save(tmp_path_factory.mktemp("models") / "known", SUCCESSORS, context=4096)


class Piped:
    """Runs the command in this process with a pipe for input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, text: str | bytes, *args: object) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of `deepzoo chat args...` with `text` as its input."""
        data = text.encode() if isinstance(text, str) else text
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        status = main(["chat", *map(str, args)])
        out, err = self._capsys.readouterr()
        return status, out, err


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Piped:
    return Piped(monkeypatch, capsys)


def test_a_pipe_gets_the_answers_and_nothing_else(chat: Piped, directory: Path):
    lines = "hello\n\nagain\r\n/exit\nnot any more\n"
    assert chat(lines, directory, "--format", "r1") == (0, "hm</think>42\n" * 2, "")


def test_a_base_model_continues_each_line_by_itself(chat: Piped, directory: Path, tmp_path: Path):
    file = tmp_path / "talk.json"
    status, out, _ = chat(f"6=\n7 + 8 =\n/save {file}\n", directory)
    assert (status, out) == (0, "85\n85\n")
    assert json.loads(file.read_text()) == []


def test_save_writes_what_was_said_with_thoughts_apart(
    chat: Piped, directory: Path, tmp_path: Path
):
    file = tmp_path / "talk.json"
    lines = f"forgotten\n/reset\n/system be brief\nwhat is it?\n//slash\n/save {file}\n"
    status, _, err = chat(lines, directory, "--format", "r1")
    answer = {"role": "assistant", "content": "42", "thinking": "hm"}
    assert json.loads(file.read_text("utf-8")) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is it?"},
        answer,
        {"role": "user", "content": "/slash"},
        answer,
    ]
    assert status == 0
    assert f"5 messages are in {file}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_system_from_the_command_line_and_removed(chat: Piped, directory: Path, tmp_path: Path):
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    lines = f"/save {one}\n/system\n/save {two}\n"
    assert chat(lines, directory, "--format", "v3", "--system", "be kind")[0] == 0
    assert json.loads(one.read_text()) == [{"role": "system", "content": "be kind"}]
    assert json.loads(two.read_text()) == []


def test_save_replaces_a_file_only_when_told_to(chat: Piped, directory: Path, tmp_path: Path):
    file = tmp_path / "precious"
    file.write_text("old")
    status, _, err = chat(f"/save {file}\n" * 3, directory)
    assert status == 2
    assert err.count(f"{file} exists; say /save! {file} to replace it") == 3
    assert file.read_text() == "old"
    assert chat(f"/save! {file}\n", directory)[0] == 0
    assert json.loads(file.read_text()) == []
    file.write_text("old")  # also what this conversation wrote itself is not replaced silently
    assert chat(f"/save! {file}\n/save {file}\n", directory)[0] == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/save", "name a file: /save talk.json"),
        ("/save {tmp}/none/talk.json", "{tmp}/none/talk.json: No such file or directory"),
        ("/save {tmp}/folder", "{tmp}/folder exists; say /save! {tmp}/folder to replace it"),
        ("/bye", "no command is called /bye; /help lists them"),
        ("/system x", "known continues plain text and has no place for a system message"),
    ],
)
def test_a_wrong_line_is_told_and_the_chat_goes_on(
    chat: Piped, directory: Path, tmp_path: Path, line: str, told: str
):
    (tmp_path / "folder").mkdir()
    status, out, err = chat(line.format(tmp=tmp_path) + "\n6=\n", directory)
    assert (status, out) == (2, "85\n")
    assert err.startswith(f"deepzoo: {told.format(tmp=tmp_path)}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_message_longer_than_the_context_is_refused_and_forgotten(chat: Piped, tmp_path: Path):
    model = chain.save(tmp_path / "short", SUCCESSORS, context=64)
    file = tmp_path / "talk.json"
    lines = f"{'?!' * 80}\nhi\n/save {file}\n"
    status, out, err = chat(lines, model, "--format", "r1")
    assert (status, out) == (2, "hm</think>42\n")
    assert re.match(
        r"deepzoo: this message has 16\d tokens and the context of this model is 64;", err
    )
    assert [m["content"] for m in json.loads(file.read_text())] == ["hi", "42"]


def test_the_oldest_turns_leave_when_the_context_is_full(chat: Piped, tmp_path: Path):
    model = chain.save(tmp_path / "short", SUCCESSORS, context=64)
    file = tmp_path / "talk.json"
    message = "?!" * 8  # 16 tokens; with marks and answer a turn has 21
    status, out, err = chat(f"{message}\n" * 4 + f"/save {file}\n", model, "--format", "r1")
    assert (status, out) == (0, "hm</think>42\n" * 4)
    told = re.findall(r"no longer sees the first (\d) messages", err)
    # 16 of 64 tokens are kept for the answer, so two turns and a half fit at the third message.
    assert told == ["2", "4"]
    assert len(json.loads(file.read_text())) == 8


def test_input_that_is_not_utf8_ends_the_chat(chat: Piped, directory: Path):
    status, out, err = chat(b"6=\n\xff\xfe\n6=\n", directory)
    assert (status, out) == (2, "85\n")
    assert err == "deepzoo: stdin is not UTF-8: byte 0xff at offset 0\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--temperature", "-1"], "temperature is -1.0; expected a number from 0 to 100"),
        (["--max-tokens", "0"], "max_tokens is 0; expected an integer of at least 1"),
        (["--top-p", "1.5"], "top_p is 1.5; expected a number above 0 and up to 1"),
        (["--format", "r2"], "unknown chat format 'r2'"),
        (["--thinking", "--no-thinking"], "--thinking and --no-thinking exclude each other"),
        (["--format", "r1", "--no-thinking"], "the chat format r1 always thinks"),
        (["--system", "x"], "known continues plain text and has no place for a system message"),
        (["--revision", "main"], "--revision is of a hub repository; add --download"),
        (["--speculative", "--no-mtp"], "--speculative needs the layers that --no-mtp leaves out"),
    ],
)
def test_options_that_cannot_be_served_end_before_the_first_line(
    chat: Piped, directory: Path, options: list[str], told: str
):
    status, out, err = chat("6=\n", directory, *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"deepzoo: {told}")
    assert err.count("\n") == 1


def test_a_model_without_tokenizer_cannot_talk(chat: Piped, directory: Path, tmp_path: Path):
    shutil.copytree(directory, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    status, out, err = chat("6=\n", tmp_path / "mute")
    assert (status, out) == (2, "")
    assert err.startswith("deepzoo: mute has no tokenizer.json")


def test_on_a_terminal_thoughts_are_dimmed_and_mistakes_keep_the_chat(
    directory: Path, tmp_path: Path
):
    file = tmp_path / "talk.json"
    with Terminal("-m", "deepzoo.zoo.cli", "chat", str(directory), "--format", "r1") as terminal:
        assert "known. /help lists the commands, Ctrl-D leaves." in terminal.wait_for(PROMPT)
        terminal.press("hello\r")
        shown = terminal.wait_for(PROMPT)
        assert re.search(r"(\x1b\[2m[hm]+\x1b\[0m)+\r\n\r\n42\r\n", shown)
        assert "think" not in shown
        terminal.press("/save /none/x\r")
        assert "/none/x: No such file or directory" in terminal.wait_for(PROMPT)
        terminal.press("half a li")
        terminal.wait_for("half a li")  # now readline surely listens
        assert "Ctrl-D or /exit leaves" in terminal.insist(CTRL_C, PROMPT)
        terminal.press(f"/save {file}\r")
        terminal.wait_for(PROMPT)
        terminal.press(CTRL_D)
        assert terminal.finish()[0] == 0
    assert [m["content"] for m in json.loads(file.read_text())] == ["hello", "42"]


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(directory: Path, tmp_path: Path):
    file = tmp_path / "talk.json"
    command = ["chat", str(directory), "--format", "v3", "--max-tokens", "4000"]
    with Terminal("-m", "deepzoo.zoo.cli", *command) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press("hello\r")
        terminal.wait_for("klabc")
        terminal.press(CTRL_C)
        assert "stopped; what was said so far stays" in terminal.wait_for(PROMPT)
        terminal.press(f"/save {file}\r")
        terminal.wait_for(PROMPT)
        terminal.press("/exit\r")
        assert terminal.finish()[0] == 0
    asked, said = json.loads(file.read_text())
    assert asked == {"role": "user", "content": "hello"}
    assert said["interrupted"] is True
    assert said["content"].startswith("abcdefgijklabc")
    assert len(said["content"]) < 3900


def test_without_colour_the_tags_stay(directory: Path):
    command = ["-m", "deepzoo.zoo.cli", "chat", str(directory), "--format", "r1"]
    with Terminal(*command, env={"NO_COLOR": "1"}) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press("hello\r")
        assert "hm</think>42\r\n" in terminal.wait_for(PROMPT)
        assert "\x1b[2m" not in terminal.text


def test_ctrl_c_ends_a_chat_from_a_pipe(directory: Path):
    command = ["chat", str(directory), "--format", "v3", "--max-tokens", "4000"]
    with subprocess.Popen(
        [sys.executable, "-m", "deepzoo.zoo.cli", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(__file__).parent,
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout and child.stderr
        child.stdin.write(b"hello\nagain\n")
        child.stdin.flush()
        assert child.stdout.read(14) == b"abcdefgijklabc"
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert child.wait(timeout=60) == 130
        assert child.stderr.read() == b"deepzoo: interrupted\n"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", "a", " ", "<", "/", "</th", "ink>", "<th"]),
    max_size=12,
)


@given(PIECES, st.booleans())
def test_a_terminal_shows_thought_and_answer_however_they_are_cut(pieces: list[str], forced: bool):
    out = Tty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        screen = display.Screen(out, forced)
    for piece in pieces:
        screen.push(piece)
    screen.close()
    thinking, answer = split_thinking("".join(pieces), forced)
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", out.getvalue(), re.S))
    plain = re.sub(r"\x1b\[2m.*?\x1b\[0m", "", out.getvalue(), flags=re.S)
    assert dimmed.strip("\n") == thinking
    gap = "\n\n" if thinking and answer else ""
    assert plain.rstrip("\n") == (gap + answer).rstrip("\n")
    assert out.getvalue().removesuffix(display.PLAIN).endswith("\n")


@given(PIECES, st.booleans())
def test_a_pipe_gets_the_text_as_it_is(pieces: list[str], forced: bool):
    out = io.StringIO()
    screen = display.Screen(out, forced)
    for piece in pieces:
        screen.push(piece)
    screen.close()
    text = "".join(pieces)
    assert out.getvalue() == (text if text.endswith("\n") else text + "\n")


def test_control_characters_do_not_reach_a_terminal():
    told = "a\x1b[31mb\x07\x9b2J\tc\r\n"
    out = Tty()
    screen = display.Screen(out, False)
    screen.push(told)
    screen.close()
    assert out.getvalue() == "a\u241b[31mb\u2407\ufffd2J\tc\u240d\n"
    pipe = io.StringIO()
    screen = display.Screen(pipe, False)
    screen.push(told)
    screen.close()
    assert pipe.getvalue() == told
