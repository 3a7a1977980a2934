"""`deepzoo`: help, dispatch, generate, convert; and every mistake of a user is one line, exit 2."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import chain
import child
import golden
import jax
import numpy as np
import pytest
from chain import END
from terminal import Terminal

from deepzoo.zoo import catalog, cli
from deepzoo.zoo.config import Config
from deepzoo.zoo.functional import init
from deepzoo.zoo.load import load
from deepzoo.zoo.save import save_hf
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

# Plain: the answer follows the last letter of the prompt. r1: it follows a line end, which is in
# a thought.
SUCCESSORS = (
    {"\n": "h", "h": "m", "m": "</think>", "</think>": "4", "4": "2", "2": END}
    | {"=": "8", "8": "5", "5": END, "?": "x", "x": "x"}
    | chain.spelled("abcdefg")
    | {"g": END}
)
CONTEXT = 48


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain.save(tmp_path_factory.mktemp("models") / "known", SUCCESSORS, context=CONTEXT)


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of V3's architecture with random weights, a router bias and an MTP layer."""
    text = (golden.GOLDEN / "v3_like" / "config_published.json").read_text()
    config = Config.from_hf(json.loads(text) | {"vocab_size": 416})
    tokenizer = Tokenizer.load(chain.TOKENIZER, config)
    model = Model(config, init(config, jax.random.key(3)), tokenizer, "random")
    return save_hf(model, tmp_path_factory.mktemp("models") / "random")


class Command:
    """Runs `deepzoo` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *args: object, stdin: bytes = b"") -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        source = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        self._monkeypatch.setattr(sys, "stdin", source)
        status = cli.main([str(arg) for arg in args])
        out, err = self._capsys.readouterr()
        return status, out, err

    def mistake(self, *args: object, stdin: bytes = b"", status: int = 2) -> str:
        """What the one line says after `deepzoo: `; nothing else may be printed."""
        found, out, err = self(*args, stdin=stdin)
        assert (found, out) == (status, ""), err
        line = re.fullmatch(r"deepzoo: (.+)\n", err)
        assert line, f"not one line: {err!r}"
        return line[1]


@pytest.fixture
def deepzoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


# Help and dispatch.


def test_help_lists_every_command_with_a_line(deepzoo: Command):
    status, out, err = deepzoo()
    assert (status, err) == (0, "")
    listed = dict(re.findall(r"^  ([a-z]+) +(\S.+\.)$", out, re.M))
    assert listed == cli.COMMANDS
    assert set(listed) >= {"models", "show", "generate", "chat", "convert"}
    for other in ("--help", "-h", "help"):
        assert deepzoo(other) == (0, out, "")


def test_version(deepzoo: Command):
    assert deepzoo("--version") == (0, f"deepzoo {version('deepzoo')}\n", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_tells_its_options_and_an_example_that_parses(
    deepzoo: Command, name: str
):
    status, out, err = deepzoo(name, "--help")
    assert (status, err) == (0, "")
    kind = getattr(import_module(f"deepzoo.zoo.cli.{name}"), name.capitalize())
    assert f"usage: deepzoo {name}" in out
    options = {
        field for field in kind.__dataclass_fields__ if f"--{field.replace('_', '-')} " in out
    }
    words = {"model", "prompts", "name", "source", "destination", "what"}
    assert set(kind.__dataclass_fields__) - options <= words
    example = re.search(rf"Example: deepzoo {name} ?(.*)", out)
    assert example
    words = re.findall(r'"[^"]*"|\S+', example[1])
    assert isinstance(cli.usage.parse(kind, name, [w.strip('"') for w in words]), kind)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["generat"], "no command is called 'generat'; did you mean generate?"),
        (["--versoin"], "no option is called '--versoin'; did you mean --version?"),
        (["frobnicate"], "no command is called 'frobnicate'; `deepzoo --help` lists all"),
        (["show"], "NAME is missing; `deepzoo show --help` tells the options"),
        (["show", "a", "b"], "b is too much; `deepzoo show --help` tells the options"),
        (["show", "deepseek-r1", "--jsn"], "there is no option --jsn, did you mean --json?"),
        (["generate", "m", "p", "--max-token", "3"], "did you mean --max-tokens?"),
        (["generate", "m", "p", "--temperature", "hot"], "expected a number, got 'hot'"),
        (["generate", "m", "p", "--top-k", "1.5"], "expected a whole number, got '1.5'"),
        (["generate", "m", "p", "--seed"], "--seed needs a value"),
        (["generate", "m", "p", "--json=no"], "--json takes no value"),
        (["generate", "m", "p", "--dtype", "int4"], "--dtype: expected one of bfloat16, float32"),
        (["generate"], "MODEL is missing"),
        (["chat"], "MODEL is missing"),
        (["convert", "a", "b"], "--to {hf,orbax} is missing"),
        (["convert", "a", "--to", "hf"], "DST is missing"),
        (["convert", "a", "b", "--to", "gguf"], "--to: expected one of hf, orbax, got 'gguf'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(deepzoo: Command, args: list[str], told: str):
    assert told in deepzoo.mistake(*args)


def test_a_complaint_of_the_parser_in_unknown_words_is_still_shown():
    box = "╭─ New kind ──────╮\n│ \x1b[1mIt is\x1b[0m all      │\n│ wrong.          │\n╰───╯\n"
    assert cli.usage.condense(box) == "It is all wrong."
    assert cli.usage.condense("no frame\nat all\n") == "no frame at all"


# Models and show.


def test_models_prints_a_line_or_an_object_for_each(deepzoo: Command):
    status, out, err = deepzoo("models")
    assert (status, err) == (0, "")
    assert [line.split("\t")[0] for line in out.splitlines()] == catalog.models()
    found = json.loads(deepzoo("models", "--find", "KIMI", "--json")[1])
    assert [card["name"] for card in found] == [n for n in catalog.models() if "kimi" in n]


def test_show_tells_of_a_name_and_of_a_directory(deepzoo: Command, directory: Path):
    told = json.loads(deepzoo("show", "deepseek-r1", "--json")[1])
    assert told["parameters"]["main"] == 671_026_419_200
    status, out, err = deepzoo("show", directory)
    assert (status, err) == (0, "")
    # Embedding and head, four projections with biases on three, the MLP, three norms.
    parts = [2 * 416 * 416, 2 * 416 * 416 + 416, 2 * (416 * 208 + 208), 3 * 8 * 416, 3 * 416]
    assert f"total: {sum(parts):,} " in out


def test_show_refuses_an_unknown_name_and_a_damaged_config(deepzoo: Command, tmp_path: Path):
    assert "did you mean deepseek-r1" in deepzoo.mistake("show", "deepsek-r1")
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path / "config.json") in deepzoo.mistake("show", tmp_path)


# Generate.


def test_generate_prints_the_answer_and_nothing_else(deepzoo: Command, directory: Path):
    assert deepzoo("generate", directory, "47 + 38 =") == (0, "85\n", "")
    assert deepzoo("generate", directory, "--", "-3 =") == (0, "85\n", "")


def test_thoughts_are_plain_text_where_there_is_no_terminal(deepzoo: Command, directory: Path):
    status, out, err = deepzoo("generate", directory, "hello", "--format", "r1")
    assert (status, out, err) == (0, "hm</think>42\n", "")


def test_several_prompts_get_a_heading_each(deepzoo: Command, directory: Path):
    out = deepzoo("generate", directory, "6 =", "ab\ncd", "=")[1]
    assert out == "== 1: 6 =\n85\n\n== 2: ab cd\nefg\n\n== 3: =\n85\n"


def test_prompts_come_from_files_and_from_stdin(deepzoo: Command, directory: Path, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf6 =\r\n\n  \nab\n")
    of_file = "== 1: 6 =\n85\n\n== 2: ab\ncdefg\n"
    assert deepzoo("generate", directory, "--file", file)[1] == of_file
    assert deepzoo("generate", directory, "--file", "-", stdin=b"6 =\nab\n")[1] == of_file
    # The prompt is all of stdin but the last line end; "\n" itself has a successor.
    assert deepzoo("generate", directory, "-", stdin=b"ab\n\n=\n")[1] == "85\n"
    out = deepzoo("generate", directory, "ab", "-", "--file", file, stdin=b"=")[1]
    assert [line[6:] for line in out.splitlines() if line[:2] == "=="] == ["ab", "=", "6 =", "ab"]


def test_json_is_an_object_a_line_with_everything_a_program_needs(
    deepzoo: Command, directory: Path
):
    args = ("generate", directory, "hello", "again", "--format", "r1", "--json")
    status, out, err = deepzoo(*args, "--temperature", "0")
    assert (status, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("hello", "again")
    assert first["text"] == second["text"] == "hm</think>42"
    assert (first["thinking"], first["answer"], first["finish"]) == ("hm", "42", "eos")
    tokenizer = Tokenizer.load(chain.TOKENIZER)
    assert tokenizer.decode(first["tokens"], skip_special=True) == first["text"]
    assert len(first["tokens"]) == 6
    # The identity of 416 places, normalised, times a head of 5 or, for the end alone, of 1.
    length = math.sqrt(416) * np.array([5.0, 1.0])
    logprob = length[0] - np.logaddexp.reduce([*length, *np.zeros(414)])
    np.testing.assert_allclose(first["logprobs"][:5], logprob, atol=1e-4)


def test_options_reach_the_sampler(deepzoo: Command, directory: Path):
    def answer(*args: object, prompt: str = "a") -> str:
        return deepzoo("generate", directory, prompt, *args)[1].removesuffix("\n")

    assert answer() == "bcdefg"
    assert answer("--max-tokens", 2) == "bc"
    assert answer("--stop", "zz", "--stop", "de") == "bc"
    assert answer("--raw") == "bcdefg"
    assert answer("--raw", "--max-tokens", 3, prompt="ab?") == "xxx"
    hot = ("--temperature", 50, "--max-tokens", 8)
    assert answer(*hot, "--seed", 1) == answer(*hot, "--seed", 1) != answer(*hot, "--seed", 2)
    assert answer(*hot, "--top-k", 1) == answer(*hot, "--min-p", 1) == "bcdefg"
    assert answer(*hot, "--top-p", 1e-6) == "bcdefg"
    finish = json.loads(answer("--stop", "c", "--json"))
    assert (finish["text"], finish["finish"]) == ("b", "stop")


def test_an_answer_ends_where_the_context_ends(deepzoo: Command, directory: Path):
    found = json.loads(deepzoo("generate", directory, "?", "--json")[1])
    assert (found["finish"], found["text"]) == ("length", "x" * (CONTEXT - 2))  # bos and "?"


def test_thinking_switches_a_model_with_both_modes(deepzoo: Command, directory: Path):
    args = ("generate", directory, "hello", "--json", "--format", "v3_1")
    answers = [json.loads(deepzoo(*args, flag)[1]) for flag in ("--thinking", "--no-thinking")]
    assert [a["answer"] for a in answers] == ["", "42"]  # "<think>" has no successor


def test_speculative_decoding_gives_the_same_and_tells_its_acceptance(
    deepzoo: Command, with_mtp: Path
):
    args = ("generate", with_mtp, "three plus four", "--max-tokens", 12, "--temperature", 0)
    plain = deepzoo(*args, "--json")[1]
    status, out, err = deepzoo(*args, "--json", "--stats", "--speculative")
    assert json.loads(out)["tokens"] == json.loads(plain)["tokens"]
    assert status == 0
    told = re.search(r"(\d+) of (\d+) drafts accepted", err)
    assert told and 0 <= int(told[1]) <= int(told[2]) and int(told[2]) >= 5
    assert f"{len(json.loads(out)['tokens'])} tokens in " in err
    assert "--no-mtp" in deepzoo.mistake(*args, "--speculative", "--no-mtp")


def test_dtype_and_no_mtp_change_what_is_loaded(deepzoo: Command, with_mtp: Path):
    args = ("generate", with_mtp, "seven", "--max-tokens", 4, "--temperature", 0, "--json")
    exact = json.loads(deepzoo(*args)[1])
    assert json.loads(deepzoo(*args, "--no-mtp")[1])["tokens"] == exact["tokens"]
    rounded = json.loads(deepzoo(*args, "--dtype", "bfloat16")[1])
    assert rounded["logprobs"] != exact["logprobs"]
    np.testing.assert_allclose(rounded["logprobs"][0], exact["logprobs"][0], atol=0.1)


def test_stats_go_to_stderr(deepzoo: Command, directory: Path):
    status, out, err = deepzoo("generate", directory, "a", "--stats")
    assert (status, out) == (0, "bcdefg\n")
    assert re.fullmatch(r"deepzoo: 7 tokens in [\d.]+ s \([\d.]+ a second, .+\n", err)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "no prompt given; write one after the model"),
        ([""], "a prompt is empty"),
        (["-", "--file", "-"], "stdin can be read once"),
        (["-"], "a prompt is empty"),
        (["a", "--file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["a", "--temperature", "-1"], "temperature is -1.0; expected a number from 0 to 100"),
        (["a", "--temperature", "nan"], "temperature is nan; expected a number from 0 to 100"),
        (["a", "--top-p", "1.5"], "top_p is 1.5; expected a number above 0 and up to 1"),
        (["a", "--top-p", "0"], "top_p is 0.0; expected a number above 0 and up to 1"),
        (["a", "--top-k", "-1"], "top_k is -1; expected 0 for all, or a number of tokens"),
        (["a", "--min-p", "2"], "min_p is 2.0; expected a number from 0 to 1"),
        (["a", "--max-tokens", "0"], "max_tokens is 0; expected an integer of at least 1"),
        (["a", "--seed", "-1"], "seed is -1; expected an integer from 0 to 2^32 - 1"),
        (["a", "--stop", ""], "stop strings must be non-empty text"),
        (["a", "--format", "r2"], "unknown chat format 'r2'; choose from plain, v2_chat"),
        (["a", "--format", "kimi_k2"], "there is no format kimi_k2"),
        (["a", "--thinking", "--no-thinking"], "--thinking and --no-thinking exclude each other"),
        (["a", "--format", "r1", "--no-thinking"], "the chat format r1 always thinks"),
        (["a", "--raw", "--system", "be brief"], "--raw continues a text"),
        (["a", "--system", "be brief"], "has no place for a system message"),
        (["a", "--revision", "main"], "--revision is of a hub repository; add --download"),
        (["a", "--speculative"], "speculative decoding needs an MTP layer"),
        (["a" * CONTEXT], f"prompt 1 has {CONTEXT + 1} tokens and the context of this model is"),
        (["a", "b" * 999], "prompt 2 has 1000 tokens"),
        (["\udcff"], "half a surrogate pair"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_line(
    deepzoo: Command, directory: Path, args: list[str], told: str
):
    assert told in deepzoo.mistake("generate", directory, *args)


def test_bytes_that_are_not_utf8_are_named(deepzoo: Command, directory: Path, tmp_path: Path):
    told = deepzoo.mistake("generate", directory, "-", stdin=b"caf\xe9 =")
    assert told == "stdin is not UTF-8: byte 0xe9 at offset 3"
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    told = deepzoo.mistake("generate", directory, "--file", tmp_path / "latin.txt")
    assert told == f"{tmp_path / 'latin.txt'} is not UTF-8: byte 0xff at offset 0"
    (tmp_path / "blank.txt").write_text("\n \n")
    told = deepzoo.mistake("generate", directory, "--file", tmp_path / "blank.txt")
    assert told == f"{tmp_path / 'blank.txt'} holds no prompt; write one a line"


# Models that cannot be loaded.


@pytest.mark.parametrize("command", [["generate"], ["chat"]])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("deepseek-r1-distil-qwen-7b", "did you mean deepseek-r1-distill-qwen-7b"),
        ("deepseek-r1", "to fetch deepseek-ai/DeepSeek-R1 from the hub"),
        ("some/where", "to fetch some/where from the hub"),
        ("./nowhere", "nowhere: no such directory"),
        ("", "no model is called ''"),
    ],
)
def test_a_model_that_is_not_here(deepzoo: Command, command: list[str], model: str, told: str):
    prompt = ["hi"] if command == ["generate"] else []
    assert told in deepzoo.mistake(*command, model, *prompt)


def test_directories_that_hold_no_usable_model(deepzoo: Command, directory: Path, tmp_path: Path):
    def told() -> str:
        return deepzoo.mistake("generate", tmp_path / "m", "hi")

    (tmp_path / "m").mkdir()
    assert "config.json" in told()
    (tmp_path / "m").rmdir()
    shutil.copytree(directory, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "has no tokenizer.json" in told()
    assert "has no tokenizer.json" in deepzoo.mistake("chat", tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in told()
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert "model.safetensors" in told()
    weights.unlink()
    assert "safetensors" in told()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "gpt2" in told()
    (tmp_path / "file").write_text("")
    assert "is not a directory" in deepzoo.mistake("generate", tmp_path / "file", "hi")


# Convert.


def test_convert_there_and_back_keeps_every_bit(deepzoo: Command, with_mtp: Path, tmp_path: Path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert deepzoo("convert", with_mtp, ours, "--to", "orbax") == (0, f"{ours}\n", "")
    assert deepzoo("convert", ours, back, "--to", "hf") == (0, f"{back}\n", "")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (back / name).read_bytes() == (with_mtp / name).read_bytes()
    assert (
        deepzoo("generate", ours, "a", "--json")[1].split('"timing"')[0]
        == (deepzoo("generate", with_mtp, "a", "--json")[1].split('"timing"')[0])
    )


def test_convert_casts_quantises_and_leaves_the_mtp_layer_out(
    deepzoo: Command, with_mtp: Path, tmp_path: Path
):
    small, fp8 = tmp_path / "small", tmp_path / "fp8"
    args = ("--to", "hf", "--dtype", "bfloat16", "--no-mtp")
    assert deepzoo("convert", with_mtp, small, *args)[0] == 0
    config = load(small).config
    assert (config.dtype, config.num_nextn_predict_layers) == ("bfloat16", 0)
    assert deepzoo("convert", small, fp8, "--to", "hf", "--dtype", "float8")[0] == 0
    quantised = load(fp8, stacked=True)
    assert quantised.config.quantization_config is not None
    weight = quantised.params["dense"]["mlp"]["up_proj"]["weight"]
    assert weight.dtype.name == "float8_e4m3fn"


def test_convert_refuses_and_leaves_nothing_behind(
    deepzoo: Command, directory: Path, tmp_path: Path
):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    told = deepzoo.mistake("convert", directory, taken, "--to", "hf")
    assert str(taken) in told and "empty" in told
    file = taken / "mine.txt"
    assert str(file) in deepzoo.mistake("convert", directory, file, "--to", "orbax")
    assert "no model is called" in deepzoo.mistake("convert", "nope", tmp_path / "x", "--to", "hf")
    told = deepzoo.mistake("convert", directory, tmp_path / "x", "--to", "hf", "--dtype", "float8")
    assert "float8" in told or "FP8" in told
    damaged = tmp_path / "damaged"
    shutil.copytree(directory, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in deepzoo.mistake(
        "convert", damaged, tmp_path / "x", "--to", "orbax"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "taken"]
    assert file.read_text() == "mine"


# The process: exit status, streams, terminal.


def test_an_unexpected_error_is_one_line_that_tells_how_to_see_more(
    deepzoo: Command, monkeypatch: pytest.MonkeyPatch
):
    def broken() -> None:
        raise KeyError("who\nknows")

    monkeypatch.setattr(catalog, "models", broken)
    told = deepzoo.mistake("models", status=1)
    assert told.startswith("unexpected KeyError: ")
    assert told.endswith("(DEEPZOO_TRACEBACK=1 shows where)")
    monkeypatch.setenv("DEEPZOO_TRACEBACK", "1")
    status, out, err = deepzoo("models")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback (most recent call last)")
    assert "in broken" in err


def test_a_message_cannot_command_the_terminal(deepzoo: Command):
    assert "\\x1b[31mred" in deepzoo.mistake("show", "\x1b[31mred")


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "deepzoo.zoo.cli", "models"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "deepzoo.zoo.cli", "models"],
            stdout=full, stderr=subprocess.PIPE, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == b"deepzoo: No space left on device\n"


def test_help_and_mistakes_need_no_jax():
    source = """
        import sys
        from deepzoo.zoo.cli import main
        assert [main(args) for args in (["--help"], ["--version"], ["nope"])] == [0, 0, 2]
        assert "jax" not in sys.modules
    """
    child.run(source)


def test_on_a_terminal_the_answer_streams_with_its_thought_dimmed(directory: Path):
    command = ("-m", "deepzoo.zoo.cli", "generate", str(directory), "hello", "--format", "r1")
    with Terminal(*command) as terminal:
        status, shown = terminal.finish(timeout=300)
    assert status == 0
    thought, answer = re.split(r"\r\n\r\n", shown.rsplit("\x1b[2K", 1)[-1])
    assert "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", thought)) == "hm"
    assert answer == "42\r\n"
