"""Decode, prefill and training on the CPU, alone or against a peer in an environment of its own.

Both sides read the same weights from the same directory and use the same number of threads. They
are measured in turn, round by round, so that a change in the machine's speed hits both; medians are
compared. Every round also checks that both computed the same thing: the same tokens; in training,
where both go on from round to round, the same loss.
"""

import importlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepzoo.zoo.config import Config
from deepzoo.zoo.engine import Engine, Request
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.functional import init, stack
from deepzoo.zoo.load import load
from deepzoo.zoo.save import save_hf
from deepzoo.zoo.types import Model

# About 135M parameters of the V2 architecture: large enough that weights, not calls, are the cost.
CONFIG = Config(
    model_type="deepseek_v2", vocab_size=32000, hidden_size=512, intermediate_size=1536,
    num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096,
    dtype="float32", kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=32, n_shared_experts=2, num_experts_per_tok=4, moe_intermediate_size=256,
    first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax",
)  # fmt: skip

PEERS = {"transformers": Path(__file__).parent / "peers" / "transformers_cpu.py"}
PROMPT, TOKENS = 64, 64
RATE, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.1  # AdamW's, on both sides


class Case(NamedTuple):
    """One measurement. tokens: what a round produces or reads, for the rate."""

    name: str
    operation: str
    batch: int
    length: int
    tokens: int


CASES = (
    Case("decode, batch 1", "decode", 1, PROMPT, TOKENS),
    Case("decode, batch 8", "decode", 8, PROMPT, 8 * TOKENS),
    Case("prefill, 512 tokens", "prefill", 1, 512, 512),
    Case("training step, 4 x 128", "train", 4, 128, 512),
)


class Row(NamedTuple):
    """Medians of a case: seconds of a round, tokens a second, and the peer's over ours."""

    name: str
    seconds: float
    rate: float
    peer_seconds: float | None
    peer_rate: float | None
    ratio: float | None


def prompt_ids(case: Case, vocabulary: int) -> np.ndarray:
    """The same prompt on both sides: int [batch, length], from a fixed seed."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, (case.batch, case.length))


def ours(model: Model, case: Case) -> tuple[float, list[int]]:
    """Seconds of one round here, and the tokens it gave: greedy ones, or the one after a prompt."""
    ids = prompt_ids(case, model.config.vocab_size)
    count = TOKENS + 1 if case.operation == "decode" else 1
    requests = [Request(row.tolist(), count, temperature=0.0) for row in ids]
    engine = Engine(
        model.config, model.params, slots=case.batch, capacity=max(256, 2 * case.length)
    )
    start = time.perf_counter()
    events = engine.run(requests, chunk=TOKENS)
    first = [next(events) for _ in requests]
    if case.operation == "prefill":
        return time.perf_counter() - start, first[0].tokens
    jax.block_until_ready([lane.state.token for lane in engine.lanes])
    start = time.perf_counter()
    rest = list(events)
    seconds = time.perf_counter() - start
    return seconds, next(e.tokens for e in rest if e.request == 0)


class Training:
    """The recipes' own step and next-token loss on one batch, as the peer trains: AdamW with weight
    decay on everything, gradients not clipped."""

    def __init__(self, model: Model, case: Case):
        # The zoo knows no recipes; they are looked for when the command runs.
        parts = importlib.import_module("deepzoo.recipes.parts.step")
        losses = importlib.import_module("deepzoo.recipes.parts.losses")
        ids = prompt_ids(case, model.config.vocab_size).astype(np.int32)
        tx = optax.adamw(RATE, *BETAS, eps=1e-8, weight_decay=DECAY)
        weights = np.ones(ids.shape, np.float32)
        self.batch = {"tokens": ids, "segments": np.zeros_like(ids), "weights": weights}
        params = stack(jax.tree.map(jnp.copy, model.params))
        self.state = parts.start(params, tx, 0)
        step = parts.train_step(losses.next_token(model.config), tx, clip=float("inf"))
        self._step = parts.jitted(step, self.state)

    def measure(self) -> tuple[float, float]:
        """Seconds of one step, and its loss."""
        start = time.perf_counter()
        self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready(self.state.params)
        return time.perf_counter() - start, float(metrics["loss"])


class Peer:
    """A peer's process: one line of JSON in, one line out.

    Raises:
        RequestError: it does not start; the message carries its last line.
    """

    def __init__(self, name: str, python: str, directory: Path, threads: int):
        self.name = name
        command = [python, str(PEERS[name]), str(directory), str(threads)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise RequestError(
                f"{python}: cannot be run as the peer's Python: {error.strerror}"
            ) from None
        self.versions: dict[str, str] = self._read()

    def measure(self, case: Case) -> tuple[float, Any]:
        """Seconds of one round of the peer, and its tokens or its loss."""
        ids = prompt_ids(case, CONFIG.vocab_size).tolist()
        request = {"operation": case.operation, "ids": ids, "tokens": TOKENS}
        request |= {"rate": RATE, "betas": BETAS, "decay": DECAY}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found = self._read()
        return found["seconds"], found["loss" if case.operation == "train" else "tokens"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["nothing"]
            raise RequestError(f"the peer {self.name} ended; the last it said: {said[-1]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def bench(
    against: str | None = None,
    peer_python: str | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], dict[str, Any]]:
    """Measures every case; returns the rows, and what was measured on what.

    Args:
        against: name of a peer, or None.
        peer_python: Python of an environment that has the peer.
        rounds: measured rounds of each case, after one that is not counted.
        progress: told what is being done.

    Raises:
        RequestError: an unknown peer, no Python for it, or one that does not work.
    """
    if against is not None and against not in PEERS:
        raise RequestError(f"unknown peer {against!r}; choose from {', '.join(PEERS)}")
    if against is not None and peer_python is None:
        raise RequestError(
            f"--against {against} needs --peer-python, the Python of an environment with torch and"
            f" {against} (python3.11 -m venv peer; peer/bin/pip install torch transformers)"
        )
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="deepzoo-bench-") as scratch:
        directory = Path(scratch) / "model"
        progress("writing the model")
        save_hf(Model(CONFIG, init(CONFIG, jax.random.key(0))), directory)
        model = load(directory)
        peer = None
        if against is not None and peer_python is not None:
            progress(f"starting {against}")
            peer = Peer(against, peer_python, directory, threads)
        try:
            rows = [_measure(model, peer, case, rounds, progress) for case in CASES]
        finally:
            if peer is not None:
                peer.close()
    known = facts() | {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "dtype": CONFIG.dtype,
        "rounds": rounds,
    }
    known["versions"] |= {} if peer is None else peer.versions
    return rows, known


def facts() -> dict[str, Any]:
    """Processor, threads, versions and date, beside which figures are quoted."""
    return {
        "threads": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {n: metadata.version(n) for n in ("deepzoo", "jax", "jaxlib")},
    }


def _measure(
    model: Model, peer: Peer | None, case: Case, rounds: int, progress: Callable[[str], None]
) -> Row:
    mine, theirs = [], []
    training = Training(model, case) if case.operation == "train" else None
    for n in range(rounds + 1):  # the first compiles and warms up
        progress(f"{case.name}: round {n} of {rounds}")
        seconds, result = ours(model, case) if training is None else training.measure()
        mine.append(seconds)
        if peer is not None:
            seconds, other = peer.measure(case)
            theirs.append(seconds)
            # Losses of the same parameters, and of those that both made of them.
            same = result == other if training is None else abs(result - other) < 1e-3
            if not same:
                raise RequestError(
                    f"{case.name}: the peer {peer.name} computed {other}, not {result}; a time for"
                    " something else is no comparison"
                )
    seconds = statistics.median(mine[1:])
    if peer is None:
        return Row(case.name, seconds, case.tokens / seconds, None, None, None)
    other = statistics.median(theirs[1:])
    ratio = statistics.median(b / a for a, b in zip(mine[1:], theirs[1:], strict=True))
    return Row(case.name, seconds, case.tokens / seconds, other, case.tokens / other, ratio)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
