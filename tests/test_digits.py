"""The task that the tiny transformers of the reproductions learn, and the engine of one of them."""

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from experiments import engine_mismatch
from experiments.shared import digits

TASK = digits.Digits(count=2, choices=6)


def test_an_answer_is_graded_by_its_form_and_its_digits():
    prompt = [5, 7, digits.ASK]
    completions = {
        (digits.OPEN, 5, 7, digits.CLOSE, 0): (True, 1.0),
        (digits.OPEN, 5, 8, digits.CLOSE, 0): (True, 0.5),
        (digits.OPEN, 7, 5, digits.CLOSE, 0): (True, 0.0),
        (5, 5, 7, digits.CLOSE, 0): (False, 1.0),
        (digits.OPEN, 5, digits.CLOSE, 0, 0): (False, 0.5),
        (digits.OPEN, 5, 7, 7, digits.CLOSE): (False, 1.0),
        (digits.OPEN, 5, digits.ASK, digits.CLOSE, 0): (False, 0.5),
    }
    formed, right = TASK.grade(jnp.array([[*prompt, *row] for row in completions]))
    assert list(zip(formed.tolist(), right.tolist(), strict=True)) == list(completions.values())


def test_demonstrations_are_well_formed_and_right_as_often_as_they_should_be():
    rollout = digits._demonstrations(TASK, jax.random.key(0), 4000)
    formed, right = TASK.grade(rollout.tokens)
    assert bool(jnp.all(formed))
    expected = TASK.demonstrated + (1 - TASK.demonstrated) / TASK.choices**2
    assert abs(float(jnp.mean(right == 1)) - expected) < 4 * (0.25 / 4000) ** 0.5
    np.testing.assert_array_equal(rollout.mask.sum(1), TASK.count + 2)


def test_the_engine_has_the_learners_weights_with_few_bits_and_other_routers():
    experts = pg.models.MoEConfig(
        num_experts=4, experts_per_token=1, expert_size=16, normalize_weights=False
    )
    decoder = digits.make_decoder(TASK, width=16, moe=experts)
    params = {"decoder": pg.models.init(decoder.config, jax.random.key(0))[1]}
    config = engine_mismatch.Config(bits=2, router_noise=0.0)
    exact, coarse = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (params, engine_mismatch.engine(config, params))
    )
    significant = np.abs(np.frexp(coarse)[0]) * 2 ** (config.bits + 1)
    np.testing.assert_array_equal(significant, np.round(significant))
    # Half a unit in the last place, which is at most 2^-bits of the leading one.
    assert np.all(np.abs(coarse - exact) <= np.abs(exact) * 2.0 ** -(config.bits + 1))
    noisy = engine_mismatch.engine(engine_mismatch.Config(router_noise=0.5), params)
    router = noisy["decoder"]["layers"]["moe"]["router"]
    assert not np.allclose(router, params["decoder"]["layers"]["moe"]["router"], atol=0.01)
