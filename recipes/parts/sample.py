"""One sample of text every so often: what a model under training writes behind a prompt."""

from collections.abc import Sequence

from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.problems import Task
from deepzoo.recipes.parts.rollout import rollout, step_seed
from deepzoo.zoo.prompt import encode, sampling_defaults, tokenizer_of
from deepzoo.zoo.types import Model


def sample(
    model: Model, source: Task | Sequence[int], seed: int, step: int, *, format: str | None = None
) -> dict[str, str]:  # fmt: skip
    """At most 96 tokens, for the log; a pure function of the arguments.

    Args:
        model: with a tokenizer; sampled as it does unless told otherwise.
        source: a task, whose held-out problem is asked; or ids to continue, of which those beyond
            the model's context are left out.
        seed: with `step`, of the problem and of the sampling.
        step: see `seed`.
        format: name of a chat format instead of the model's own.

    Returns:
        {"sample": prompt and continuation}, without special tokens.
    """
    if isinstance(source, Task):
        problem = next(source.problems(seed, step, held=True))
        source = encode(model, problem.prompt, raw=problem.raw, format=format).tokens
    tokenizer, context = tokenizer_of(model), model.config.max_position_embeddings
    prompt = list(source[: context - 1])
    temperature, top_p = sampling_defaults(model)
    room = min(96, context - len(prompt))
    made = rollout(
        model.config, processes.local(model.params), [prompt], answers=1, max_tokens=room,
        # A power of two, so that prompts of similar size share one compiled program.
        width=1 << (len(prompt) + room - 1).bit_length(), eos_ids=tokenizer.eos_ids,
        seed=step_seed(seed, step), temperature=temperature, top_p=top_p,
    )  # fmt: skip
    return {"sample": tokenizer.decode([*prompt, *made.answer(0)], skip_special=True)}
