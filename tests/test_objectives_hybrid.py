"""Recipes for consistent answers, demonstrations and other engines, against formulas by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from pgjax import objectives, train
from pgjax.advantages import consistency, hybrid
from pgjax.diagnostics import enumeration, problems
from pgjax.objectives import discriminative as across
from pgjax.objectives import hybrid as recipes
from pgjax.types import PolicyOutputs, Rollout

IDS = np.repeat(np.arange(4), 4)
REWARDS = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0], np.float32)
ANSWERS = np.array([3, 1, 1, 3, 2, 2, 2, 2, 5, 5, 5, 5, 1, 5, 2, 3]) - 2
B, T = IDS.size, 4


def rollout(seed=0, drift=0.3):
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    current = np.where(mask, -rng.gamma(2.0, 0.6, (B, T)), 0)
    behavior = np.where(mask, current - rng.normal(0, drift, (B, T)), 0)
    return jnp.asarray(current, jnp.float32), Rollout(
        tokens=jnp.zeros((B, T), jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(behavior, jnp.float32),
        rewards=jnp.asarray(REWARDS),
        group_ids=jnp.asarray(IDS),
        extras={"answer_ids": jnp.asarray(ANSWERS)},
    )


def gradient(objective, current, batch):
    @jax.jit
    def found(current, batch):
        prepared = objective.prepare(batch)
        return jax.grad(lambda lp: objective.value(PolicyOutputs(logprobs=lp), prepared))(current)

    return np.asarray(found(current, batch))


# COPO


def test_copo_is_two_clipped_losses():
    current, batch = rollout()
    objective = across.copo(gamma=2.0, rho=0.8, factor=consistency.consistency_factor)
    found = gradient(objective, current, batch)
    want = np.zeros((B, T))
    means, entropies = np.zeros(4), np.zeros(4)
    for g in range(4):
        _, counts = np.unique(ANSWERS[g == IDS], return_counts=True)
        p = counts / 4
        entropies[g] = -(p * np.log2(p)).sum()
        means[g] = REWARDS[g == IDS].mean() * (1 - 0.75 / 2 * entropies[g])
    prompt = (means - means.mean()) / (means.std(ddof=1) + 1e-6)
    ratio = np.exp(np.asarray(current - batch.behavior_logprobs, np.float64))
    mask = np.asarray(batch.mask)
    for i in range(B):
        group = REWARDS[IDS[i] == IDS]
        spread = group.std(ddof=1)
        own = (REWARDS[i] - group.mean()) / (spread + 1e-6) if spread else 0.0
        w = 1 / (1 + np.exp(-2.0 * (entropies[IDS[i]] - 0.8)))
        for t in np.flatnonzero(mask[i]):
            for weight, a in ((w, own), (1 - w, prompt[IDS[i]])):
                r = ratio[i, t]
                if not ((a > 0 and r > 1.2) or (a < 0 and r < 0.8)):
                    want[i, t] -= weight * a * r / mask[i].sum() / B
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-8)


def test_copo_s_ends_are_grpo_and_the_prompt_s_own_advantage():
    current, batch = rollout()
    np.testing.assert_allclose(
        gradient(across.copo(rho=-np.inf), current, batch),
        gradient(objectives.grpo(), current, batch),
        rtol=1e-5,
    )
    prepared = jax.jit(across.copo(rho=np.inf).prepare)(batch)
    advantage = np.asarray(prepared.advantages).reshape(4, 4)
    np.testing.assert_array_equal(advantage, advantage[:, :1].repeat(4, 1))
    assert np.ptp(advantage[:, 0]) > 1


def test_groups_that_agree_still_teach_copo():
    current, batch = rollout(drift=0.0)
    decided = batch.replace(rewards=jnp.asarray((IDS % 2).astype(np.float32)))
    decided.extras["answer_ids"] = jnp.asarray(IDS)
    assert not gradient(objectives.grpo(), current, decided).any()
    found = gradient(across.copo(), current, decided)
    # Ascent lowers what was sampled where all were wrong, and raises it where all were right.
    mask = np.asarray(batch.mask)
    assert np.all(found[mask & (IDS % 2 == 0)[:, None]] > 0)
    assert np.all(found[mask & (IDS % 2 == 1)[:, None]] < 0)
    same = decided.replace(rewards=jnp.ones(B))
    assert not gradient(across.copo(), current, same).any()


def test_copo_takes_answers_from_anywhere():
    _, batch = rollout()
    bare = batch.replace(extras=None)
    objective = across.copo(answer_ids=lambda r: jnp.asarray(ANSWERS))
    found = jax.jit(objective.prepare)(bare).advantages
    np.testing.assert_array_equal(found, jax.jit(across.copo().prepare)(batch).advantages)
    with pytest.raises(ValueError, match="expected 'answer_ids'"):
        jax.eval_shape(across.copo().prepare, bare)
    with pytest.raises(ValueError, match="gamma: "):
        across.copo(gamma=-1.0)
    with pytest.raises(ValueError, match="base: "):
        across.copo(base=1.0)


# Demonstrations

SHOWN = np.arange(B) % 4 == 3  # the last row of each group


def with_demonstrations(seed=0, drift=0.3):
    current, batch = rollout(seed, drift)
    garbage = jnp.where(SHOWN[:, None], jnp.float32(-1e4), batch.behavior_logprobs)
    return current, batch.replace(
        behavior_logprobs=garbage, extras={"demonstrated": jnp.asarray(SHOWN)}
    )


def constant(alpha, beta):
    return lambda rate: (jnp.full(rate.shape, alpha), jnp.full(rate.shape, beta))


def test_reinforcement_alone_is_dr_grpo_without_clip():
    current, batch = with_demonstrations()
    found = gradient(recipes.mixed(length=9, coefficients=constant(1.0, 0.0)), current, batch)
    own = np.flatnonzero(~SHOWN)
    alone = jax.tree.map(lambda x: x[own], batch)
    want = gradient(objectives.dr_grpo(length=9, low=1.0, high=1e9), current[own], alone)
    np.testing.assert_allclose(found[own], want, rtol=1e-5, atol=1e-8)
    assert not found[SHOWN].any()


def test_imitation_alone_is_maximum_likelihood():
    current, batch = with_demonstrations()
    found = gradient(
        recipes.mixed(length=9, coefficients=constant(0.0, 1.0), imitation_coefficient=0.3),
        current,
        batch,
    )
    mask = np.asarray(batch.mask)
    want = np.where(mask & SHOWN[:, None], -0.3 / 4 / mask.sum(-1, keepdims=True), 0.0)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    # With demonstrations of one length that is the supervised objective on them.
    even = batch.replace(mask=jnp.ones_like(batch.mask))
    rows = np.flatnonzero(SHOWN)
    alone = jax.tree.map(lambda x: x[rows], even)
    np.testing.assert_allclose(
        gradient(recipes.mixed(length=9, coefficients=constant(0.0, 1.0)), current, even)[rows],
        gradient(objectives.supervised(), current[rows], alone),
        rtol=1e-5,
    )


@pytest.mark.parametrize("gate", [0.0, 1 / 3])
def test_each_prompt_takes_its_own_branch(gate):
    current, batch = with_demonstrations()
    found = gradient(recipes.hpt(length=9, gate=gate), current, batch)
    rl = gradient(recipes.mixed(length=9, coefficients=constant(1.0, 0.0)), current, batch)
    sft = gradient(recipes.mixed(length=9, coefficients=constant(0.0, 1.0)), current, batch)
    for g in range(4):
        rate = REWARDS[(g == IDS) & ~SHOWN].mean()
        want = rl if rate > gate + 1e-6 else sft
        np.testing.assert_allclose(found[g == IDS], want[g == IDS], rtol=1e-5)
    # A prompt whose own samples are all right learns nothing by reinforcement.
    assert not rl[IDS == 2].any()
    soft = gradient(recipes.mixed(length=9, coefficients=hybrid.soft_coefficients), current, batch)
    np.testing.assert_allclose(  # one of three: the nearest eighth is 3/8
        soft[IDS == 0], 0.25 * rl[IDS == 0] + 0.25 * sft[IDS == 0], rtol=1e-5, atol=1e-8
    )


def test_minibatches_of_whole_prompts_add_up():
    current, batch = with_demonstrations()
    objective = recipes.hpt(length=9)
    prepared = jax.jit(objective.prepare)(batch)
    whole = gradient(objective, current, batch)

    @jax.jit
    def of(lp, part):
        return jax.grad(lambda lp: objective.value(PolicyOutputs(logprobs=lp), part))(lp)

    halves = [
        of(current[rows], jax.tree.map(lambda x, rows=rows: x[rows], prepared))
        for rows in (slice(0, 8), slice(8, 16))
    ]
    np.testing.assert_allclose(np.concatenate(halves) / 2, whole, rtol=1e-5)


def test_a_missing_demonstration_is_an_error():
    _, batch = with_demonstrations()
    without = batch.replace(extras={"demonstrated": jnp.asarray(SHOWN & (IDS != 1))})
    with pytest.raises(ValueError, match="a demonstration for each prompt that imitates, got 1"):
        recipes.hpt(length=9).prepare(without)
    checked = checkify.checkify(jax.jit(recipes.hpt(length=9).prepare))
    error, _ = checked(without)
    assert "a demonstration for each prompt" in str(error.get())
    error, prepared = checked(batch)
    assert error.get() is None and prepared.multipliers is not None
    with pytest.raises(ValueError, match="expected 'demonstrated'"):
        jax.eval_shape(recipes.hpt(length=9).prepare, batch.replace(extras=None))
    with pytest.raises(ValueError, match="expected dtype bool"):
        current, _ = rollout()
        gradient(recipes.luffy(), current, batch.replace(extras={"demonstrated": jnp.zeros(B)}))
    for options in ({"gate": 2.0}, {"imitation_coefficient": -1.0}, {"length": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            recipes.hpt(**{"length": 9, **options})


@pytest.mark.parametrize("name", ["luffy", "srft"])
def test_demonstrations_in_the_group(name):
    current, batch = with_demonstrations()
    found = gradient(getattr(recipes, name)(), current, batch)
    mask = np.asarray(batch.mask)
    p = np.exp(np.asarray(current, np.float64))
    r = np.exp(np.asarray(current - batch.behavior_logprobs, np.float64).clip(-20, 20))
    a = np.zeros(B)
    for g in range(4):
        rows = g == IDS
        if REWARDS[rows].std():
            a[rows] = (REWARDS[rows] - REWARDS[rows].mean()) / (REWARDS[rows].std(ddof=1) + 1e-6)
    a = a[:, None]
    kept = ~(((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)))
    shown = p if name == "srft" else 0.1 * p / (p + 0.1) ** 2
    weight = np.where(SHOWN[:, None], shown, kept * r)
    np.testing.assert_allclose(
        found, np.where(mask, -a * weight / mask.sum(), 0), rtol=1e-4, atol=1e-8
    )
    assert found[SHOWN].any()
    none = batch.replace(extras={"demonstrated": jnp.zeros(B, bool)}, behavior_logprobs=current)
    np.testing.assert_allclose(
        gradient(getattr(recipes, name)(), current, none), np.where(mask, -a / mask.sum(), 0),
        rtol=1e-4, atol=1e-8,
    )  # fmt: skip


# MiniRL


def test_minirl_on_policy_is_the_policy_gradient():
    logits, rewards = jnp.array([[0.4, -0.3, 0.9]]), jnp.array([[1.0, 0.2, -0.5]])
    size = 3
    want = enumeration.policy_gradient(logits, rewards) * (1 - 1 / size)

    def filled(objective):
        surrogate = objective.surrogate
        return dataclasses.replace(
            objective,
            own_needs=frozenset(),
            surrogate=lambda out, r: surrogate(
                out, r.replace(proximal_logprobs=r.behavior_logprobs)
            ),
        )

    found = enumeration.expected_gradient(
        filled(recipes.minirl()), logits, rewards, group_size=size
    )
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_minirl_undoes_what_the_engine_does():
    """One token, exact weights: the expected gradient is on-policy's whatever engine sampled."""
    rewards = jnp.array([[1.0, 0.2, -0.5]])
    problem = problems.bandit(rewards)
    params, engine = jnp.array([[0.4, -0.3, 0.9]]), jnp.array([[-0.2, 0.5, 0.6]])
    objective = recipes.minirl(cap=np.inf)
    draws = jnp.asarray(enumeration.all_draws(1, 3, 2))

    @jax.jit
    @jax.vmap
    def term(actions):
        tokens = jnp.stack([jnp.zeros_like(actions), actions], axis=1)
        batch = problems.rollout_of(problem, tokens, engine)
        own = problems.rollout_of(problem, tokens, params).behavior_logprobs
        prepared = objective.prepare(batch.replace(proximal_logprobs=own))

        def loss(params):
            out = problems.outputs(problem, params, prepared, frozenset())
            return objective.value(out, prepared)

        return jnp.exp(batch.behavior_logprobs.sum()) * -jax.grad(loss)(params)

    found = term(draws).sum(0)
    # The baseline is the engine's mean reward: E_μ[π/μ (R_i - R_j) g] / 2 = ∇J / 2.
    want = enumeration.policy_gradient(params, rewards) / 2
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-7)


def test_minirl_in_training_computes_the_learner_s_own_policy():
    problem = problems.bandit(jnp.array([[1.0, 0.0, 0.5]]))
    outputs = functools.partial(problems.outputs, problem)
    optimizer = optax.sgd(0.5)
    update = train.make_update(outputs, recipes.minirl(), optimizer, num_epochs=2)
    state = train.init(jnp.zeros((1, 3)), optimizer, jax.random.key(0))
    batch = problems.sample(problem, jnp.array([[0.5, 0.0, 0.0]]), jax.random.key(1), group_size=16)
    state, metrics = update(state, batch)
    assert np.isfinite(metrics["loss"]) and float(metrics["gradient_norm"]) > 0
    with pytest.raises(ValueError, match="rollout.proximal_logprobs"):
        recipes.minirl().prepare(batch)
    for options in ({"cap": 0.9}, {"low": -0.1}, {"high": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            recipes.minirl(**options)
