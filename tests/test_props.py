"""PROPS: its loss is PPO's, its refit undoes sampling error, and without either it is PPO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, diagnostics, envs, policies, sampling, surrogates

KEY = jax.random.key(0)


def tabular(logits, batch):
    states, actions = batch
    return jax.nn.log_softmax(logits)[states, actions]


def batch_of(counts):
    """Rows (state, action), each as often as counted."""
    rows = np.repeat(np.argwhere(np.ones_like(counts)), np.ravel(counts), axis=0)
    return jnp.asarray(rows[:, 0]), jnp.asarray(rows[:, 1])


def refit(logits, batch, **options):
    options = {"num_minibatches": 1, "num_epochs": 4, "max_kl": 0.03, **options}
    optimizer = options.pop("optimizer", optax.sgd(1.0))
    state = optimizer.init(logits)
    return sampling.props_refit(KEY, tabular, logits, batch, state, optimizer=optimizer, **options)


def test_the_loss_is_ppos_with_every_advantage_minus_one():
    rng = np.random.default_rng(0)
    old, new = jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)

    def as_ppo(new):
        ratio = surrogates.importance_ratio(new, old)
        return surrogates.clipped(ratio, -jnp.ones(50), low=0.3, high=0.3).mean()

    for loss in (sampling.props_loss, jax.jit(sampling.props_loss)):
        np.testing.assert_allclose(loss(new, old), as_ppo(new), rtol=1e-6)
        np.testing.assert_allclose(jax.grad(loss)(new, old), jax.grad(as_ppo)(new), rtol=1e-5)
    # By its own definition, in numpy.
    ratio = np.exp(np.asarray(new - old, np.float64))
    wanted = np.maximum(ratio, np.clip(ratio, 0.7, 1.3))
    np.testing.assert_allclose(sampling.props_loss(new, old), wanted.mean(), rtol=1e-5)
    slope = np.where(ratio >= 0.7, ratio, 0.0) / 50
    np.testing.assert_allclose(jax.grad(sampling.props_loss)(new, old), slope, rtol=1e-4)
    # Rows that do not count may hold anything.
    mask = jnp.arange(50) < 20
    spoilt = jnp.where(mask, new, jnp.nan)
    np.testing.assert_allclose(
        sampling.props_loss(spoilt, old, mask=mask), wanted[:20].mean(), rtol=1e-5
    )
    slopes = jax.grad(sampling.props_loss)(spoilt, old, mask=mask)
    np.testing.assert_allclose(slopes[:20], slope[:20] * 2.5, rtol=1e-4)
    np.testing.assert_array_equal(slopes[20:], 0)


def test_the_first_gradient_is_the_mean_score():
    logits = jnp.asarray([[0.3, -1.0, 0.5], [0.0, 0.2, 0.1]])
    counts = np.array([[3, 1, 0], [2, 2, 5]])
    batch = batch_of(counts)
    fixed = tabular(logits, batch)
    grads = jax.grad(lambda x: sampling.props_loss(tabular(x, batch), fixed))(logits)
    pi = np.asarray(jax.nn.softmax(logits))
    wanted = (counts - counts.sum(-1, keepdims=True) * pi) / counts.sum()
    np.testing.assert_allclose(grads, wanted, atol=1e-6)
    # Over-sampled actions lose probability, the absent one gains.
    after = np.asarray(jax.nn.softmax(refit(logits, batch, num_epochs=1).params))
    assert ((after > pi) == (wanted < 0)).all() and after[0, 2] > pi[0, 2]
    # One such step is ROS.
    step = sampling.ros_refit(tabular, logits, batch, step_size=1.0)
    np.testing.assert_allclose(step, logits - wanted, atol=1e-6)
    np.testing.assert_allclose(refit(logits, batch, num_epochs=1).params, step, atol=1e-6)


def test_frequencies_that_are_right_leave_the_policy_alone():
    pi = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    logits = jnp.log(jnp.asarray(pi, jnp.float32))
    batch = batch_of((8 * pi).astype(int))
    found = refit(logits, batch)
    np.testing.assert_allclose(jax.nn.softmax(found.params), pi, atol=1e-6)
    assert diagnostics.tabular_sampling_error(8 * pi, jnp.asarray(pi, jnp.float32)) < 1e-6


def test_limit_and_empty_memory():
    logits = jnp.asarray([[0.3, -1.0, 0.5]])
    batch = batch_of(np.array([[7, 0, 1]]))
    found = refit(logits, batch, max_kl=0.0, optimizer=optax.adam(0.1))
    np.testing.assert_array_equal(found.params, logits)
    assert found.steps == 0
    far = refit(logits, batch, max_kl=0.01, num_epochs=50, optimizer=optax.sgd(0.1))
    near = refit(logits, batch, max_kl=10.0, num_epochs=50, optimizer=optax.sgd(0.1))
    assert 0.01 <= far.kl < 0.05 and 0 < far.steps < 50 and near.steps == 50 and near.kl > far.kl
    # No gradient where ρ < 1 - ε: the recorded action cannot be driven further away than that.
    gone = refit(
        logits,
        batch_of(np.array([[0, 0, 9]])),
        max_kl=9.0,
        num_epochs=500,
        optimizer=optax.sgd(0.1),
    )
    ratio = jax.nn.softmax(gone.params)[0, 2] / jax.nn.softmax(logits)[0, 2]
    assert 0.6 < ratio < 0.7
    for optimizer in (optax.sgd(1.0), optax.adam(0.1)):
        nothing = refit(
            jnp.where(jnp.ones((1, 3), bool), logits, 0.0),
            batch,
            mask=jnp.zeros(8, bool),
            optimizer=optimizer,
        )
        np.testing.assert_array_equal(nothing.params, logits)
        assert nothing.steps == 0 and nothing.kl == 0
    empty = sampling.ros_refit(tabular, logits, batch, step_size=1.0, mask=jnp.zeros(8, bool))
    np.testing.assert_array_equal(empty, logits)
    spoilt = refit(jnp.asarray([[0.3, -jnp.inf, 0.5]]), batch_of(np.array([[1, 1, 1]])))
    assert spoilt.steps == 0


def test_a_masked_memory_is_the_shorter_one_and_seeds_map():
    logits = jnp.asarray([[0.3, -1.0, 0.5]])
    batch = batch_of(np.array([[7, 0, 1]]))
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full(4, 0, x.dtype)]), batch)
    mask = jnp.arange(12) < 8
    plain, masked = refit(logits, batch), refit(logits, more, mask=mask)
    np.testing.assert_allclose(masked.params, plain.params, atol=1e-6)
    assert masked.steps == plain.steps
    many = jax.jit(jax.vmap(lambda x: refit(x, batch).params))(jnp.stack([logits, 2 * logits]))
    np.testing.assert_allclose(many[0], plain.params, atol=1e-6)
    # A penalty on the distance keeps φ nearer.
    old = jax.nn.log_softmax(logits)

    def divergence(phi, part):
        kl = (jnp.exp(old) * (old - jax.nn.log_softmax(phi))).sum(-1)
        return kl[part[0]]

    held = refit(logits, batch, divergence=divergence, coefficient=5.0, optimizer=optax.sgd(0.05))
    free = refit(logits, batch, optimizer=optax.sgd(0.05))
    assert 0 < held.kl < free.kl


def test_sampling_error_of_tables_and_fits():
    pi = jnp.asarray([[0.5, 0.5], [0.2, 0.8]])
    counts = np.array([[3, 1], [0, 4]])
    wanted = 0.5 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) + 0.5 * np.log(1 / 0.8)
    np.testing.assert_allclose(diagnostics.tabular_sampling_error(counts, pi), wanted, rtol=1e-5)
    assert diagnostics.tabular_sampling_error(np.zeros((2, 2), int), pi) == 0
    impossible = jnp.asarray([[1.0, 0.0], [0.5, 0.5]])
    assert diagnostics.tabular_sampling_error(counts, impossible) == jnp.inf
    # (A - 1) / 2N on average.
    draws = np.random.default_rng(0).multinomial(400, [0.1, 0.2, 0.3, 0.4], size=2000)
    policy = jnp.asarray([[0.1, 0.2, 0.3, 0.4]])
    errors = jax.vmap(lambda c: diagnostics.tabular_sampling_error(c[None], policy))(draws)
    np.testing.assert_allclose(errors.mean(), 3 / 800, rtol=0.05)
    # The fit comes to the table's number, but for the state in which one action is missing.
    counts = np.array([[3, 1], [2, 4]])
    fitted = diagnostics.fitted_sampling_error(
        tabular, jnp.log(pi), batch_of(counts), learning_rate=0.05
    )
    exact = diagnostics.tabular_sampling_error(counts, pi)
    np.testing.assert_allclose(fitted, exact, rtol=1e-3)
    part = diagnostics.fitted_sampling_error(
        tabular,
        jnp.log(pi),
        batch_of(counts),
        learning_rate=0.05,
        mask=batch_of(counts)[0] == 0,
    )
    alone = diagnostics.tabular_sampling_error(counts * [[1], [0]], pi)
    np.testing.assert_allclose(part, alone, rtol=1e-3)
    none = diagnostics.fitted_sampling_error(
        tabular, jnp.log(pi), batch_of(counts), num_steps=3, mask=jnp.zeros(10, bool)
    )
    assert none == 0


def corridor():
    """Five cells, from the middle; 1 at the right end, .5 at the left: nothing is random."""

    def reset(key):
        del key
        return jnp.int32(2), jax.nn.one_hot(2, 5)

    def step(key, state, action):
        del key
        state = state + 2 * action - 1
        reward = jnp.where(state == 4, 1.0, jnp.where(state == 0, 0.5, -0.01))
        there = (state == 0) | (state == 4)
        return envs.Step(state, jax.nn.one_hot(state, 5), reward, there, jnp.bool_(False))

    return envs.Environment(reset, step, envs.Box((5,)), envs.Discrete(2), "corridor")


def table_network(sample):
    """Tables, and a way to sample that is given."""
    return agents.ActorCritic(
        init=lambda key: {"actor": jnp.full((5, 2), 0.1).at[:, 1].set(0), "critic": jnp.zeros(5)},
        actor=lambda params, observation: observation @ params["actor"],
        critic=lambda params, observation: observation @ params["critic"],
        distribution=policies.categorical()._replace(sample=sample),
    )


def test_refits_that_see_nothing_make_it_ppo():
    def alternating(key, logits):
        del key
        return jnp.arange(logits.shape[0], dtype=jnp.int32) % 2  # whatever the key

    options = {"num_envs": 4, "num_steps": 8, "num_epochs": 3, "num_minibatches": 1}
    net = table_network(alternating)
    plain = agents.ppo(corridor(), net, learning_rate=0.05, **options)
    ours = agents.props(corridor(), net, memory=1, refit_every=8, learning_rate=0.05, **options)
    one, metrics = jax.jit(lambda key: agents.train(plain, plain.init(key), num_updates=5))(KEY)
    two, found = jax.jit(lambda key: agents.train(ours, ours.init(key), num_updates=5))(KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.params, two.params
    )
    for name, x in metrics.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    assert np.all(found["refit_steps"] == 0)


def test_the_agent_learns_and_remembers():
    net = table_network(policies.categorical().sample)
    agent = agents.props(
        corridor(),
        net,
        memory=3,
        refit_every=4,
        num_envs=2,
        num_steps=16,
        max_kl=0.1,
        learning_rate=0.05,
        behavior_optimizer=optax.adam(0.05),
    )
    run = jax.jit(lambda state: agents.train(agent, state, num_updates=1))
    state = agent.init(KEY)
    assert not state.filled.any() and state.memory.reward.shape == (3, 16, 2)
    for index in range(4):
        before = state.memory
        state, metrics = run(state)
        assert state.filled.sum(1).tolist() == [16 * (i <= index) for i in range(3)]
        for slot in {0, 1, 2} - {index % 3}:
            np.testing.assert_array_equal(before.action[slot], state.memory.action[slot])
    assert metrics["refit_steps"] > 0 and metrics["behavior_kl"] > 0
    state, metrics = jax.jit(lambda state: agents.train(agent, state, num_updates=60))(state)
    assert metrics["return"][-5:].mean() > 0.95 and agent.steps == 32
    assert agent.act(state, KEY, jnp.eye(5)[1:4]).tolist() == [1, 1, 1]


def test_bad_input():
    logits = jnp.zeros((1, 3))
    batch = batch_of(np.array([[3, 3, 2]]))
    zeros = jnp.zeros(8)
    with pytest.raises(ValueError, match="clip: expected a number in"):
        sampling.props_loss(zeros, zeros, clip=0.0)
    with pytest.raises(ValueError, match="target_logprobs: expected shape"):
        sampling.props_loss(zeros, zeros[:3])
    with pytest.raises(ValueError, match="expected finite numbers"):
        sampling.props_loss(zeros.at[0].set(jnp.nan), zeros)
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        sampling.props_loss(zeros, zeros, mask=zeros)
    with pytest.raises(ValueError, match="max_kl"):
        refit(logits, batch, max_kl=-0.1)
    with pytest.raises(ValueError, match="num_minibatches: expected a divisor of 8, got 3"):
        refit(logits, batch, num_minibatches=3)
    with pytest.raises(ValueError, match="divergence: expected a function"):
        refit(logits, batch, coefficient=0.1)
    with pytest.raises(ValueError, match="mask: expected shape"):
        refit(logits, batch, mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="batch: expected leaves"):
        refit(logits, (jnp.zeros(3), jnp.zeros(4)))
    with pytest.raises(ValueError, match="step_size"):
        sampling.ros_refit(tabular, logits, batch, step_size=0.0)
    with pytest.raises(ValueError, match="counts: expected rank 2"):
        diagnostics.tabular_sampling_error(zeros, zeros)
    with pytest.raises(ValueError, match="policy: expected shape"):
        diagnostics.tabular_sampling_error(jnp.zeros((2, 3)), logits)
    with pytest.raises(ValueError, match="num_steps"):
        diagnostics.fitted_sampling_error(tabular, logits, batch, num_steps=0)
    with pytest.raises(ValueError, match="refit_every: expected a divisor of 16 steps, got 5"):
        agents.props(corridor(), num_steps=16, refit_every=5)
    with pytest.raises(ValueError, match="refit_minibatches: expected a divisor"):
        agents.props(corridor(), num_steps=16, refit_every=16, refit_minibatches=3)
    with pytest.raises(ValueError, match="memory"):
        agents.props(corridor(), memory=0)
