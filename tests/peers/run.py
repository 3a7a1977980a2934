"""deepzoo and its peers, measured in turn: one command writes results.json and README.md's table.

    uv run python tests/peers/run.py --transformers PYTHON --trl PYTHON \\
        --jax-llm-examples PYTHON --clone DIRECTORY

Each PYTHON is that of an environment with the peer, README.md tells how to make them; a peer
without one is left out, and what results.json says of it stays. Both sides get the same checkpoint
and the same two threads, and take turns round by round. Every comparison also checks that both
sides hold the same model or made the same tokens; it stops where they do not.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import table

from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.countdown import prompt
from deepzoo.recipes.parts.countdown_tokenizer import tokenizer_files
from deepzoo.zoo.bench import cpu
from deepzoo.zoo.config import Config
from deepzoo.zoo.convert import quantize
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.load import read_tokenizer
from deepzoo.zoo.prompt import encode
from deepzoo.zoo.types import Model

THREADS = 2
HERE = Path(__file__).parent

# V3's architecture with R1's RoPE scaling, about as large as `cpu.CONFIG`.
R1 = dataclasses.replace(
    cpu.CONFIG, model_type="deepseek_v3", dtype="bfloat16", q_lora_rank=256, n_shared_experts=1,
    n_group=8, topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, max_position_embeddings=163840,
    rope_scaling=zoo.config("deepseek-r1").rope_scaling,
)  # fmt: skip
STUDENT = pretrain.PRESETS["student_nano"].config
LARGER = dataclasses.replace(
    STUDENT, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
)  # fmt: skip
# A rate at which nothing is learned: what the two sides would learn from noise moves the lengths of
# their answers apart, and with them the work.
GRPO = {"answers": 8, "max_tokens": 64, "rate": 1e-9, "betas": (0.9, 0.95)}


class Process:
    """A side of a comparison: one line of JSON in, one out.

    Raises:
        RequestError: it ended; the message carries the last it said.
    """

    def __init__(self, python: str, script: str, *args: object):
        command = [python, str(HERE / script), *map(str, args)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX_"))}
        environment |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        self.name, self.errors = script, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment,
        )  # fmt: skip
        self.told = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["nothing"]
            raise RequestError(f"{self.name} ended; the last it said: {said[-1]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def ours(*args: object) -> Process:
    return Process(sys.executable, "ours.py", *args)


def turns(
    name: str, rounds: int, mine: Callable[[], Any], theirs: Callable[[], Any]
) -> Iterator[tuple[Any, Any]]:
    """What both sides gave in each round, the first one included. Who begins changes."""
    for n in range(rounds + 1):
        print(f"{name}: round {n} of {rounds}", file=sys.stderr, flush=True)
        if n % 2:
            found = mine(), theirs()
        else:
            found = (theirs(), mine())[::-1]
        yield found


def row(case: str, unit: str, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The first round, which compiles and warms up, is kept apart."""
    first, *pairs = pairs
    mine, other = zip(*pairs, strict=True)
    return {"case": case, "unit": unit, "ours": mine, "theirs": other, "first": first}


def same(what: str, mine: Any, other: Any, tolerance: float) -> None:
    """Demands that both sides have the same numbers, relative to their norm."""
    mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
    off = np.linalg.norm(mine - other) / np.linalg.norm(mine)
    print(f"{what}: relative difference {off:.2g}", file=sys.stderr, flush=True)
    if not off <= tolerance:
        raise RequestError(f"{what}: the two sides differ by {off:.2g}: no comparison")


def loading(python: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """Loads, each in a new process that has imported everything."""
    config = dataclasses.replace(cpu.CONFIG, dtype="bfloat16")
    model = Model(config, zoo.init(config, jax.random.key(0)))
    zoo.save_hf(model, scratch / "bf16")
    zoo.save_hf(quantize(model), scratch / "fp8")
    versions: dict[str, str] = {}

    def once(process: Process) -> dict[str, Any]:
        try:
            return process.ask()
        finally:
            versions.update(process.told)
            process.close()

    rows = []
    for name, directory, dtype, tolerance in (
        ("bfloat16", scratch / "bf16", "stored", 1e-6),
        ("block FP8, into bfloat16", scratch / "fp8", "plain", 1e-3),
    ):
        pairs = list(turns(
            name, rounds, lambda d=directory, t=dtype: once(ours("load", d, t)),
            lambda d=directory: once(Process(python, "transformers_load.py", d, THREADS)),
        ))  # fmt: skip
        for mine, other in pairs:
            same(f"{name}, parameters", mine["count"], other["count"], 0)
            same(f"{name}, their squares", mine["squares"], other["squares"], tolerance)
            assert mine["dtypes"] == other["dtypes"] == ["bfloat16"], (mine, other)
        rows += memory_rows(f"load {name}", pairs)
    kept = [once(ours("load", scratch / "fp8", "stored")) for _ in range(rounds + 1)]
    for at in memory_rows("load block FP8, kept in FP8", [(k, k) for k in kept]):
        rows.append(at | {"theirs": None})
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {
        "peer": "transformers", "title": "transformers: loading",
        "about": f"A V2 checkpoint of {size / 1e6:.0f}M parameters, from the page cache, imports"
        " not counted. Memory is the peak of the resident set while it loads, less what was"
        " resident before.",
        "versions": versions, "rows": rows,
    }  # fmt: skip


def memory_rows(name: str, pairs: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    above = [tuple(side["peak"] - side["before"] for side in pair) for pair in pairs]
    seconds = [tuple(side["seconds"] for side in pair) for pair in pairs]
    return [row(name, "s", seconds), row(f"{name}: peak", "MiB", above)]


def running(python: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """Decode, prefill and training, the cases of `deepzoo bench cpu`."""
    directory = scratch / "float32"
    zoo.save_hf(Model(cpu.CONFIG, zoo.init(cpu.CONFIG, jax.random.key(0))), directory)
    model, rows = zoo.load(directory), []
    peer = cpu.Peer("transformers", python, directory, THREADS)
    try:
        for case in cpu.CASES:
            train = case.operation == "train"
            mine = cpu.Training(model, case).measure if train else partial(cpu.ours, model, case)
            times = []
            for (a, found), (b, other) in turns(
                case.name, rounds, mine, partial(peer.measure, case)
            ):
                same(case.name, found, other, 1e-3 if train else 0)
                times.append((a, b))
            rows.append(row(case.name, "s", times))
    finally:
        peer.close()
    return {
        "peer": "transformers", "title": "transformers: generation and training",
        "about": "The model of `deepzoo bench cpu`, V2, float32. Decoding is 64 tokens a row.",
        "versions": peer.versions, "rows": rows,
    }  # fmt: skip


def r1(python: str, clone: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """Decode and prefill of the R1 architecture, in the only dtype that the peer has."""
    directory = scratch / "r1"
    zoo.save_hf(Model(R1, zoo.init(R1, jax.random.key(0))), directory)
    model, rows = zoo.load(directory), []
    peer = Process(python, "jax_llm_examples_r1.py", directory, clone)
    try:
        for case in cpu.CASES[:3]:
            ids = cpu.prompt_ids(case, R1.vocab_size)
            request = {"operation": case.operation, "ids": ids.tolist(), "tokens": cpu.TOKENS}
            request["capacity"] = max(256, 2 * case.length)  # as in `cpu.ours`
            if not rows:
                found = zoo.apply(R1, model.params, jax.numpy.asarray(ids)).logits[0, -1]
                other = peer.ask(**request | {"operation": "prefill"}, logits=True)["logits"]
                same("logits after the prompt, bfloat16", found, other, 0.1)
            pairs = turns(
                case.name, rounds, lambda case=case: cpu.ours(model, case)[0],
                lambda request=request: peer.ask(**request)["seconds"],
            )  # fmt: skip
            rows.append(row(case.name, "s", list(pairs)))
    finally:
        peer.close()
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {
        "peer": "jax-llm-examples", "title": "jax-llm-examples: DeepSeek R1",
        "about": f"R1's architecture with {size / 1e6:.0f}M parameters, bfloat16, greedy, 64 tokens"
        " a row. The peer is written for TPUs; on a CPU its experts go through"
        " `jax.lax.ragged_dot`.",
        "versions": peer.told, "rows": rows,
    }  # fmt: skip


def grpo(python: str, config: Config, prompts: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """GRPO steps of a student, on problems of Countdown."""
    size = sum(leaf.size for leaf in jax.tree.leaves(zoo.abstract(config)))
    directory = scratch / "student"
    settings = student(directory, config, prompts)
    sides = [
        ours("grpo", directory, json.dumps(settings)),
        Process(python, "trl_grpo.py", directory, THREADS, json.dumps(settings)),
    ]
    try:
        same("logits", *(side.told["logits"] for side in sides), 1e-4)
        pairs = list(turns("GRPO", rounds, sides[0].ask, sides[1].ask))
    finally:
        for side in sides:
            side.close()
    mine, other = (np.mean([pair[n]["length"] for pair in pairs]) for n in (0, 1))
    same("tokens of an answer", mine, other, 0.1)
    return {
        "peer": "TRL", "title": f"TRL: a step of GRPO, {size / 1e6:.0f}M parameters",
        "about": f"A student of Qwen2's architecture with random weights, float32: {prompts} x"
        f" {GRPO['answers']} answers of up to {GRPO['max_tokens']} tokens to problems of Countdown,"
        f" {mine:.0f} here and {other:.0f} there on average, one update, no KL term. Generation is"
        " what is spent in `rollout` and `GRPOTrainer._generate`; the peak is of the resident set"
        " of the whole process during a step.",
        "versions": {k: v for k, v in sides[1].told.items() if k not in ("imported", "logits")},
        "rows": step_rows(pairs, sides),
    }  # fmt: skip


def student(directory: Path, config: Config, prompts: int) -> dict[str, Any]:
    """Writes a student with its tokenizer; returns what `trl_grpo.py` and `ours.py` are told."""
    directory.mkdir()
    for name, data in tokenizer_files().items():
        (directory / name).write_bytes(data)
    tokenizer = read_tokenizer(directory, config)
    model = Model(config, zoo.init(config, jax.random.key(0)), tokenizer)
    zoo.save_hf(model, directory / "model")
    for path in (directory / "model").iterdir():
        path.rename(directory / path.name)
    (directory / "model").rmdir()
    rng = np.random.default_rng(0)
    texts = [prompt(int(n[0]), n[1:].tolist()) for n in rng.integers(1, 20, (16 * prompts, 4))]
    ids = encode(model, texts[0], raw=True).tokens
    return GRPO | {"prompts": prompts, "texts": texts, "ids": ids}


def step_rows(pairs: list[tuple[Any, Any]], sides: list[Process]) -> list[dict[str, Any]]:
    def each(value: Callable[[dict[str, Any]], float]) -> list[tuple[float, ...]]:
        return [tuple(map(value, pair)) for pair in pairs]

    grown = [tuple(s["peak"] - p.told["imported"] for s, p in zip(pair, sides, strict=True))
             for pair in pairs]  # fmt: skip
    return [
        row("GRPO, step", "s", each(lambda s: s["seconds"])),
        row("GRPO, generation", "s", each(lambda s: s["generation"])),
        row("GRPO, the rest, mostly the update", "s",
            each(lambda s: s["seconds"] - s["generation"])),
        row("GRPO, peak", "MiB", each(lambda s: s["peak"])),
        row("GRPO, peak less what the imports took", "MiB", grown),
    ]  # fmt: skip


def main() -> int:
    """Measures what it is given environments for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--trl", metavar="PYTHON")
    parser.add_argument("--jax-llm-examples", metavar="PYTHON")
    parser.add_argument("--clone", metavar="DIRECTORY", help="checkout of jax-llm-examples")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="loading, running, r1, grpo, grpo_larger")
    parser.add_argument("--dry", action="store_true", help="print the table, write nothing")
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="one thread, and seconds of the processor instead of the wall: for a machine that"
        " others are using; not for running",
    )  # fmt: skip
    given = parser.parse_args()
    global THREADS
    if given.cpu_time:
        THREADS, given.only = 1, given.only or ["loading", "r1", "grpo", "grpo_larger"]
        os.environ["PEERS_CLOCK"] = "cpu"
        if "running" in given.only:
            parser.error("running has no --cpu-time: `deepzoo bench cpu` measures the wall")
    jax.config.update("jax_compilation_cache_dir", None)  # the first round compiles
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    sections: dict[str, Callable[[Path], dict[str, Any]]] = {}
    if given.transformers:
        sections["loading"] = lambda path: loading(given.transformers, given.rounds, path)
        sections["running"] = lambda path: running(given.transformers, given.rounds, path)
    if given.jax_llm_examples:
        sections["r1"] = lambda path: r1(given.jax_llm_examples, given.clone, given.rounds, path)
    if given.trl:
        sections["grpo"] = lambda path: grpo(given.trl, STUDENT, 8, given.rounds, path)
        sections["grpo_larger"] = lambda path: grpo(given.trl, LARGER, 4, given.rounds, path)
    found = json.loads(table.RESULTS.read_text()) if table.RESULTS.exists() else {}
    facts = cpu.facts()
    for name, measure in sections.items():
        if given.only and name not in given.only:
            continue
        with tempfile.TemporaryDirectory(prefix="deepzoo-peers-") as scratch:
            before = os.getloadavg()[0]
            try:
                section = measure(Path(scratch))
            except RequestError as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return 2
        versions = facts["versions"] | section["versions"]
        load = [round(before, 1), round(os.getloadavg()[0], 1)]
        clock = "seconds of the processor" if given.cpu_time else "seconds of the wall"
        found[name] = facts | section | {"clock": clock}
        found[name] |= {"versions": versions, "rounds": given.rounds, "load": load}
        if not given.dry:
            table.write(found)
        print(table.section(found[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
