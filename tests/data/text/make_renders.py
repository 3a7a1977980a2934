"""Renders dialogues with the published Jinja templates, which this repository does not hold.

    python tests/data/text/make_renders.py TEMPLATES.md [--fuzz N]

TEMPLATES.md is a text with one section per chat format: a heading, the md5 of the template, and the
template in a fence marked `jinja`. Writes renders.json beside this file; `--fuzz N` instead
compares N random dialogues per format with deepzoo's own formats and writes nothing. The
environment is that of transformers: sandboxed, trim_blocks, lstrip_blocks.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT = Path(__file__).with_name("renders.json")
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"  # U+FF5C and U+2581, as in the vocabulary
# heading of a section (its beginning) -> name of the format here
SECTIONS = {
    "V2-Lite-Chat": "v2_chat",
    "V2-Chat-0628": "v2_0628",
    "V2.5": "v2_5",
    "V3 (": "v3",
    "V3-0324": "v3_0324",
    "R1 / R1-Zero / Distills - first": "r1_first",
    "R1, R1-Distill": "r1",
    "R1-0528": "r1_0528",
    "V3.1 (": "v3_1",
    "V3.1-Terminus": "v3_1_terminus",
    "Moonlight": "moonlight",
}
NO_TOOLS = ("v2_chat", "v2_0628", "moonlight")
HYBRID = ("v3_1", "v3_1_terminus")


def templates(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in path.read_text(encoding="utf-8").split("\n## ")[1:]:
        name = next((n for head, n in SECTIONS.items() if section.startswith(head)), None)
        fence = re.search(r"```jinja\n(.*?)\n```\n", section, re.DOTALL)
        md5 = re.search(r"md5 ([0-9a-f]{32})", section)
        if name is None or fence is None or md5 is None:
            continue
        if hashlib.md5(fence[1].encode()).hexdigest() != md5[1]:
            raise SystemExit(f"{name}: the template's md5 is not {md5[1]}")
        found[name] = fence[1]
    if missing := set(SECTIONS.values()) - set(found):
        raise SystemExit(f"no template found for {', '.join(sorted(missing))}")
    return found


def system(text: str = "SYS") -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: str, **more: Any) -> dict[str, Any]:
    made = {"role": "assistant", "content": text, **more}
    if calls:
        functions = [{"name": name, "arguments": f'{{"of": "{name}"}}'} for name in calls]
        made["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    return made


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


THOUGHT = assistant("<think>\nR1\n</think>\n\nA1")
TWICE = assistant("<think>a</think>b</think>c")
DIALOGUES: dict[str, list[dict[str, Any]]] = {
    "user": [user("U1")],
    "system and user": [system(), user("U1")],
    "two systems": [system("S1"), user("U1"), assistant("A1"), system("S2"), user("U2")],
    "only system": [system()],
    "turns": [user("U1"), assistant("A1"), user("U2"), assistant("A2"), user("U3")],
    "thought in history": [system(), user("U1"), THOUGHT, user("U2")],
    "ends with assistant": [system(), user("U1"), THOUGHT],
    "two closing tags": [user("U1"), TWICE, user("U2")],
    "assistant twice": [user("U1"), assistant("A1"), assistant("A2"), user("U2"), user("U3")],
    "white space": [system("  S\n"), user("\n\tU1 \n"), assistant(" A1\n\n"), user("")],
    "spelled marks": [user(f"{BOS}<think></think>{{{{ 1 }}}}{{% x %}}"), assistant("<|im_end|>")],
    "prefix": [user("U1"), assistant("A1", prefix=True)],
    "system and prefix": [system(), user("U1"), assistant("A1", prefix=True)],
    "prefix then user": [user("U1"), assistant("A1", prefix=True), user("U2"), assistant("A2")],
}
WITH_TOOLS: dict[str, list[dict[str, Any]]] = {
    "one call": [user("U1"), assistant(None, "f")],
    "one call and text": [system(), user("U1"), assistant("T1", "f"), tool("O1")],
    "two calls": [user("U1"), assistant(None, "f", "g"), tool("O1"), tool("O2")],
    "three calls": [user("U1"), assistant("", "f", "g", "h"), tool("O1"), tool("O2"), tool("O3")],
    "answered call": [user("U1"), assistant(None, "f"), tool("O1"), THOUGHT, user("U2")],
    "two tool turns": [
        *[user("U1"), assistant(None, "f"), tool("O1"), assistant(None, "g", "h"), tool("O2")],
        *[tool("O3"), assistant("A1"), user("U2"), assistant(None, "f"), tool("O4")],
        *[assistant("A2"), user("U3")],
    ],
    "thought before call": [user("U1"), assistant("<think>R</think>T", "f"), tool("O1"), user("U")],
    "call after answer": [system(), user("U1"), assistant("A1"), assistant("T1", "f"), tool("O1")],
    "system and call": [system(), assistant("T1", "f"), tool("O1"), assistant("A1")],
}


def usable(name: str, messages: list[dict[str, Any]]) -> bool:
    """The 0528 template fails on tool calls without content: nothing to compare with."""
    return not (name == "r1_0528" and any(m["content"] is None for m in messages))


def render_all(environment: Any, found: dict[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, text in found.items():
        template = environment.from_string(text)
        dialogues = DIALOGUES if name in NO_TOOLS else DIALOGUES | WITH_TOOLS
        rows = out.setdefault(name, {})
        for title, messages in dialogues.items():
            if not usable(name, messages):
                continue
            for thinking in (False, True) if name in HYBRID else (None,):
                for prompt in (True, False):
                    key = f"{title} | prompt={prompt} | thinking={thinking}"
                    rows[key] = render(template, messages, prompt, thinking)
    return {"dialogues": DIALOGUES | WITH_TOOLS, "renders": out}


def render(template: Any, messages: Any, prompt: bool, thinking: bool | None) -> str:
    more = {} if thinking is None else {"thinking": thinking}
    return template.render(messages=messages, add_generation_prompt=prompt, bos_token=BOS, **more)


def random_messages(draw: random.Random, tools: bool) -> list[dict[str, Any]]:
    texts = ["", "x", " x\n", "a</think>b", "<think>a</think>b</think>c", "\n\nd"]
    messages = []
    for _ in range(draw.randint(1, 9)):
        words = draw.choice(texts)
        match draw.choice(["system", "user", "assistant", *["tool", "call", "call"] * tools]):
            case "system":
                messages.append(system(words))
            case "user":
                messages.append(user(words))
            case "assistant":
                prefix = draw.choice([{}, {}, {"prefix": True}, {"prefix": False}])
                messages.append(assistant(words, **prefix))
            case "tool":
                messages.append(tool(words))
            case "call":
                names = [draw.choice("fgh") for _ in range(draw.randint(1, 3))]
                messages.append(assistant(draw.choice([None, words]), *names))
    return messages


def fuzz(environment: Any, found: dict[str, str], count: int) -> None:
    from deepzoo.zoo import chat

    draw = random.Random(0)
    for name, text in found.items():
        template = environment.from_string(text)
        for _ in range(count):
            messages = random_messages(draw, tools=name not in NO_TOOLS)
            if not usable(name, messages):
                continue
            prompt = draw.random() < 0.7
            thinking = draw.choice([False, True]) if name in HYBRID else None
            theirs = render(template, messages, prompt, thinking)
            ours = chat.render(messages, name, add_generation_prompt=prompt, thinking=thinking)
            if theirs != ours:
                raise SystemExit(f"{name}: {messages}\n  theirs {theirs!r}\n  ours   {ours!r}")
        print(f"{name}: {count} random dialogues equal")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("templates", type=Path)
    parser.add_argument("--fuzz", type=int, default=0)
    options = parser.parse_args()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    found = templates(options.templates)
    if options.fuzz:
        fuzz(environment, found, options.fuzz)
        return
    made = render_all(environment, found)
    text = json.dumps(made, ensure_ascii=False, indent=0)
    OUT.write_text(text + "\n", encoding="utf-8")
    print(f"{OUT}: {sum(map(len, made['renders'].values()))} renders")


if __name__ == "__main__":
    main()
