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


def test_each_kind_of_prompt_is_demonstrated_rightly_as_often_as_it_should_be():
    task = digits.Digits(count=2, choices=4, demonstrated=(1.0, 0.5, 0.0))
    rollout = digits._demonstrations(task, jax.random.key(0), 6000)
    _, right = task.grade(rollout.tokens)
    prompts = rollout.tokens[:, : task.prompt_length]
    which = np.argmax(np.all(prompts[:, None] == task.every_prompt()[None], axis=-1), axis=1)
    for kind, share in enumerate(task.demonstrated):
        of_kind = np.asarray(right == 1)[task.kinds()[which] == kind]
        expected = share + (1 - share) / task.choices**2
        assert abs(of_kind.mean() - expected) <= 4 * (0.25 / len(of_kind)) ** 0.5


def test_answers_by_heart_are_a_permutation_of_the_prompts():
    task = digits.Digits(count=2, choices=4, by_heart=True)
    prompts = task.every_prompt()
    answers = np.asarray(task.answers(jnp.asarray(prompts)))
    assert {tuple(x) for x in answers} == {tuple(x) for x in prompts[:, :2]}
    assert (answers != prompts[:, :2]).any(axis=1).mean() > 0.5
    rows = np.insert(answers, [0, 2], [digits.OPEN, digits.CLOSE], axis=1)
    formed, right = task.grade(jnp.asarray(np.concatenate([prompts, rows, prompts[:, :1]], 1)))
    assert bool(jnp.all(formed)) and bool(jnp.all(right == 1))


def test_accuracy_is_the_probability_of_the_one_right_answer():
    task = digits.Digits(count=2, choices=3)
    decoder = digits.make_decoder(task, width=16)
    params = {"decoder": pg.models.init(decoder.config, jax.random.key(1))[1]}
    prompts = task.every_prompt()
    answers = [[digits.OPEN, *row[:2], digits.CLOSE] for row in prompts]
    rows = jnp.asarray(np.concatenate([prompts, answers], axis=1))
    hidden = decoder.apply(params["decoder"], rows)
    probabilities = np.asarray(jax.nn.softmax(decoder.logits(params["decoder"], hidden)))
    expected = [
        np.prod([probabilities[i, 2 + t, token] for t, token in enumerate(answer)])
        for i, answer in enumerate(answers)
    ]
    np.testing.assert_allclose(digits.accuracy(task, decoder, params), expected, rtol=1e-5)


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
