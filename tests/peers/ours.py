"""deepzoo's side, where a process of its own is measured: memory, and steps that take turns.

`python ours.py load MODEL DTYPE` and `python ours.py grpo MODEL SETTINGS`; the answers are those of
`transformers_load.py` and `trl_grpo.py`.
"""

import itertools
import json
import sys

import wire


def load(channel: wire.Channel, directory: str, dtype: str) -> None:
    """One load for each request; `dtype` "stored" leaves FP8 as it is."""
    import jax
    import numpy as np

    from deepzoo import zoo

    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is there before the clock starts
    channel.say()
    for _ in channel.requests():
        before = wire.forget()
        start = wire.clock()
        model = zoo.load(directory, quantized=dtype == "stored")
        jax.block_until_ready(model.params)
        seconds = wire.clock() - start
        found = wire.memory()
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]
        total = sum(float(np.square(leaf.astype(np.float64)).sum()) for leaf in leaves)
        channel.say(
            seconds=seconds, before=before, squares=total, count=sum(a.size for a in leaves),
            dtypes=sorted({str(a.dtype) for a in leaves}), **found,
        )  # fmt: skip


def grpo(channel: wire.Channel, directory: str, settings: dict) -> None:
    """The recipe's own step, one for each request."""
    import jax

    from deepzoo import zoo
    from deepzoo.recipes import grpo
    from deepzoo.recipes.parts.optim import adamw
    from deepzoo.recipes.parts.problems import Problem, Task
    from deepzoo.recipes.parts.step import start

    jax.block_until_ready(jax.numpy.zeros(1))
    imported = wire.memory()["resident"]
    model = zoo.load(directory, dtype="float32", stacked=True)
    b1, b2 = settings["betas"]
    recipe = grpo.Recipe(
        model=directory, prompts=settings["prompts"], answers=settings["answers"],
        max_tokens=settings["max_tokens"], prompt_tokens=len(settings["ids"]),
        slots=settings["prompts"] * settings["answers"], rate=settings["rate"], beta1=b1, beta2=b2,
    )  # fmt: skip
    problems = [Problem(text, "", raw=True) for text in settings["texts"]]
    task = Task(
        lambda *seed, held=False: itertools.cycle(problems),
        lambda problem, text, finished: {"accuracy": float(len(text) % 2)},
    )
    optimiser = adamw(model.params, settings["rate"], decay=0.0, b1=b1, b2=b2)
    state = start(model.params, optimiser, 0)
    learn = grpo.learner(recipe, model, task, optimiser, state, lambda batch: batch)
    spent, rollout = [], grpo.rollout

    def timed(*args, **named):
        begin = wire.clock()
        made = rollout(*args, **named)
        spent.append(wire.clock() - begin)
        return made

    grpo.rollout = timed
    ids = jax.numpy.asarray([settings["ids"]])
    logits = zoo.apply(model.config, model.params, ids).logits[0, -1].tolist()
    channel.say(imported=imported, logits=logits)
    batches = itertools.cycle(itertools.batched(problems, recipe.prompts))
    for _, batch in zip(channel.requests(), batches, strict=False):
        spent.clear()
        before = wire.forget()
        begin = wire.clock()
        state, metrics = learn(state, list(batch))
        jax.block_until_ready(state.params)
        seconds = wire.clock() - begin
        length, reward = (metrics["sums"][name] for name in ("length", "reward"))
        channel.say(
            seconds=seconds, generation=sum(spent), before=before, **wire.memory(),
            length=float(length.total / length.weight), reward=float(reward.total / reward.weight),
        )  # fmt: skip


if __name__ == "__main__":
    work, *rest = sys.argv[1:]
    if work == "load":
        load(wire.Channel(), *rest)
    else:
        grpo(wire.Channel(), rest[0], json.loads(rest[1]))
