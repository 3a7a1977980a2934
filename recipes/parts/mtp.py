"""Multi-token prediction layers of a model whose training leaves them out."""

from deepzoo import zoo
from deepzoo.zoo.types import Model


def with_mtp(model: Model, name: str) -> Model:
    """The model with the MTP layers it began with; they still draft, if less often right.

    Args:
        model: trained from `name`, loaded with mtp=False and stacked=True.
        name: a shipped model or a directory; one without MTP layers adds nothing.
    """
    before = zoo.load(name, dtype="float32", stacked=True)
    if not before.config.num_nextn_predict_layers:
        return model
    return model._replace(config=before.config, params=model.params | {"mtp": before.params["mtp"]})
