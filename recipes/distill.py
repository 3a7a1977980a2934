"""Distillation of a V2 or R1 model into a small dense student.

    deepzoo train distill --preset nano --out DIR

Papers: R1's students (arXiv 2501.12948, 2.4; supplement B.4.3 and table 6 of the article in Nature
645, 2025): supervised fine-tuning on 800K samples, no reinforcement learning; two to three epochs,
cosine to a tenth of the peak, 32,768 tokens, batches of 64. Logits: arXiv 1503.02531, 2. On-policy:
generalised knowledge distillation (arXiv 2306.13649, 3), which Qwen3 takes for its small models
(arXiv 2505.09388, 4.5).

Three ways, `mode`:
* "hard": the teacher answers the problems of a task, right answers are kept (or `data` holds them),
  and the student learns them as text: the tokenizers may differ;
* "logits": the same texts, but the student learns the teacher's distribution of every token: the
  forward KL divergence; the token ids must be the same;
* "on_policy": the student answers, and learns the teacher's distribution of every token it wrote:
  the reverse KL divergence. It has to start from a student that writes sense.

Deviations:
* the paper does not name the optimiser: AdamW as in pretraining, without weight decay;
* its epochs are "2 to 3": 2 here.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from deepzoo import zoo
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.accuracy import measure
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.divergence import divergence, with_teacher
from deepzoo.recipes.parts.documents import Documents, documents, encoded, pair
from deepzoo.recipes.parts.flops import flops_of_rows
from deepzoo.recipes.parts.losses import next_token
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.memory import Remat
from deepzoo.recipes.parts.optim import Bytes, adamw
from deepzoo.recipes.parts.records import DataError, read
from deepzoo.recipes.parts.rollout import rollout, step_seed
from deepzoo.recipes.parts.rows import Overlong, Rows
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.recipes.parts.sample import sample
from deepzoo.recipes.parts.schedules import Schedule, scaled, warmup_cosine
from deepzoo.recipes.parts.step import Mean, Metrics, State, Step, jitted, start, train_step
from deepzoo.zoo.chat_formats import THINK
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.model import Params
from deepzoo.zoo.prompt import encode, tokenizer_of
from deepzoo.zoo.types import Model

type Mode = Literal["hard", "logits", "on_policy"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One distillation."""

    teacher: str = "v2-nano"
    """A shipped model or a directory; not read where `data` is learned as text."""
    student: str = ""
    """Where the student starts, a directory; without one it is a fresh dense model."""
    hidden: int = 128
    """Width of a fresh student."""
    layers: int = 4
    """Of a fresh student."""
    heads: int = 4
    """Query heads of a fresh student; half as many for keys and values."""
    mode: Mode = "hard"
    """What is learned from the teacher; see the head of the file."""
    data: str = ""
    """File or folder of records with the teacher's answers; instead of `task`."""
    task: str = "arithmetic"
    """Problems that the teacher, or on-policy the student, answers."""
    problems: int = 2048
    """Training problems of `task` that the teacher answers."""
    answers: int = 1
    """Answers of each problem; on-policy, too."""
    max_tokens: int = 128
    """Longest answer."""
    sampling: float = 1.0
    """Temperature of the answers."""
    format: str | None = None
    """Chat format, instead of each model's own."""
    temperature: float = 1.0
    """Of both distributions, where logits are learned."""
    epochs: int = 2
    """Times that each answer is seen."""
    steps: int = 0
    """Batches, instead of `epochs`; on-policy there are no epochs."""
    prompts: int = 8
    """Problems of an on-policy batch."""
    rows: int = 8
    """Rows of a batch of packed answers."""
    length: int = 256
    """Tokens of a row."""
    overlong: Overlong = "error"
    """What to do with an answer that is longer than a row."""
    rate: float = 3e-3
    """Peak learning rate of AdamW."""
    last: float = 0.1
    """Share of the peak that is left at the end of the cosine."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Micro-batches of a batch."""
    remat: Remat = "none"
    """Layers, or all but their dense products, are computed again going back, to save memory."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the arithmetic; the student's parameters are kept in float32."""
    moments: Bytes = "float32"
    """Dtype of the optimiser's state."""
    slots: int = 64
    """Answers that are written together."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out problems of `task`; 0 for one at the end."""
    held_out: int = 200
    """Problems of an evaluation; 0 for none."""
    sample_every: int = 25
    """Steps between samples of text, behind held-out problems or prompts of `data`; 0 for none."""
    seed: int = 0
    """Of a fresh student, of the answers, of their order."""


_R1 = Recipe(
    teacher="deepseek-r1", student="Qwen2.5-Math-1.5B", data="data", task="", epochs=2, rows=64,
    length=32768, rate=1e-4, warmup=0.0, accumulate=64, remat="full", compute="bfloat16",
    held_out=0, sample_every=0,
)  # fmt: skip
PRESETS = {
    "nano": Recipe(),
    "r1_qwen_1_5b": _R1,
    "r1_qwen_7b": dataclasses.replace(_R1, student="Qwen2.5-Math-7B", rate=8e-5),
    "r1_qwen_14b": dataclasses.replace(_R1, student="Qwen2.5-14B", rate=7e-5),
    "r1_qwen_32b": dataclasses.replace(_R1, student="Qwen2.5-32B", rate=6e-5),
    "r1_llama_8b": dataclasses.replace(_R1, student="Llama-3.1-8B", rate=5e-5),
    "r1_llama_70b": dataclasses.replace(_R1, student="Llama-3.3-70B-Instruct", rate=2e-5),
}


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Distils; writes `out`/model in the published layout and returns it.

    The teacher's right answers are kept in `out`/traces, as records that `sft` reads, too. Called
    again for the same directory, it goes on from the newest checkpoint; while the answers are
    written there is none, and it begins again.

    Raises:
        DataError: the data cannot be used, or the teacher has no right answer.
        RequestError: the settings contradict each other, or teacher and student do not have the
            same token ids and `mode` needs them.
    """
    if recipe.mode == "on_policy":
        processes.only_one("distill --mode on_policy")
    mesh = mesh_of(options)
    teacher = load_teacher(recipe, mesh)
    student = load_student(recipe, teacher, mesh)
    config = student.config
    if teacher is not None and recipe.mode != "hard":
        check_vocabularies(teacher, student)
    given = encoded(student, read(recipe.data), format=recipe.format) if recipe.data else None
    models = {} if teacher is None else {"teacher": teacher.params}
    if recipe.student:
        models["student"] = student.params
    told: dict[str, Any] = {"models": models, "model": config, "tokenizer": student.tokenizer}
    told["frozen"] = None if teacher is None else teacher.config
    if given is not None:
        told["facts"] = {"data": given.fingerprint}
    with Run(out, recipe, options, **told) as run:
        batch, steps = batches(recipe, run, teacher, student, given)
        tx = optimiser(recipe, student.params, steps)
        state = run.state(lambda params: start(params, tx, recipe.seed), student.params)
        step = learner(recipe, tx, teacher, student, state, run.ready)

        def whole(state: State) -> Model:
            return student._replace(params=with_bias(state.params, state.bias), source=None)

        def held_out(state: State) -> dict[str, Any]:
            found = measure(
                processes.local(whole(state)), tasks.task(recipe.task), recipe.held_out,
                max_tokens=recipe.max_tokens, temperature=0.0, slots=recipe.slots,
            )  # fmt: skip
            return {"held_out": found.accuracy, "held_out_truncated": float(found.truncated.mean())}

        def look(state: State) -> dict[str, str]:
            at = int(state.step)
            source = tasks.task(recipe.task) if given is None else given.prompt(at)
            return sample(whole(state), source, recipe.seed, at, format=recipe.format)

        hooks = [run.every(recipe.sample_every, look)]
        if recipe.held_out and recipe.task:
            hooks.append(run.every(recipe.evaluate_every, held_out, last=True))
        state = run.fit(step, state, batch, steps, on=hooks)
        final = processes.for_first(whole(state))
        path = run.product("model", lambda path: zoo.save_hf(final, path))
    return zoo.load(path, dtype="float32", mesh=mesh)


def load_teacher(recipe: Recipe, mesh: Mesh | None = None) -> Model | None:
    """The teacher, its layers as sampling or training wants them; None where it is not needed.

    Raises:
        RequestError: the settings contradict each other.
    """
    if recipe.mode == "on_policy" and not recipe.steps:
        raise RequestError("mode on_policy has no epochs; say how many --steps")
    if bool(recipe.data) == bool(recipe.task):
        raise RequestError("give either --data or --task, and leave the other empty")
    if recipe.mode == "hard" and recipe.data and recipe.student:
        return None
    how: dict[str, Any] = {"dtype": recipe.compute, "mtp": False, "mesh": mesh}
    return zoo.load(recipe.teacher, stacked=recipe.mode != "hard", **how)


def load_student(recipe: Recipe, teacher: Model | None, mesh: Mesh | None = None) -> Model:
    """The student of `student`, or a fresh dense one with the teacher's token ids."""
    if recipe.student:
        how: dict[str, Any] = {"dtype": "float32", "quantized": False, "mtp": False}
        return zoo.load(recipe.student, stacked=True, mesh=mesh, **how)
    assert teacher is not None
    of = teacher.config
    config = Config(
        model_type="qwen2", vocab_size=of.vocab_size, hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=max(recipe.heads // 2, 1),
        max_position_embeddings=of.max_position_embeddings, initializer_range=0.05,
        bos_token_id=of.bos_token_id, eos_token_id=of.eos_token_id, dtype="float32",
    )  # fmt: skip
    init = functools.partial(zoo.init, config)
    if mesh is not None:
        init = jax.jit(init, out_shardings=zoo.shardings(config, mesh))
    params = init(jax.random.key(recipe.seed))
    return Model(config, params, tokenizer_of(teacher), "student")


def check_vocabularies(teacher: Model, student: Model) -> None:
    """Every token id must mean the same to both.

    Raises:
        RequestError: it does not; with an example.
    """
    one, other = tokenizer_of(teacher), tokenizer_of(student)
    sizes = teacher.config.vocab_size, student.config.vocab_size
    advice = "take mode hard, which learns texts"
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"teacher and student have vocabularies of {sizes[0]} and {sizes[1]} tokens; {advice}"
        )
    for i in range(sizes[0]) if one is not other else ():
        if one.decode([i]) != other.decode([i]):
            raise RequestError(
                f"token {i} is {one.decode([i])!r} to the teacher and {other.decode([i])!r} to the"
                f" student; {advice}"
            )


def batches(
    recipe: Recipe, run: Run, teacher: Model | None, student: Model, given: Documents | None
) -> tuple[Callable[[int], Any], int]:
    """(step -> batch, steps): packed rows; or, on-policy, prompts."""
    if recipe.mode == "on_policy":
        return functools.partial(prompts, recipe, student, given), recipe.steps
    if given is None:
        assert teacher is not None
        path = run.out / "traces"
        if not processes.decided(path.exists()):
            run.say(f"{recipe.teacher} answers {recipe.problems} problems")
            kept = traces(recipe, teacher)
            run.say(f"{len(kept)} of {recipe.problems * recipe.answers} answers are right")
            run.product("traces", lambda path: write(kept, path))
        given = learned(recipe, student, path)
    rows = Rows(
        given, rows=recipe.rows, length=recipe.length, overlong=recipe.overlong, seed=recipe.seed
    )
    return rows, recipe.steps or rows.steps(recipe.epochs)


def traces(recipe: Recipe, teacher: Model) -> list[dict[str, Any]]:
    """The teacher's right answers, as records; no answer of a problem twice.

    Raises:
        DataError: there is none.
    """
    task, tokenizer = tasks.task(recipe.task), tokenizer_of(teacher)
    asked = tasks.batch(task.problems, recipe.problems, recipe.seed)
    prompts = [encode(teacher, p.prompt, raw=p.raw, format=recipe.format) for p in asked]
    width = max(len(p.tokens) for p in prompts) + recipe.max_tokens
    params = processes.local(teacher.params)  # each process writes all answers, the same ones
    kept = []
    for number, first in enumerate(range(0, len(asked), recipe.slots)):
        some = slice(first, first + recipe.slots)
        made = rollout(
            teacher.config, params, [p.tokens for p in prompts[some]],
            answers=recipe.answers, max_tokens=recipe.max_tokens, width=width,
            eos_ids=tokenizer.eos_ids, seed=step_seed(recipe.seed, number),
            temperature=recipe.sampling, slots=recipe.slots,
        )  # fmt: skip
        seen = set()
        for row in np.flatnonzero(~made.truncated).tolist():
            which = first + int(made.group[row])
            problem, text = asked[which], tokenizer.decode(made.answer(row)[:-1])
            if prompts[which].thought:
                text = THINK.text + text
            right = task.judge(problem, text, True).get("accuracy") == 1.0
            if not right or (which, text) in seen:
                continue
            seen.add((which, text))
            kept.append({"prompt": problem.prompt, "completion": text, "raw": problem.raw})
    if not kept:
        raise DataError(
            f"{recipe.teacher} has no right answer to {len(asked)} problems of {recipe.task}; take"
            " another task, or raise --max-tokens"
        )
    return kept


def write(records: list[dict[str, Any]], path: Path) -> None:
    """A folder that `records.read` reads."""
    path.mkdir(parents=True)
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    (path / "traces.jsonl").write_text("".join(lines), encoding="utf-8")


def learned(recipe: Recipe, student: Model, path: Path) -> Documents:
    """What the student reads and learns of the traces, in its own tokens and chat format."""
    records = read(path)
    pairs = [
        pair(
            student, records.field(i, "prompt"), records.field(i, "completion"),
            raw=records[i]["raw"], format=recipe.format,
        )
        for i in range(len(records))
    ]  # fmt: skip
    return documents(pairs, records.places, student.config.vocab_size)


def prompts(recipe: Recipe, student: Model, given: Documents | None, step: int) -> list[list[int]]:
    """What the student is asked in a step: problems of the task, or prompts of the data."""
    if given is None:
        asked = tasks.batch(tasks.task(recipe.task).problems, recipe.prompts, recipe.seed, step)
        return [encode(student, p.prompt, raw=p.raw, format=recipe.format).tokens for p in asked]
    import grain

    order = grain.MapDataset.source(range(len(given.given))).seed(recipe.seed).shuffle().repeat()
    chosen: Any = (order[step * recipe.prompts + i] for i in range(recipe.prompts))
    return [
        given.tokens[given.starts[d] : given.starts[d] + given.given[d]].tolist() for d in chosen
    ]


def rate(recipe: Recipe, steps: int) -> Schedule:
    """Step -> learning rate."""
    return scaled(recipe.rate, warmup_cosine(steps, round(recipe.warmup * steps), recipe.last))


def optimiser(recipe: Recipe, params: Params, steps: int) -> optax.GradientTransformation:
    """Of a run of `steps`; `params` are the student's, or shapes."""
    return adamw(split_bias(params)[0], rate(recipe, steps), decay=0.0, state=recipe.moments)


def learner(
    recipe: Recipe,
    tx,
    teacher: Model | None,
    student: Model,
    state: State,
    ready: Callable[[Any], Step] = lambda update: update,
) -> Callable[..., tuple[State, Metrics]]:
    """(state, batch) -> (state, metrics) of the mode; `ready` is a run's, for on-policy updates."""
    config = student.config
    if recipe.mode == "hard":
        loss = next_token(config, remat=recipe.remat)
        step = train_step(loss, tx, recipe.accumulate, clip=recipe.clip, compute=recipe.compute)
        return jitted(step, state)
    assert teacher is not None
    loss = divergence(
        config, teacher.config, "forward" if recipe.mode == "logits" else "reverse",
        temperature=recipe.temperature, remat=recipe.remat,
    )  # fmt: skip
    step = train_step(
        loss, tx, recipe.accumulate, clip=recipe.clip, compute=recipe.compute, combine=with_teacher
    )
    jointly = jitted(step, state, teacher.params)
    if recipe.mode == "logits":
        return jointly
    update = ready(jointly)

    def on_policy(state: State, prompts: list[list[int]]) -> tuple[State, Metrics]:
        made = rollout(
            config, with_bias(state.params, state.bias), prompts, answers=recipe.answers,
            max_tokens=recipe.max_tokens, width=recipe.length + 1,
            eos_ids=tokenizer_of(student).eos_ids, temperature=recipe.sampling,
            seed=step_seed(recipe.seed, int(state.step)), slots=recipe.slots,
        )  # fmt: skip
        batch = {
            "tokens": made.tokens, "segments": np.zeros_like(made.tokens), "weights": made.mask
        }  # fmt: skip
        state, metrics = update(state, batch)
        count: Any = len(made.lengths)
        metrics["sums"] |= {  # the loss has counted padding, too
            "tokens": made.lengths.sum(),
            "flops": flops_of_rows(config, made.ends),
            "length": Mean(made.lengths.sum(), count),
            "truncated": Mean(made.truncated.sum(), count),
        }
        return state, metrics

    return on_policy


if __name__ == "__main__":
    main(train, PRESETS, __doc__)
