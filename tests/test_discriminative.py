"""DisCO's parts and recipes against its objectives J1 and J2 written out question by question."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import advantages, logprobs, surrogates, train
from pgjax.diagnostics import enumeration, problems
from pgjax.objectives import discriminative as recipes
from pgjax.surrogates import discriminative
from pgjax.types import PolicyOutputs, Rollout

# Mixed in no order: two questions with both signs, one all right, one all wrong.
IDS = np.array([0, 1, 0, 2, 1, 3, 0, 1, 0, 2, 3, 1])
REWARDS = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0], np.float32)
LENGTHS = np.array([3, 1, 5, 2, 4, 2, 1, 3, 2, 5, 1, 4])
B, T = IDS.size, 6
MASK = (np.arange(T) >= 1) & (np.arange(T) <= LENGTHS[:, None])


def rollout(seed=0, drift=0.3):
    rng = np.random.default_rng(seed)
    current = np.where(MASK, -rng.gamma(2.0, 0.6, (B, T)), 0).astype(np.float32)
    behavior = np.where(MASK, current - rng.normal(0, drift, (B, T)), 0).astype(np.float32)
    batch = Rollout(
        tokens=jnp.zeros((B, T), jnp.int32),
        mask=jnp.asarray(MASK),
        behavior_logprobs=jnp.asarray(behavior),
        rewards=jnp.asarray(REWARDS),
        group_ids=jnp.asarray(IDS) * 7 - 3,
    )
    return jnp.asarray(current), batch


def loss_and_gradient(objective, current, batch):
    @jax.jit
    def both(current, batch):
        prepared = objective.prepare(batch)
        return jax.value_and_grad(lambda lp: objective.value(PolicyOutputs(logprobs=lp), prepared))(
            current
        )

    return both(current, batch)


def slope(function, x):
    """By central differences in float64."""
    x = np.asarray(x, np.float64)
    found = np.zeros_like(x)
    for index in np.argwhere(MASK):
        step = np.zeros_like(x)
        step[tuple(index)] = 1e-5
        found[tuple(index)] = (function(x + step) - function(x - step)) / 2e-5
    return found


def scores_of(current, behavior, score):
    values = current if score == "log" else np.exp(current - np.asarray(behavior, np.float64))
    return np.where(MASK, values, 0).sum(-1) / LENGTHS


def by_definition(scores, tau):
    """-(1/Q) Σ_q J, all four questions counted."""
    total = 0.0
    for q in range(4):
        right = np.flatnonzero((q == IDS) & (REWARDS == 1))
        wrong = np.flatnonzero((q == IDS) & (REWARDS == 0))
        if not (right.size and wrong.size):
            continue
        total += scores[right].mean()
        if tau is None:
            total -= scores[wrong].mean()
        else:
            total -= tau * (np.log(np.mean(np.exp(scores[wrong] / tau))))
    return -total / 4


SCORES = {"log": discriminative.log_likelihood, "ratio": surrogates.importance_ratio}


@pytest.mark.parametrize("score", ["log", "ratio"])
@pytest.mark.parametrize("tau", [None, 0.1, 10.0])
def test_the_gradient_is_that_of_the_objective(score, tau):
    current, batch = rollout()
    if tau is None:
        objective = recipes.disco_b(score=SCORES[score], beta=0)
    else:
        objective = recipes.disco(temperature=tau, score=SCORES[score], beta=0)
    _, found = loss_and_gradient(objective, current, batch)
    want = slope(
        lambda lp: by_definition(scores_of(lp, batch.behavior_logprobs, score), tau), current
    )
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-7)
    assert np.abs(want).max() > 0.01
    skipped = np.isin(IDS, [2, 3])
    assert not np.asarray(found)[skipped].any()


def test_disco_b_has_the_value_of_its_objective():
    current, batch = rollout()
    value, _ = loss_and_gradient(recipes.disco_b(beta=0), current, batch)
    want = by_definition(scores_of(current, batch.behavior_logprobs, "log"), None)
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_questions_of_one_sign_count():
    current, batch = rollout()
    kept = np.flatnonzero(IDS < 2)
    fewer = jax.tree.map(lambda x: x[kept], batch)
    _, whole = loss_and_gradient(recipes.disco(beta=0), current, batch)
    _, part = loss_and_gradient(recipes.disco(beta=0), current[kept], fewer)
    np.testing.assert_allclose(2 * whole[kept], part, rtol=1e-5)


def weights(scores, negative, ids, **options):
    function = functools.partial(discriminative.hard_negative_weights, num_groups=4, **options)
    return jax.jit(function)(scores, negative, ids)


def test_temperature_goes_from_the_mean_to_the_hardest():
    rng = np.random.default_rng(1)
    scores, negative = jnp.asarray(rng.normal(size=B), jnp.float32), REWARDS == 0
    np.testing.assert_array_equal(weights(scores, negative, IDS, temperature=np.inf), 1.0)
    np.testing.assert_allclose(weights(scores, negative, IDS, temperature=1e7), 1.0, atol=1e-6)
    hardest = np.ones(B)
    for q in range(4):
        wrong = np.flatnonzero((q == IDS) & negative)
        if wrong.size:
            hardest[wrong] = 0
            hardest[wrong[np.argmax(np.asarray(scores)[wrong])]] = wrong.size
    np.testing.assert_allclose(weights(scores, negative, IDS, temperature=1e-4), hardest, atol=1e-6)
    current, batch = rollout()
    _, limit = loss_and_gradient(recipes.disco(temperature=1e6, beta=0), current, batch)
    _, plain = loss_and_gradient(recipes.disco_b(beta=0), current, batch)
    np.testing.assert_allclose(limit, plain, rtol=1e-4, atol=1e-8)


def test_weights_ignore_a_question_s_offset_and_have_mean_one():
    rng = np.random.default_rng(2)
    scores, negative = jnp.asarray(rng.normal(size=B), jnp.float32), REWARDS == 0
    found = weights(scores, negative, IDS, temperature=0.5)
    shifted = weights(
        scores + jnp.array([0.0, 30.0, -4.0, 2.0])[IDS], negative, IDS, temperature=0.5
    )
    np.testing.assert_allclose(found, shifted, rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(found)[~negative], 1.0)
    for q in (0, 1, 3):
        wrong = (q == IDS) & negative
        assert found[wrong].mean() == pytest.approx(1, rel=1e-5)
        # τ log mean exp(s/τ) >= mean s, and so does its slope's weighted mean.
        assert (found[wrong] * scores[wrong]).mean() >= scores[wrong].mean() - 1e-6


def test_extreme_scores_stay_finite():
    scores = jnp.array([1e30, -1e30, 0.0, -1e30])
    found = weights(scores, np.array([False, True, True, True]), np.zeros(4, int), temperature=0.1)
    np.testing.assert_array_equal(found, [1, 0, 3, 0])
    assert not np.any(
        jax.grad(lambda s: weights(s, REWARDS[:4] == 0, IDS[:4], temperature=1.0).sum())(scores)
    )


def test_ratio_and_log_likelihood_agree_where_nothing_has_moved():
    current, batch = rollout()
    batch = batch.replace(behavior_logprobs=current)
    _, ratio = loss_and_gradient(recipes.disco_b(score=surrogates.importance_ratio), current, batch)
    _, log = loss_and_gradient(recipes.disco_b(), current, batch)
    np.testing.assert_allclose(ratio, log, rtol=1e-6)
    # With all scores 1, wrong samples weigh the same at any temperature.
    _, soft = loss_and_gradient(recipes.disco_ratio(temperature=0.01), current, batch)
    np.testing.assert_allclose(soft, log, rtol=1e-5)


BALANCED, CENTERED, NORMALIZED = (
    jax.jit(functools.partial(function, num_groups=1, **options))
    for function, options in (
        (discriminative.class_balanced, {}),
        (advantages.centered, {}),
        (advantages.group_normalize, {"epsilon": 0.0, "ddof": 0}),
    )
)


@pytest.mark.parametrize("right", range(1, 8))
def test_grpo_weighs_questions_by_their_difficulty(right):
    rewards, ids = (np.arange(8) < right).astype(np.float32), np.zeros(8, int)
    p = right / 8
    balanced = BALANCED(rewards, ids)
    np.testing.assert_allclose(balanced[:right], 1 / right, rtol=1e-6)
    np.testing.assert_allclose(balanced[right:], -1 / (8 - right), rtol=1e-6)
    grpo = NORMALIZED(rewards, ids)
    np.testing.assert_allclose(grpo / 8, np.sqrt(p * (1 - p)) * balanced, rtol=1e-5)
    dr = CENTERED(rewards, ids)
    np.testing.assert_allclose(dr / 8, p * (1 - p) * balanced, rtol=1e-5)


def test_expected_gradient_on_a_bandit():
    """Groups of two: with probability 2 p (1 - p) one is right and one wrong."""
    logits, rewards = jnp.array([[0.4, -0.3, 0.9, 0.1]]), jnp.array([[1.0, 0.0, 1.0, 0.0]])
    found = enumeration.expected_gradient(recipes.disco_b(beta=0), logits, rewards, group_size=2)
    pi = np.asarray(jax.nn.softmax(logits))[0]
    right = np.asarray(rewards)[0] == 1
    p = pi[right].sum()
    scores = np.eye(4) - pi
    want = (pi[right] @ scores[right]) / p - (pi[~right] @ scores[~right]) / (1 - p)
    np.testing.assert_allclose(found[0], 2 * p * (1 - p) * want, rtol=1e-5)


def test_penalty_is_zero_inside_the_region_and_pulls_back_outside():
    current, batch = rollout(drift=0.4)
    old, mask = batch.behavior_logprobs, batch.mask

    def mean_kl(lp, estimator=logprobs.kl_k1):
        return jnp.where(mask, estimator(old, lp), 0).sum() / mask.sum()

    def penalty(lp, **options):
        return discriminative.kl_hinge(lp, old, mask, **options).sum() / mask.sum()

    far = current - 0.5 * mask  # mean log π_old - log π above 0
    for estimator in (logprobs.kl_k1, logprobs.kl_k3):
        kl, pull = jax.jit(jax.value_and_grad(functools.partial(mean_kl, estimator=estimator)))(far)
        assert kl > 0.1
        outside = functools.partial(penalty, delta=0.05, estimator=estimator)
        found = jax.jit(jax.grad(outside))(far)
        np.testing.assert_allclose(found, (kl - 0.05) * pull, rtol=1e-4, atol=1e-8)
        inside = functools.partial(penalty, delta=float(kl) + 1e-3, estimator=estimator)
        value, found = jax.jit(jax.value_and_grad(inside))(far)
        assert value == 0 and not np.any(found)
    # In the recipe: β times that beside the objective's own gradient.
    _, with_penalty = loss_and_gradient(recipes.disco_b(beta=30.0, delta=0.05), far, batch)
    _, without = loss_and_gradient(recipes.disco_b(beta=0), far, batch)
    kl, pull = jax.value_and_grad(mean_kl)(far)
    want = 30.0 * (kl - 0.05) * pull
    np.testing.assert_allclose(with_penalty - without, want, rtol=1e-4, atol=1e-6)


def test_a_trajectory_in_two_rows_counts_once():
    current, batch = rollout()
    long = np.flatnonzero(LENGTHS >= 4)
    head, tail = MASK & (np.arange(T) <= 2), MASK & (np.arange(T) > 2)
    head[LENGTHS < 4], tail[LENGTHS < 4] = MASK[LENGTHS < 4], False
    rows = np.concatenate([np.arange(B), long])
    mask = np.concatenate([head, tail[long]])
    split = jax.tree.map(lambda x: x[rows], batch).replace(
        mask=jnp.asarray(mask), trajectory_ids=jnp.asarray(rows) + 5
    )
    for objective in (recipes.disco(temperature=0.3), recipes.disco_ratio()):
        value, whole = loss_and_gradient(objective, current, batch)
        again, parts = loss_and_gradient(objective, current[rows], split)
        np.testing.assert_allclose(value, again, rtol=2e-5)
        summed = np.zeros((B, T), np.float32)
        np.add.at(summed, rows, np.asarray(parts))
        np.testing.assert_allclose(summed, whole, rtol=2e-5, atol=1e-7)


def test_samples_without_tokens_or_reward_count_nowhere():
    current, batch = rollout()
    extra = jax.tree.map(lambda x: jnp.concatenate([x, x[:2], x[:1]]), batch)
    mask = extra.mask.at[B : B + 2].set(False)
    extra = extra.replace(mask=mask, rewards=extra.rewards.at[-1].set(jnp.nan))
    objective = recipes.disco(temperature=0.3, beta=0)
    _, whole = loss_and_gradient(objective, current, batch)
    _, found = loss_and_gradient(
        objective, jnp.concatenate([current, current[:2], current[:1]]), extra
    )
    np.testing.assert_allclose(found[:B], whole, rtol=1e-5)
    assert not np.asarray(found[B:]).any()
    nothing = batch.replace(mask=jnp.zeros_like(batch.mask))
    value, found = loss_and_gradient(recipes.disco(), current, nothing)
    assert value == 0 and not np.any(found)


def test_training_in_minibatches_keeps_questions_whole():
    problem = problems.bandit(jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (4, 1)))
    outputs = functools.partial(problems.outputs, problem)
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match="group_size: this objective compares samples"):
        train.make_update(outputs, recipes.disco(), optimizer, num_minibatches=2)
    update = train.make_update(
        outputs, recipes.disco(delta=0.1), optimizer, num_minibatches=2, group_size=8
    )
    state = train.init(jnp.zeros((4, 3)), optimizer, jax.random.key(0))
    for step in range(8):
        batch = problems.sample(problem, state.params, jax.random.key(step), group_size=8)
        state, metrics = update(state, batch)
        assert np.isfinite(metrics["loss"]) and metrics["kl_hinge"] >= 0
    assert problems.expected_reward(problem, state.params) > 0.7


def test_errors():
    with pytest.raises(ValueError, match=r"rewards: expected 0 or 1, got \[0.5\]"):
        discriminative.class_balanced(jnp.array([1.0, 0.5]), jnp.zeros(2, int), num_groups=1)
    traced = jax.jit(functools.partial(discriminative.class_balanced, num_groups=1))
    assert np.isnan(traced(jnp.array([1.0, 0.5, 0.0]), jnp.zeros(3, int))).tolist() == [
        False,
        True,
        False,
    ]
    for tau in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="temperature: expected a number in"):
            recipes.disco(temperature=tau)
    with pytest.raises(ValueError, match="delta: "):
        recipes.disco_b(delta=-1e-3)
    with pytest.raises(ValueError, match="beta: "):
        recipes.disco_b(beta=-1.0)
    current, batch = rollout()
    with pytest.raises(ValueError, match="delta: "):
        discriminative.kl_hinge(current, batch.behavior_logprobs, batch.mask, delta=-1.0)
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        discriminative.kl_hinge(current, current, jnp.ones((B, T)), delta=1.0)
    with pytest.raises(ValueError, match="negative: expected dtype bool"):
        weights(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2, int), temperature=1.0)
    with pytest.raises(ValueError, match="behavior_logprobs: expected shape"):
        discriminative.log_likelihood(current, current[:2])
