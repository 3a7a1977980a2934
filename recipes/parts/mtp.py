"""Multi-token prediction layers of a model: trained with it, or set aside and put back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepzoo import zoo
from deepzoo.recipes.parts import processes
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.model import Params
from deepzoo.zoo.types import Model


def loaded(name: str, weight: float = 0.0, **how: Any) -> tuple[Model, Params]:
    """A model to train, and its MTP layers, in host memory, where they are not trained.

    They still draft when `with_mtp` has put them back, if less often right.

    Args:
        name: a shipped model or a directory.
        weight: of the loss of multi-token prediction.
        how: further arguments of `zoo.load`.

    Raises:
        RequestError: `weight` for a model without such layers.
    """
    model = zoo.load(name, stacked=True, **how)
    config, params = model.config, model.params
    if weight and not config.num_nextn_predict_layers:
        raise RequestError(f"--mtp {weight}: {name} has no MTP layer to train; use --mtp 0")
    if weight or not config.num_nextn_predict_layers:
        return model, {}
    layers = {k: v for k, v in params.items() if k == "mtp"}
    aside = jax.tree.map(processes.on_host, layers)
    rest = {k: v for k, v in params.items() if k != "mtp"}
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    return model._replace(config=config, params=rest), aside


def with_mtp(model: Model, aside: Params) -> Model:
    """The model with the layers that `loaded` set aside; without any, as it is."""
    if not aside:
        return model
    layers = len(jax.tree.leaves(aside)[0])
    config = dataclasses.replace(model.config, num_nextn_predict_layers=layers)
    return model._replace(config=config, params=model.params | jax.tree.map(jnp.asarray, aside))
