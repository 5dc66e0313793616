"""The bound on likeness of features, its penalty, ranks, and DDPG with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, diagnostics, envs, values
from pgjax.diagnostics import spectra
from pgjax.envs import control
from pgjax.sampling import replay

GAMMA = 0.9
RNG = np.random.default_rng(0)


def cosine(a, b):
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_what_solves_bellman_keeps_the_bound():
    phi, later = RNG.normal(size=(2, 1000, 6))
    w = RNG.normal(size=6)
    rewards = (phi - GAMMA * later) @ w
    with jax.enable_x64(True):
        given = jnp.asarray(phi), jnp.asarray(later)
        bound = values.beer_bound(
            *given, jnp.asarray(rewards), head_square_norm=w @ w, discount=GAMMA
        )
        assert (cosine(phi, later) <= bound + 1e-12).all()
        assert (bound < 1).any()  # so that it says something
        np.testing.assert_array_equal(values.beer_penalty(*given, bound), 0.0)
        # By plain arithmetic.
        a, b = np.linalg.norm(phi, axis=1), np.linalg.norm(later, axis=1)
        wanted = (a**2 + GAMMA**2 * b**2 - rewards**2 / (w @ w)) / (2 * GAMMA * a * b)
        np.testing.assert_allclose(bound, wanted, rtol=1e-12)


def test_the_bound_is_reached_where_the_difference_is_along_the_head():
    later, w = RNG.normal(size=(50, 6)), RNG.normal(size=6)
    phi = GAMMA * later + RNG.normal(size=(50, 1)) * w
    rewards = (phi - GAMMA * later) @ w
    with jax.enable_x64(True):
        bound = values.beer_bound(
            jnp.asarray(phi),
            jnp.asarray(later),
            jnp.asarray(rewards),
            head_square_norm=w @ w,
            discount=GAMMA,
        )
    np.testing.assert_allclose(bound, cosine(phi, later), rtol=1e-9)


def test_a_long_head_takes_the_reward_out_and_the_copy_only_scales():
    phi, later, copy = jnp.asarray(RNG.normal(size=(3, 20, 4)), jnp.float32)
    rewards = jnp.full(20, 5.0)
    far = values.beer_bound(phi, later, rewards, head_square_norm=1e30, discount=GAMMA)
    none = values.beer_bound(phi, later, 0 * rewards, head_square_norm=1.0, discount=GAMMA)
    np.testing.assert_allclose(far, none, rtol=1e-6)
    assert (none >= 1 - 1e-6).all()  # no bound on a cosine
    mixed = values.beer_bound(
        phi, later, rewards, head_square_norm=2.0, discount=GAMMA, scale_features=copy
    )
    plain = values.beer_bound(phi, later, rewards, head_square_norm=2.0, discount=GAMMA)
    ratio = np.linalg.norm(later, axis=1) / np.linalg.norm(copy, axis=1)
    np.testing.assert_allclose(mixed, plain * ratio, rtol=1e-5)


def test_only_the_cosine_in_the_features_has_a_gradient():
    phi, later = jnp.asarray(RNG.normal(size=(2, 8, 3)), jnp.float32)
    bound = jnp.asarray(cosine(np.asarray(phi), np.asarray(later)), jnp.float32)
    bound = bound + jnp.array([-0.1] * 4 + [0.1] * 4)

    def loss(phi, later, bound):
        return values.beer_penalty(phi, later, bound).sum()

    slopes = jax.grad(loss, argnums=(0, 1, 2))(phi, later, bound)
    assert not slopes[1].any() and not slopes[2].any()
    assert not slopes[0][4:].any()  # below the bound
    # d cos / dφ = (φ'/‖φ'‖ - cos φ/‖φ‖) / ‖φ‖.
    a, b = (np.linalg.norm(x, axis=1, keepdims=True) for x in (phi, later))
    c = cosine(np.asarray(phi), np.asarray(later))[:, None]
    np.testing.assert_allclose(slopes[0][:4], ((later / b - c * phi / a) / a)[:4], atol=1e-5)

    def whole(phi, later, rewards, square):
        bound = values.beer_bound(phi, later, rewards, head_square_norm=square, discount=GAMMA)
        return bound.sum()

    every = jax.grad(whole, argnums=(0, 1, 2, 3))(phi, later, jnp.ones(8), jnp.float32(2.0))
    assert not any(np.any(x) for x in every)


def test_features_of_norm_zero_are_finite():
    zero, one = jnp.zeros((2, 3)), jnp.ones((2, 3))
    rewards = jnp.array([0.0, 1.0])

    def loss(phi, later):
        bound = values.beer_bound(phi, later, rewards, head_square_norm=1.0, discount=GAMMA)
        return values.beer_penalty(phi, later, bound).sum()

    for pair in ((zero, one), (one, zero), (zero, zero)):
        found, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*pair)
        assert np.isfinite(found) and all(np.isfinite(x).all() for x in slopes)


def test_ranks():
    assert diagnostics.representation_rank(jnp.eye(7)) == 7
    assert diagnostics.representation_rank(jnp.outer(jnp.arange(1.0, 9.0), jnp.ones(4))) == 1
    assert diagnostics.representation_rank(jnp.zeros((5, 3))) == 0
    scales = jnp.diag(jnp.array([1.0, 0.1, 0.03, 0.001])) * 2  # over √4
    assert diagnostics.representation_rank(scales) == 3
    assert diagnostics.representation_rank(scales, threshold=0.05) == 2
    many = jnp.stack([jnp.eye(3), jnp.diag(jnp.array([1.0, 1.0, 0.0]))])
    np.testing.assert_array_equal(diagnostics.representation_rank(many), [3, 2])
    np.testing.assert_allclose(spectra.effective_rank(many), [3, 2], rtol=1e-6)
    # More rows of the same distribution do not add to it.
    x = RNG.normal(size=(400, 3)) @ np.diag([1.0, 0.02, 0.002])
    for rows in (100, 400):
        assert diagnostics.representation_rank(jnp.asarray(x[:rows], jnp.float32)) == 2


POINT = control.point_mass(max_steps=3)
OPTIONS = {
    "num_envs": 2,
    "num_steps": 2,
    "batch_size": 16,
    "capacity": 50,
    "start_steps": 20,
    "discount": GAMMA,
    "tau": 0.25,
}


def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_without_weight_it_is_ddpg():
    policy = agents.deterministic_policy(POINT, hidden=(5,))
    plain = agents.ddpg(POINT, policy, agents.critics(POINT, num=1, hidden=(5, 4)), **OPTIONS)
    critic = agents.linear_head_critic(POINT, hidden=(5, 4))
    none = agents.beer(POINT, policy, critic, beta=0.0, **OPTIONS)
    added = agents.beer(POINT, policy, critic, beta=jnp.float32(0.0), **OPTIONS)
    first, second, third = [
        jax.jit(lambda key, x=x: agents.train(x, x.init(key), num_updates=20)[0])(jax.random.key(0))
        for x in (plain, none, added)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), first, second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        first.learner.params,
        third.learner.params,
    )


@pytest.mark.parametrize("mask", [False, True])
def test_an_update_descends_the_error_and_the_penalty(mask):
    """Derived once more, on transitions of which some terminate, with copies that differ."""
    beta, rate = 0.5, 0.1
    ended = envs.Environment(
        POINT.reset,
        lambda key, state, action: (step := POINT.step(key, state, action))._replace(
            terminated=step.observation[0] > 0, truncated=step.observation[0] < -0.8
        ),
        POINT.observation,
        POINT.action,
    )
    critic = agents.linear_head_critic(ended, hidden=(5, 4))
    agent = agents.beer(
        ended,
        agents.deterministic_policy(ended, hidden=(5,)),
        critic,
        beta=beta,
        mask_terminated=mask,
        optimizer=optax.sgd(rate),
        **OPTIONS,
    )
    before, other = (jax.jit(agent.init)(jax.random.key(seed)) for seed in (0, 1))
    before = before._replace(learner=before.learner._replace(targets=other.learner.params))
    after, _ = jax.jit(agent.update)(before)
    learn_key = jax.random.split(before.key, 3)[-1]
    sample_key, _ = jax.random.split(jax.random.split(learn_key, 1)[0])
    batch = replay.sample(after.replay, sample_key, batch_size=16)
    assert batch.terminated.any() and not batch.terminated.all()
    params, old = before.learner.params, before.learner.targets

    def layers(net, x):
        for layer in net[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x, (x @ net[-1]["kernel"] + net[-1]["bias"])

    def q_of(net, observation, action):
        one = jax.tree.map(lambda x: x[0], net)
        phi, q = layers(one, jnp.concatenate([observation, action], -1))
        return phi, q[:, 0], one[-1]["kernel"][:, 0]

    def later(networks):
        action = jnp.tanh(layers(networks["actor"], batch.next_observation)[1])
        return q_of(networks["critic"], batch.next_observation, action)

    y = batch.reward + GAMMA * (1 - batch.terminated) * later(old)[1]
    copied, online = later(old)[0], later(params)[0]

    def norm(x):
        return jnp.sqrt(jnp.sum(x**2, -1))

    now, _, w = q_of(params["critic"], batch.observation, batch.action)
    bound = norm(now) ** 2 + GAMMA**2 * norm(online) ** 2 - batch.reward**2 / jnp.sum(w**2)
    bound = bound / (2 * GAMMA * norm(now) * norm(copied))

    def loss(net):
        phi, q, _ = q_of(net, batch.observation, batch.action)
        c = jnp.sum(phi * copied, -1) / (norm(phi) * norm(copied))
        hinge = jnp.maximum(c - bound, 0.0)
        if mask:
            hinge = hinge * ~batch.terminated
        return 0.5 * jnp.mean((q - y) ** 2 + beta * hinge)

    wanted = jax.tree.map(
        lambda x, g: x - rate * g, params["critic"], jax.grad(loss)(params["critic"])
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        after.learner.params["critic"],
        wanted,
    )
    np.testing.assert_allclose(
        critic.features(params["critic"], batch.observation, batch.action), now, rtol=1e-5
    )


def test_bad_input():
    phi, rewards = jnp.ones((4, 3)), jnp.ones(4)
    options = {"head_square_norm": 1.0, "discount": GAMMA}
    with pytest.raises(ValueError, match="discount: expected a number in"):
        values.beer_bound(phi, phi, rewards, head_square_norm=1.0, discount=0.0)
    with pytest.raises(ValueError, match="head_square_norm"):
        values.beer_bound(phi, phi, rewards, head_square_norm=0.0, discount=GAMMA)
    with pytest.raises(ValueError, match="next_features: expected shape"):
        values.beer_bound(phi, jnp.ones((4, 2)), rewards, **options)
    with pytest.raises(ValueError, match="scale_features: expected shape"):
        values.beer_bound(phi, phi, rewards, scale_features=jnp.ones((4, 2)), **options)
    with pytest.raises(ValueError, match="rewards: expected shape"):
        values.beer_bound(phi, phi, jnp.ones((4, 3)), **options)
    with pytest.raises(ValueError, match="bounds: expected shape"):
        values.beer_penalty(phi, phi, jnp.ones(3))
    with pytest.raises(ValueError, match="features: expected a floating"):
        values.beer_penalty(jnp.ones((4, 3), int), phi, rewards)
    with pytest.raises(ValueError, match="features: expected shape"):
        values.beer_penalty(jnp.float32(1), jnp.float32(1), jnp.float32(1))
    with pytest.raises(ValueError, match=r"features: expected shape \[..., N, D\]"):
        diagnostics.representation_rank(jnp.ones(3))
    with pytest.raises(ValueError, match="threshold"):
        diagnostics.representation_rank(phi, threshold=-1.0)
    with pytest.raises(ValueError, match="critic: expected a LinearHeadCritic"):
        agents.beer(POINT, critic=agents.critics(POINT, num=1))
    with pytest.raises(ValueError, match="beta"):
        agents.beer(POINT, beta=-1.0)
    with pytest.raises(ValueError, match="discount"):
        agents.beer(POINT, discount=0.0)
    with pytest.raises(ValueError, match="hidden: expected at least one layer"):
        agents.linear_head_critic(POINT, hidden=())
