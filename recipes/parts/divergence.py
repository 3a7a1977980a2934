"""Divergence of a student's distributions from a teacher's, whole logits never held.

M positions  D, E widths of student and teacher  V vocabulary
"""

from typing import Literal

import jax
import jax.numpy as jnp

from deepzoo import zoo
from deepzoo.recipes.parts.flops import counted
from deepzoo.recipes.parts.losses import shifted
from deepzoo.recipes.parts.step import Loss, Output
from deepzoo.zoo.config import Config
from deepzoo.zoo.model import Params

type Direction = Literal["forward", "reverse"]

TEACHER = "teacher"  # where the loss finds the frozen model among its parameters


def with_teacher(params: Params, frozen: Params) -> Params:
    """What `train_step(combine=...)` hands to the loss of `divergence`."""
    return params | {TEACHER: frozen}


def divergence(
    student: Config, teacher: Config, direction: Direction, *, temperature: float = 1.0,
    remat: bool | str = False,
) -> Loss:  # fmt: skip
    """KL divergence at every target of a batch of packed rows (see `rows.Rows`).

    With p the teacher's and q the student's distribution of the next token at the temperature T:
    "forward" is T^2 KL(p || q) (arXiv 1503.02531, 2: the factor keeps the gradient's size as T
    changes), "reverse" T^2 KL(q || p). No gradient reaches the teacher, or the choice of tokens.

    Args:
        student: the model whose parameters are trained.
        teacher: the frozen one, with the same token ids.
        direction: which of the two.
        temperature: of both distributions.
        remat: what to recompute of the student in the backward pass, see `zoo.apply`.

    Returns:
        A loss of `with_teacher`'s parameters; metrics kl and nll, the student's on the targets at
        temperature 1, and those of `flops.counted` for the student.
    """

    def loss(params, batch, key) -> Output:
        del key
        seen, inside = batch["tokens"][:, :-1], batch["segments"][:, :-1]
        target, weight = shifted(batch, 1)
        own = {name: value for name, value in params.items() if name != TEACHER}

        def hidden_and_head(config: Config, params: Params, remat: bool | str):
            out = zoo.apply(config, params, seen, segment_ids=inside, logits=False, remat=remat)
            head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]
            return out.hidden.reshape(-1, out.hidden.shape[-1]), head

        frozen = jax.lax.stop_gradient(hidden_and_head(teacher, params[TEACHER], False))
        apart, logprobs = head_divergence(
            *hidden_and_head(student, own, remat), *frozen, target.reshape(-1), direction,
            temperature,
        )  # fmt: skip
        count = weight.reshape(-1)
        total = (apart * count).sum()
        metrics = {"kl": total, "nll": -(logprobs * count).sum(), **counted(student, inside)}
        return Output(total * temperature**2, count.sum(), metrics)

    return loss


def head_divergence(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    direction: Direction,
    temperature: float,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Divergence at each position, and log q of its target at temperature 1; both float32 [M].

    Args:
        hidden: [M, D] of the student, after its final norm.
        head: [V, D].
        teacher_hidden: [M, E].
        teacher_head: [V, E].
        targets: int32 [M].
        direction: see `divergence`; without its factor T^2.
        temperature: above 0.
        chunk: positions whose logits are held at a time; they are made again in the backward pass.
    """
    count = hidden.shape[0]
    size = min(chunk, count)
    spare = -count % size

    def logits(x: jax.Array, head: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x, head.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    @jax.checkpoint
    def part(rows):
        x, y, target = rows
        own = logits(x, head)
        q = jax.nn.log_softmax(own / temperature, axis=-1)
        p = jax.nn.log_softmax(logits(y, teacher_head) / temperature, axis=-1)
        one, other = (p, q) if direction == "forward" else (q, p)
        apart = (jnp.exp(one) * (one - other)).sum(axis=-1)
        plain = jax.nn.log_softmax(own, axis=-1)
        return apart, jnp.take_along_axis(plain, target[:, None], axis=-1)[:, 0]

    def cut(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, spare), *((0, 0),) * (a.ndim - 1)))
        return padded.reshape(-1, size, *a.shape[1:])

    apart, logprobs = jax.lax.map(part, (cut(hidden), cut(teacher_hidden), cut(targets)))
    return apart.reshape(-1)[:count], logprobs.reshape(-1)[:count]
