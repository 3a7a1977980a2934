"""The loop of every recipe."""

from collections.abc import Callable, Iterable
from typing import Any

from deepzoo.recipes.parts.step import Batch, Metrics, State, Step, culprits
from deepzoo.zoo.errors import DeepzooError

type Hook = Callable[[State, Metrics], Any]
"""Called after every step; a result of True ends the loop once the other hooks were called."""


class NonFiniteError(DeepzooError):
    """Several batches in a row gave no finite gradient."""


def fit(
    step: Step,
    state: State,
    batch: Callable[[int], Batch],
    steps: int,
    on: Iterable[Hook] = (),
    *,
    patience: int = 3,
) -> State:
    """One step a batch until `state.step` is `steps`; every hook sees the new state and metrics.

    The next batch is made while the device works on this one.

    Args:
        step: from `train_step`, jitted or not, or any function of that form.
        state: to go on from; not to be used afterwards where the step donates it.
        batch: step -> batch, a pure function.
        steps: in all, those that were done before included.
        on: hooks, called in this order.
        patience: batches without a finite gradient in a row that end the run.

    Raises:
        NonFiniteError: `patience` batches in a row; the parameters are those from before them.
    """
    hooks, at = tuple(on), int(state.step)
    made = batch(at) if at < steps else None
    while at < steps:
        state, metrics = step(state, made)
        at += 1
        made = batch(at) if at < steps else None
        if (streak := int(state.streak)) >= patience:
            names = culprits(state, metrics)
            where = f"the gradient of {', '.join(names[:3])}" if names else "the loss"
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NonFiniteError(
                f"{where}{more} was not finite; {streak} batches in a row had no finite gradient."
                f" The parameters are those after step {at - streak}, batch {at - streak} was the"
                " first bad one (they count from 0): look at it, or lower the learning rate"
            )
        if any([hook(state, metrics) is True for hook in hooks]):
            break
    return state
