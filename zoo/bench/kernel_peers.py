"""What the kernels are compared with: cuDNN and plain XLA through jax, PyTorch in its own Python.

A case's shapes say what the problem is (`problem`), so that a peer needs nothing of ours but the
numbers. The peers compute the same sizes in their own layout; where a peer cannot take our shapes
as they are (cuDNN and SDPA want equal widths of keys and values), it gets what a user would give
it, padding included.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.kernels.cases import Case
from deepzoo.zoo.errors import RequestError

PROGRAM = Path(__file__).parent / "peers" / "torch_kernels.py"


class Peer(NamedTuple):
    """function: of the case's own inputs. outputs: as a case's, or None if its numbers are its own
    affair (another scale, another layout)."""

    name: str
    function: Callable[..., Any]
    outputs: Callable[[Any], Any] | None = None


def problem(case: Case) -> dict[str, Any] | None:
    """The sizes of a case as a peer needs them, or None where no peer has this operation."""
    leaves = jax.tree.leaves(case.abstract())
    shapes = [tuple(a.shape) for a in leaves]
    if case.operation == "grouped_matmul" and any(a.dtype == jnp.float8_e4m3fn for a in leaves):
        return None
    read = {
        "mla_prefill": _attention,
        "mla_decode": _decode,
        "gqa_attention": _grouped_query,
        "grouped_matmul": _groups,
        "block_fp8": _fp8,
        "linear_cross_entropy": _cross_entropy,
    }.get(case.operation)
    try:
        found = None if read is None else read(shapes)
    except (ValueError, IndexError):  # arrays of another rank: another entry of the operation
        return None
    if found is None:
        return None
    backward = any(word in case.name for word in ("backward", "gradient"))
    return {"operation": case.operation, "backward": backward, **found}


def _attention(shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """q_nope [B, T, H, N], q_rope [B, T, H, R], k_nope [B, S, H, N], k_rope [B, S, R], v."""
    (batch, queries, heads, nope), (_, _, _, rope), (_, keys, _, _), _, (_, _, _, value) = shapes[
        :5
    ]
    sizes = {"batch": batch, "queries": queries, "keys": keys, "heads": heads, "kv_heads": heads}
    return sizes | {"width": nope + rope, "value": value}


def _decode(shapes: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """q_latent [B, T, H, C], q_rope [B, T, H, R], latent [B, S, C], k_rope [B, S, R]."""
    (batch, queries, heads, latent), (_, _, _, rope), (rows, keys, _) = shapes[:3]
    if rows != batch:  # pages: no peer reads them
        return None
    sizes = {"batch": batch, "queries": queries, "keys": keys, "heads": heads, "kv_heads": 1}
    return sizes | {"width": latent + rope, "value": latent}


def _grouped_query(shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """q [B, T, H, D], k and v [B, S, G, D]."""
    (batch, queries, heads, width), (_, keys, groups, _), _ = shapes[:3]
    sizes = {"batch": batch, "queries": queries, "keys": keys, "heads": heads}
    return sizes | {"kv_heads": groups, "width": width, "value": width}


def _groups(shapes: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """x [M, K], w [E, N, K], group_sizes [E]; with two w, the first half of SwiGLU."""
    (rows, inner), (groups, outer, same), *rest = shapes
    fused = rest[:1] == [(groups, outer, same)]
    if same != inner or rest[fused : fused + 1] != [(groups,)]:
        return None
    sizes = {"rows": rows, "inner": inner, "outer": outer, "groups": groups}
    return sizes | {"fused": fused}


def _fp8(shapes: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """x [M, K], w [N, K], among scales."""
    matrices = [s for s in shapes if len(s) == 2]
    (rows, inner), *rest = matrices
    outer = next((n for n, k in rest if k == inner), None)
    return None if outer is None else {"rows": rows, "inner": inner, "outer": outer}


def _cross_entropy(shapes: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """hidden [M, D], head [V, D]."""
    (rows, inner), (outer, same) = shapes[:2]
    return {"rows": rows, "inner": inner, "outer": outer} if same == inner else None


def of(case: Case) -> list[Peer]:
    """The peers that run in this process, on the case's own inputs."""
    found = problem(case)
    if found is None:
        return []
    if case.operation == "mla_prefill":
        # A peer's backward pass cannot be had without its forward pass; the name says so.
        both = ", both passes" if found["backward"] else ""
        return [Peer(f"cuDNN, padded{both}", _cudnn(found["backward"]))]
    if case.operation == "grouped_matmul" and not found["backward"]:
        return [
            Peer("jax.lax.ragged_dot", _ragged_dot),
            Peer("XLA, equal groups", _equal_groups),
        ]
    if case.operation == "linear_cross_entropy":
        return [Peer("XLA, whole logits", _whole_logits)]
    return []


def _cudnn(backward: bool) -> Callable[..., Any]:
    def run(q_nope, q_rope, k_nope, k_rope, v, *_: Any) -> Any:
        heads = k_nope.shape[2]

        def attend(q_nope, q_rope, k_nope, k_rope, v):
            shared = jnp.broadcast_to(
                k_rope[:, :, None], (*k_rope.shape[:2], heads, k_rope.shape[2])
            )
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            k = jnp.concatenate([k_nope, shared], axis=-1)
            wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1])))
            out = jax.nn.dot_product_attention(q, k, wide, is_causal=True, implementation="cudnn")
            return out[..., : v.shape[-1]]

        if not backward:
            return attend(q_nope, q_rope, k_nope, k_rope, v)
        out, pull = jax.vjp(attend, q_nope, q_rope, k_nope, k_rope, v)
        return pull(out)

    return run


def _ragged_dot(x: jax.Array, *rest: Any) -> jax.Array:
    *matrices, group_sizes = (a for a in rest if a is not None)  # no scales in bfloat16
    return _swiglu([jax.lax.ragged_dot(x, w.swapaxes(1, 2), group_sizes) for w in matrices])


def _equal_groups(x: jax.Array, *rest: Any) -> jax.Array:
    """As if every group had the same number of rows: what padded experts cost at their best."""
    *matrices, group_sizes = (a for a in rest if a is not None)
    rows = x.shape[0] // group_sizes.shape[0] * group_sizes.shape[0]
    parts = x[:rows].reshape(group_sizes.shape[0], -1, x.shape[1])
    return _swiglu([jnp.einsum("emk,enk->emn", parts, w) for w in matrices])


def _swiglu(products: list[jax.Array]) -> jax.Array:
    return products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]


def _whole_logits(hidden: jax.Array, head: jax.Array, targets: jax.Array, *_: Any) -> Any:
    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits = jnp.einsum("md,vd->mv", hidden, head, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)


class Torch:
    """PyTorch's kernels in a process of their own: one line of JSON in, one line out.

    Args:
        python: the Python of an environment with torch.

    Raises:
        RequestError: it does not start; the message carries its last line.
    """

    def __init__(self, python: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            self.process = subprocess.Popen(
                [python, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise RequestError(
                f"{python}: cannot be run as the peer's Python: {error.strerror}"
            ) from None
        self.gone = False
        try:
            self.versions: dict[str, str] = self._read()
        except RequestError:
            self.close()
            raise

    def measure(self, case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, what `Row` calls seconds, low, high, cold, note) of each of its kernels.

        If the process ends, one row says so, and there are none after it.
        """
        found = problem(case)
        if found is None or self.gone:
            return
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(found) + "\n")
            self.process.stdin.flush()
            answers = self._read()["rows"]
        except (RequestError, BrokenPipeError) as error:
            self.gone = True
            yield "torch", {"note": f"no further peers of torch: {error}"}
            return
        for answer in answers:
            yield answer.pop("name"), answer

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["nothing"]
            raise RequestError(f"the peer torch ended; the last it said: {said[-1]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                    stream.close()
