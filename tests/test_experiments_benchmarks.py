"""What benchmarks measure can be measured; how fast it is, is theirs to say."""

import jax
import pytest

from experiments.benchmarks import objectives
from experiments.estimator_atlas import public_recipes


@pytest.fixture(scope="module")
def model():
    return objectives.language_models.decoder_of(objectives.SIZE)


@pytest.mark.parametrize("name", sorted(public_recipes()))
def test_every_recipe_has_a_step(name, model):
    state, update = objectives.begun(*model, objectives.make(name))
    _, metrics = jax.eval_shape(update, state, objectives.batch(objectives.GROUP, 16))
    assert metrics["loss"].shape == ()
