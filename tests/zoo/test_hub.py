"""Hub downloads: asked for, pinned to a commit, only the needed files, and verified.

The hub library reads its settings at import, so every test is a child process with its own cache.
"""

import json
import socket
import textwrap
from pathlib import Path
from typing import Any

import child
import pytest
from small_hub import Hub, small_hub

from deepzoo import zoo

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = Path(__file__).parents[1] / "data" / "text" / "tokenizer"
REPO, FIRST, SECOND = "somebody/tiny-v3", "1" * 40, "2" * 40
WEIGHTS = [
    "model.safetensors.index.json",
    *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
]


def repository() -> dict[str, bytes]:
    """A repository as the published ones are: with code and other formats beside the weights."""
    case = GOLDEN / "v3_like"
    found = {name: (case / name).read_bytes() for name in ["config.json", *WEIGHTS]}
    found |= {
        "generation_config.json": b"{}",
        "README.md": b"not needed",
        "modeling_deepseek.py": b"raise SystemExit('code from the hub ran')",
        "pytorch_model.bin": b"not needed",
        "figures/benchmark.png": b"not needed",
        "original/consolidated.safetensors": b"not needed",
        "consolidated.safetensors": b"not needed",
    }
    return found


def load(hub: Hub | str, cache: Path, call: str, **env: str) -> dict[str, Any]:
    """What `call` gives or raises in a child that knows only this hub."""
    url = hub if isinstance(hub, str) else hub.url
    source = """
        import json, sys
        from deepzoo import zoo
        from deepzoo.zoo import hub
        try:
            model = eval(sys.argv[1])
            print(json.dumps({"name": model.name, "source": str(model.source),
                              "layers": model.config.num_hidden_layers}))
        except zoo.DeepzooError as error:
            print(json.dumps({"error": str(error)}))
    """
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | env
    done = child.run(textwrap.dedent(source), call, env=settings)
    assert done.stderr == ""  # no bars and no warnings where nobody watches
    return json.loads(done.stdout)


@pytest.fixture
def hub():
    commits = {REPO: {FIRST: repository(), SECOND: repository()}}
    with small_hub(commits, {REPO: {"main": FIRST, "next": SECOND}}) as running:
        yield running


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_branch_is_resolved_and_only_the_needed_files_are_fetched(hub: Hub, tmp_path: Path):
    got = load(hub, tmp_path, f"zoo.load({REPO!r}, download=True)")
    assert got["name"] == REPO and got["layers"] == 3
    assert Path(got["source"]).name == FIRST
    assert hub.fetched() == {"config.json", "generation_config.json", *WEIGHTS}
    asked = [r for r in hub.requests if "/resolve/" in r]
    assert asked and all(f"/resolve/{FIRST}/" in r for r in asked)


def test_a_push_in_the_middle_does_not_mix_versions(hub: Hub, tmp_path: Path):
    other = {name: b"damaged" for name in repository()}
    hub.commits[REPO]["3" * 40] = other
    got = load(hub, tmp_path, f"zoo.load({REPO!r}, download=True, revision='next')")
    hub.branches[REPO]["main"] = "3" * 40
    assert Path(got["source"]).name == SECOND
    again = load(hub, tmp_path, f"zoo.load({REPO!r}, download=True, revision={SECOND!r})")
    assert again == got


def test_a_pinned_commit_in_the_cache_needs_no_network(hub: Hub, tmp_path: Path):
    call = f"zoo.load({REPO!r}, download=True, revision={FIRST!r})"
    got = load(hub, tmp_path, call)
    asked = len(hub.requests)
    assert load(hub, tmp_path, call) == got
    assert len(hub.requests) == asked
    assert load(closed_port(), tmp_path, call, HF_HUB_OFFLINE="1") == got


def test_offline_the_message_says_what_to_do(hub: Hub, tmp_path: Path):
    call = f"zoo.load({REPO!r}, download=True)"
    url = closed_port()
    empty = load(url, tmp_path, call)["error"]
    assert empty.startswith(f"{REPO}: cannot be fetched from {url} (")
    assert "check the connection, or fetch it where there is a network" in empty
    load(hub, tmp_path, call)
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        held = load(url, tmp_path, call, **env)["error"]
        assert f"the cache holds commit {FIRST}: pass it as revision=" in held
        assert "\n" not in held


def test_without_download_nothing_is_asked_for(hub: Hub, tmp_path: Path):
    message = load(hub, tmp_path, f"zoo.load({REPO!r})")["error"]
    assert "download=True" in message and REPO in message
    assert load(hub, tmp_path, "zoo.load('deepseek-r1')")["error"].startswith("deepseek-r1: ")
    assert hub.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_released_name_is_fetched_from_its_repository(hub: Hub, tmp_path: Path):
    card = zoo.card("deepseek-r1")
    assert card.repo is not None
    hub.commits[card.repo] = {FIRST: repository()}
    hub.branches[card.repo] = {"main": FIRST}
    got = load(hub, tmp_path, "zoo.load('deepseek-r1', download=True)")
    assert got["name"] == card.repo


def test_a_file_that_arrives_damaged_does_not_stay(hub: Hub, tmp_path: Path):
    whole = repository()[WEIGHTS[2]]
    hub.damage[WEIGHTS[2]] = whole[:-1] + bytes([whole[-1] ^ 1])
    call = f"zoo.load({REPO!r}, download=True)"
    message = load(hub, tmp_path, call)["error"]
    assert message.startswith(f"{REPO}: {WEIGHTS[2]} arrived damaged")
    assert not list(tmp_path.rglob(WEIGHTS[2]))
    hub.damage.clear()
    assert load(hub, tmp_path, call)["layers"] == 3


def test_the_tokenizer_comes_along(hub: Hub, tmp_path: Path):
    files = {p.name: p.read_bytes() for p in TOKENIZER.glob("tokenizer*.json")}
    config = json.loads(hub.commits[REPO][FIRST]["config.json"])
    files["config.json"] = json.dumps(config | {"vocab_size": 1 << 20}).encode()
    hub.commits[REPO][FIRST] |= files
    # The weights do not fit the larger vocabulary; this is about what is fetched.
    load(hub, tmp_path, f"zoo.load({REPO!r}, download=True)")
    assert {"tokenizer.json", "tokenizer_config.json"} <= hub.fetched()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": None}, "no config.json"),
        ({WEIGHTS[0]: None}, "neither model.safetensors nor"),
        ({WEIGHTS[1]: None}, f"names {WEIGHTS[1]}, which the repository lacks"),
        ({WEIGHTS[0]: b'{"weight_map": {"a": "../../x.safetensors"}}'}, "bare name"),
        ({WEIGHTS[0]: b'{"weight_map": {}}'}, "weight_map"),
        ({WEIGHTS[0]: b"[" * 100_000}, "nested deeper"),
    ],
)
def test_a_repository_that_is_no_model_is_refused(
    hub: Hub, tmp_path: Path, change: dict[str, bytes | None], message: str
):
    held = {k: v for k, v in (repository() | change).items() if v is not None}
    hub.commits[REPO][FIRST] = held
    got = load(hub, tmp_path, f"zoo.load({REPO!r}, download=True)")["error"]
    assert message in got and "\n" not in got
    assert not {n for n in hub.fetched() if n.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("zoo.load('nobody/nothing', download=True)", "no such repository on the hub"),
        (f"zoo.load({REPO!r}, download=True, revision='v9')", "has no revision 'v9'"),
        (f"hub.download({'../' + REPO!r})", "is no hub id"),
        (f"zoo.load({REPO!r}, revision='main')", "download=True"),
    ],
)
def test_a_wrong_request_is_one_line(hub: Hub, tmp_path: Path, call: str, message: str):
    got = load(hub, tmp_path, call)["error"]
    assert message in got and "\n" not in got
