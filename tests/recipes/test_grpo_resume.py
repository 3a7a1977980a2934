"""GRPO can be ended at any instant, reference policy, several updates and resampling included."""

import pytest
from resumable import Resumable, check

CASE = Resumable(
    source="""
    grpo = copied("grpo")
    from deepzoo.recipes.parts.policy import Objective
    recipe = dataclasses.replace(
        grpo.PRESETS["nano"], task="arithmetic", steps=6, prompts=2, answers=4, minibatches=2,
        max_tokens=24, prompt_tokens=16, held_out=4, evaluate_every=2, slots=8, temperature=1.3,
        objective=Objective(beta=0.05), reference_every=2, dynamic_sampling=1, least=0.0,
    )
    train = grpo.train
    """
)


@pytest.mark.slow
def test_it_can_be_ended_and_gone_on_with(tmp_path):
    check(CASE, tmp_path)
