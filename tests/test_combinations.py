"""Parts of different papers under one objective, and every recipe a command line knows."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from experiments.shared import objectives as shared
from pgjax import objectives, train
from pgjax.diagnostics import problems

LENGTH = 3
KNOWN = {
    "length": LENGTH,
    "max_length": LENGTH,
    "group_size": 6,
    "steps": 10,
    "learning_rate": 0.1,
    "vocab_size": 4,
    "hidden_size": 1,
}


def sums():
    """Up to three digits, ended by digit 3; right where they add up to the prompt's number."""

    def roles(tokens):
        before = jnp.cumsum(tokens == 3, axis=1) - (tokens == 3)
        return jnp.where(before > 0, problems.NOBODY, problems.POLICY)

    def reward(tokens):
        digits = jnp.where(tokens == 3, 0, tokens)[:, 1:].sum(-1)
        return (digits == 1 + tokens[:, 0]).astype(jnp.float32)

    def logits(params, tokens):
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        return params[tokens[:, :1], jnp.arange(tokens.shape[1]), before]

    return problems.TokenProblem(
        num_prompts=2,
        num_actions=4,
        horizon=LENGTH,
        logits=logits,
        reward=reward,
        roles=roles,
        extras=lambda tokens: {"answer_ids": tokens[:, 1:].sum(-1)},
    )


PROBLEM = sums()
OUTPUTS = functools.partial(problems.outputs, PROBLEM)
PARAMS = jax.random.normal(jax.random.key(3), (2, 1 + LENGTH, 4, 4))


def batch(key=0):
    return problems.sample(PROBLEM, PARAMS, jax.random.key(key), group_size=6)


ADVANTAGES = {
    "grpo": objectives.grpo(),
    "rloo": objectives.rloo(),
    "lite_ppo": objectives.lite_ppo(),
    "canon": objectives.canon(length=LENGTH, mix=0.7),
    "stratified": objectives.stratified_grpo(alpha=0.5, bucket_width=1),
    "oblr": objectives.oblr(),
}
SURROGATES = {
    "grpo": objectives.grpo(),
    "gspo": objectives.gspo(),
    "cispo": objectives.cispo(),
    "rloo": objectives.rloo(),
    "gtpo": objectives.gtpo(),
}


def down_sampled(objective):
    return objectives.with_down_sampling(objective, steps=10, rows=(0.5, 1.0), tokens=(0.5, 1.0))


def corrected(objective):
    return objectives.with_mismatch_weights(objective)


CHANGES = {"plain": lambda objective: objective, "d3s": down_sampled, "mismatch": corrected}


@pytest.mark.parametrize("change", CHANGES)
def test_any_advantage_under_any_surrogate(change):
    rollout = batch()
    # Every pair at least once; the changes do not care which advantage it is.
    chosen = ADVANTAGES if change == "plain" else ("canon",)
    for names in ((a, s) for a in chosen for s in SURROGATES):
        advantage, surrogate = ADVANTAGES[names[0]], SURROGATES[names[1]]
        objective = CHANGES[change](
            dataclasses.replace(
                surrogate,
                advantage=advantage.advantage,
                old_needs=surrogate.old_needs | advantage.old_needs,
            )
        )
        filled = rollout.replace(
            old=OUTPUTS(PARAMS, rollout, objective.old_needs),
            proximal_logprobs=rollout.behavior_logprobs,
        )
        prepared = objective.prepare(filled)
        assert prepared.mask.shape == rollout.mask.shape, names
        moved = PARAMS + 0.1 * jax.random.normal(jax.random.key(1), PARAMS.shape)

        def loss(params, objective=objective, prepared=prepared):
            return objective.loss(OUTPUTS(params, prepared, objective.needs), prepared)

        (value, info), gradient = jax.value_and_grad(loss, has_aux=True)(moved)
        assert value.shape == () and np.isfinite(value), names
        assert np.all(np.isfinite(gradient)) and np.any(gradient != 0), names
        assert all(np.isfinite(x) for x in info.values()), names
        if change == "d3s":
            assert 0 < prepared.mask.sum() <= 0.5 * rollout.mask.sum(), names


@pytest.mark.parametrize("name", typing.get_args(shared.ObjectiveName))
@pytest.mark.usefixtures("empty_caches")
def test_every_named_recipe_trains(name):
    options = {
        "capo_adam": ["gain_limit=1", "shift_limit=1"],  # steps of 0.1 are large
        "stratified_grpo": ["alpha=0.5", "bucket_width=1"],
    }.get(name, [])
    objective = shared.make_objective(name, options, aggregate=None, known=KNOWN)
    optimizer = optax.sgd(0.1)
    update = train.make_update(
        OUTPUTS, objective, optimizer, num_minibatches=2, group_size=6, num_epochs=1
    )
    state = train.init(PARAMS + 0, optimizer, jax.random.key(0), objective=objective)
    rollout = batch().replace(proximal_logprobs=None)
    for _ in range(2):
        state, metrics = update(state, rollout)
    assert np.isfinite(metrics["loss"]) and np.all(np.isfinite(state.params))
    assert np.any(np.asarray(state.params) != np.asarray(PARAMS))
    assert update._cache_size() == 1


def test_what_a_recipe_requires_is_asked_for():
    with pytest.raises(ValueError, match=r"stratified_grpo needs alpha, .* alpha=0.8"):
        shared.make_objective("stratified_grpo", [], aggregate=None, known=KNOWN)
    with pytest.raises(ValueError, match="canon has no option 'lenght'"):
        shared.make_objective("canon", ["lenght=3"], aggregate=None, known=KNOWN)
    chosen = shared.make_objective("canon", ["mix=0.5"], aggregate="token_mean", known=KNOWN)
    assert chosen.aggregate is pg.aggregate.token_mean
