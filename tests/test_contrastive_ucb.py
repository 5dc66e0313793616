"""Contrastive UCB: bonuses, recovered models, planning and the lock, against closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import contrastive, envs, uncertainty, values
from pgjax.envs import combination_lock

RNG = np.random.default_rng(0)


def test_bonuses_of_one_hot_features_are_visit_counts():
    state = uncertainty.elliptical_init(3, ridge=0.5)
    eye = jnp.eye(3)
    before = uncertainty.elliptical_bonus(state, eye)
    np.testing.assert_allclose(before, 1 / np.sqrt(0.5), rtol=1e-6)
    last = before[1]
    for n in range(1, 6):
        state = uncertainty.elliptical_update(state, eye[1:2])
        found = uncertainty.elliptical_bonus(state, eye, scale=2.0)
        np.testing.assert_allclose(found[1], 2 / np.sqrt(0.5 + n), rtol=1e-6)
        np.testing.assert_allclose(found[0], 2 / np.sqrt(0.5), rtol=1e-6)
        assert found[1] / 2 < last
        last = found[1] / 2
    capped = uncertainty.elliptical_bonus(state, eye, scale=2.0, cap=1.0)
    np.testing.assert_allclose(capped, np.minimum(found, 1.0))


def test_bonuses_are_the_quadratic_form():
    features = RNG.normal(size=(7, 4))
    weights = RNG.uniform(size=7)
    with jax.enable_x64(True):
        state = uncertainty.elliptical_init(4, ridge=0.1, dtype=jnp.float64)
        state = uncertainty.elliptical_update(state, jnp.asarray(features), weights=weights)
        wanted = 0.1 * np.eye(4) + np.einsum("n,ni,nj->ij", weights, features, features)
        np.testing.assert_allclose(state.covariance, wanted, rtol=1e-12)
        query = RNG.normal(size=(2, 3, 4))
        found = uncertainty.elliptical_bonus(state, jnp.asarray(query))
        inverse = np.linalg.inv(wanted)
        np.testing.assert_allclose(
            found, np.sqrt(np.einsum("abi,ij,abj->ab", query, inverse, query)), rtol=1e-10
        )
    # Forgetting: in the limit only the last batch and the ridge are left.
    state = uncertainty.elliptical_init(2, ridge=0.3)
    one = jnp.array([[1.0, 2.0]])
    for _ in range(60):
        state = uncertainty.elliptical_update(state, one, decay=0.5)
    np.testing.assert_allclose(
        state.covariance, 0.3 * np.eye(2) + 2 * one.T @ one, rtol=1e-5, atol=1e-6
    )


def test_bonuses_under_transformations():
    states = jax.vmap(lambda ridge: uncertainty.Ellipsoid(ridge * jnp.eye(2), ridge))(
        jnp.array([1.0, 4.0])
    )
    bonus = jax.jit(jax.vmap(uncertainty.elliptical_bonus, in_axes=(0, None)))
    np.testing.assert_allclose(bonus(states, jnp.array([0.0, 2.0])), [2.0, 1.0], rtol=1e-6)
    start = uncertainty.elliptical_init(2)
    slope = jax.grad(functools.partial(uncertainty.elliptical_bonus, start))
    np.testing.assert_array_equal(slope(jnp.zeros(2)), 0)
    np.testing.assert_allclose(slope(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    broken = uncertainty.Ellipsoid(-jnp.eye(2), jnp.float32(1.0))
    assert jax.jit(uncertainty.elliptical_bonus)(broken, jnp.ones(2)) == 0
    with pytest.raises(ValueError, match="^state.covariance: expected a positive definite"):
        uncertainty.elliptical_bonus(broken, jnp.ones(2))
    with pytest.raises(ValueError, match="^state.covariance: expected a symmetric"):
        uncertainty.elliptical_bonus(
            start._replace(covariance=jnp.array([[1.0, 0.5], [0, 1]])), 0.0 * jnp.ones(2)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: uncertainty.elliptical_init(0), "size"),
        (lambda s: uncertainty.elliptical_init(2, ridge=0.0), "ridge"),
        (lambda s: uncertainty.elliptical_update(s, jnp.ones(3)), "features"),
        (lambda s: uncertainty.elliptical_update(s, jnp.ones(2, int)), "features"),
        (
            lambda s: uncertainty.elliptical_update(s, jnp.ones((4, 2)), weights=jnp.ones(3)),
            "weights",
        ),
        (lambda s: uncertainty.elliptical_update(s, jnp.ones(2), decay=1.5), "decay"),
        (lambda s: uncertainty.elliptical_bonus(s, jnp.ones(2), scale=-1.0), "scale"),
        (lambda s: uncertainty.elliptical_bonus(s, jnp.ones(2), cap=-1.0), "cap"),
    ],
)
def test_bad_bonuses(call, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        call(uncertainty.elliptical_init(2))


def small_world():
    """P(·|s, a) of one state and action, and P⁻, over five states."""
    p = RNG.dirichlet(np.ones(5))
    q = RNG.dirichlet(5 * np.ones(5))
    return jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)


def test_the_loss_is_least_at_the_ratio_of_both_laws():
    p, q = small_world()

    def loss(log_f):
        true, false = (
            contrastive.binary_nce(log_f, 0 * log_f),
            contrastive.binary_nce(0 * log_f, log_f),
        )
        return jnp.sum(p * true) + jnp.sum(q * false) - 2 * jnp.log(2.0)

    best = jnp.log(p / q)
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-6)
    # Directly, as an expectation of both logarithms.
    f = np.asarray(p / q, np.float64)
    wanted = np.sum(p * np.log1p(1 / f) + q * np.log1p(f))
    np.testing.assert_allclose(loss(best), wanted, rtol=1e-6)
    for factor in (1.1, 0.9):
        assert loss(best + np.log(factor)) > loss(best)
    assert np.linalg.eigvalsh(jax.hessian(loss)(best)).min() > 0
    np.testing.assert_allclose(np.sum(q * f), 1, rtol=1e-6)
    np.testing.assert_allclose(contrastive.transitions_from_scores(p / q, q), p, rtol=1e-5)


def test_log_scores_are_inner_products_and_stay_finite():
    phi, psi = RNG.uniform(0.1, 2.0, size=(2, 4, 3))
    log_phi, log_psi = (jnp.asarray(np.log(x), jnp.float32) for x in (phi, psi))
    found = contrastive.low_rank_log_scores(log_phi[:, None], log_psi)
    np.testing.assert_allclose(np.exp(found), phi @ psi.T, rtol=1e-5)
    tiny = contrastive.low_rank_log_scores(log_phi - 200.0, log_psi)
    loss = contrastive.binary_nce(tiny, tiny)
    assert np.isfinite(loss).all() and (tiny < -190).all()
    np.testing.assert_allclose(loss, -tiny, rtol=1e-5)


def test_the_model_recovered_is_the_product_of_the_factors():
    """Of exact factors of P / P⁻, whatever their scales."""
    transitions = RNG.dirichlet(np.ones(3), size=6)  # of 6 pairs, to 3 latent states
    seen = RNG.dirichlet(np.ones(8), size=3)
    negative = RNG.dirichlet(9 * np.ones(8))
    scales = RNG.uniform(0.1, 10.0, size=3)
    log_phi = jnp.asarray(np.log(transitions * scales), jnp.float32)
    log_psi = jnp.asarray(np.log(seen.T / negative[:, None] / scales), jnp.float32)
    law = jnp.asarray(negative, jnp.float32)
    model = contrastive.recover_model(log_phi, log_psi, law)
    np.testing.assert_allclose(model.features, transitions, rtol=1e-4)
    np.testing.assert_allclose(model.measures, seen.T, rtol=1e-4)
    np.testing.assert_allclose(model.transitions, transitions @ seen, rtol=1e-4)
    scores = jnp.exp(contrastive.low_rank_log_scores(log_phi[:, None], log_psi))
    np.testing.assert_allclose(
        model.transitions, contrastive.transitions_from_scores(scores, law), rtol=1e-4
    )
    # Factors of any other sums: still the scores' model, normalised.
    log_phi = log_phi + jnp.asarray(RNG.normal(size=(6, 1)), jnp.float32)
    again = contrastive.recover_model(log_phi, log_psi, law)
    np.testing.assert_allclose(again.transitions, model.transitions, rtol=1e-4)


def test_training_recovers_a_world_of_rank_two():
    true = RNG.dirichlet(np.ones(2), size=12) @ RNG.dirichlet(0.5 * np.ones(6), size=2)
    p, q = jnp.asarray(true, jnp.float32), jnp.full(6, 1 / 6)
    phi_key, psi_key, key = jax.random.split(jax.random.key(0), 3)
    params = jax.random.normal(phi_key, (12, 2)), jax.random.normal(psi_key, (6, 2))
    descent = optax.adam(optax.cosine_decay_schedule(0.05, 3000))

    def loss(params, key):
        true_key, false_key, pair_key = jax.random.split(key, 3)
        pairs = jax.random.randint(pair_key, (512,), 0, 12)
        true = jax.random.categorical(true_key, jnp.log(p)[pairs])
        false = jax.random.randint(false_key, (512,), 0, 6)
        score = contrastive.low_rank_log_scores
        phi, psi = params
        return contrastive.binary_nce(
            score(phi[pairs], psi[true]), score(phi[pairs], psi[false])
        ).mean()

    def step(carry, key):
        params, state = carry
        updates, state = descent.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, 3000)
    (params, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, keys))(
        (params, descent.init(params))
    )
    found = contrastive.recover_model(*params, q).transitions
    assert float(jnp.max(0.5 * jnp.abs(found - p).sum(-1))) < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive.low_rank_log_scores(jnp.ones(3), jnp.ones(2)), "log_psi"),
        (
            lambda: contrastive.recover_model(jnp.ones(3), jnp.ones((4, 2)), jnp.ones(4) / 4),
            "log_phi",
        ),
        (
            lambda: contrastive.recover_model(jnp.ones(2), jnp.ones((4, 2)), jnp.ones(3) / 3),
            "negative",
        ),
        (
            lambda: contrastive.recover_model(jnp.ones(2), jnp.ones((2, 2)), jnp.array([1.0, 0.0])),
            "negative",
        ),
        (
            lambda: contrastive.transitions_from_scores(jnp.array([1.0, 0.0]), jnp.ones(2) / 2),
            "scores",
        ),
        (
            lambda: contrastive.transitions_from_scores(jnp.array([1.0, -1.0]), jnp.ones(2) / 2),
            "scores",
        ),
        (lambda: contrastive.transitions_from_scores(jnp.ones(2), jnp.ones(2)), "negative"),
        (lambda: values.optimistic_values(jnp.ones((0, 2, 3, 2)), jnp.ones((0, 2, 3))), "rewards"),
        (
            lambda: values.optimistic_values(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3))),
            "transitions",
        ),
        (
            lambda: values.optimistic_values(
                jnp.ones((1, 2, 3, 2)), jnp.ones((1, 2, 3)), jnp.ones((1, 2))
            ),
            "bonuses",
        ),
        (
            lambda: values.optimistic_values(jnp.ones((1, 2, 3, 2)), jnp.ones((1, 2, 3)), cap=0.0),
            "cap",
        ),
        (lambda: combination_lock.combination_lock(jax.random.key(0), horizon=0), "horizon"),
        (
            lambda: combination_lock.combination_lock(jax.random.key(0), num_actions=1),
            "num_actions",
        ),
    ],
)
def test_bad_models_and_plans(call, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        call()


def random_world(horizon=3, states=2, actions=2):
    p = jnp.asarray(RNG.dirichlet(np.ones(states), size=(horizon, states, actions)), jnp.float32)
    r = jnp.asarray(RNG.uniform(size=(horizon, states, actions)), jnp.float32)
    return p, r


def test_planning_finds_the_best_of_all_policies():
    p, r = random_world()
    every = []
    for choice in itertools.product(range(2), repeat=6):
        policy = jax.nn.one_hot(jnp.array(choice).reshape(3, 2), 2)
        every.append(np.asarray(values.policy_values(p, r, policy).values[0]))
    best = values.optimistic_values(p, r)
    np.testing.assert_allclose(best.values[0], np.max(every, axis=0), rtol=1e-6)
    # By hand, for one policy: sum over all paths.
    policy = jnp.asarray(RNG.dirichlet(np.ones(2), size=(3, 2)), jnp.float32)
    total = 0.0
    for path in itertools.product(range(2), repeat=6):
        states, actions = (0, *path[:2]), path[3:]
        chance = np.prod([policy[h, states[h], actions[h]] for h in range(3)])
        chance *= np.prod([p[h, states[h], actions[h], states[h + 1]] for h in range(2)])
        total += chance * sum(r[h, states[h], actions[h]] for h in range(3)) / 2
    np.testing.assert_allclose(values.policy_values(p, r, policy).values[0, 0], total, rtol=1e-5)


def test_optimism_is_above_the_optimum_and_below_its_cap():
    p, r = random_world(5, 4, 3)
    best = values.optimistic_values(p, r)
    bonuses = jnp.asarray(RNG.uniform(size=r.shape), jnp.float32)
    hopeful = values.optimistic_values(p, r, bonuses, cap=10.0)
    assert (hopeful.values >= best.values).all()
    capped = values.optimistic_values(p, r, 5 * bonuses, cap=10.0)
    assert capped.action_values.max() == 10.0
    # Scale 0 leaves the model's own greedy policy.
    none = values.optimistic_values(p, r, 0 * bonuses, cap=10.0)
    np.testing.assert_array_equal(none.action_values, best.action_values)


def test_the_lock_opens_for_its_combination_only():
    mdp = combination_lock.combination_lock(jax.random.key(3))
    horizon, states, actions = mdp.rewards.shape
    assert (horizon, states, actions) == (6, 30, 4)
    np.testing.assert_allclose(mdp.transitions.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(mdp.start.sum(), 1, rtol=1e-6)
    for of_step in np.asarray(mdp.transitions).reshape(horizon, -1, states):
        assert np.linalg.matrix_rank(of_step, tol=1e-5) <= 3
    best = values.optimistic_values(mdp.transitions, mdp.rewards)
    np.testing.assert_allclose(best.values[0] @ mdp.start, 1, rtol=1e-6)
    uniform = values.policy_values(mdp.transitions, mdp.rewards, jnp.full(mdp.rewards.shape, 0.25))
    np.testing.assert_allclose(uniform.values[0] @ mdp.start, 4.0**-6, rtol=1e-5)


def test_the_lock_as_an_environment_follows_its_tables():
    mdp = combination_lock.combination_lock(jax.random.key(0), horizon=3, observations_per_latent=2)
    env = combination_lock.as_environment(mdp)
    assert env.observation == envs.Discrete(4 * 6) and env.action == envs.Discrete(4)
    best = jnp.argmax(values.optimistic_values(mdp.transitions, mdp.rewards).action_values, -1)

    def episode(key):
        state, first = env.reset(key)
        total, ends = 0.0, []
        for h in range(3):
            key, own = jax.random.split(key)
            step = env.step(own, state, best[h, state.state])
            total, state = total + step.reward, step.state
            ends.append(step.terminated)
        return first, step.observation, total, jnp.stack(ends)

    first, last, total, ends = jax.vmap(episode)(jax.random.split(jax.random.key(1), 64))
    assert (total == 1).all() and (first < 4).all() and (last // 6 == 3).all()
    np.testing.assert_array_equal(ends, np.tile([False, False, True], (64, 1)))
    with pytest.raises(ValueError, match="^mdp.transitions: expected shape"):
        combination_lock.as_environment(mdp._replace(transitions=mdp.transitions[:, :2]))


def test_a_quick_run_of_the_experiment_writes_its_files(tmp_path):
    import json

    from experiments import contrastive_ucb_lock

    assert contrastive_ucb_lock.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(found["claims"]) == 3 and len(found["table"]) == 5
    assert (tmp_path / "run" / "curves.png").is_file()
