"""TACO: losses and networks against plain arithmetic, and one whole update."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import agents, contrastive, envs
from pgjax.contrastive import TacoOutputs
from pgjax.models import mlp, pixels
from pgjax.models import taco as networks
from pgjax.sampling import replay

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def outputs(size=6, width=4):
    return TacoOutputs(*(drawn(size, width) for _ in range(4)), drawn(size))


def test_losses_are_two_classifications_and_a_regression():
    given, rewards, weight = outputs(), drawn(6), drawn(4, 4)
    found = contrastive.taco_losses(given, rewards, weight)
    for loss, left, right in (
        (found.temporal, given.predicted, given.following),
        (found.view, given.state, given.other_view),
    ):
        logits = np.asarray(left) @ np.asarray(weight) @ np.asarray(right).T
        wanted = np.log(np.exp(logits).sum(1)) - np.diag(logits)
        np.testing.assert_allclose(loss, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.reward, (given.reward - rewards) ** 2, rtol=1e-5)
    constant = TacoOutputs(*(jnp.ones((8, 4)) for _ in range(4)), jnp.zeros(8))
    flat = contrastive.taco_losses(constant, jnp.zeros(8), weight)
    np.testing.assert_allclose(flat.temporal, np.log(8), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = contrastive.taco_losses(jax.tree.map(lambda x: x[:1], given), rewards[:1], weight)
    assert alone.temporal == 0 and alone.view == 0


def test_what_is_looked_for_has_no_gradient():
    given, rewards, weight = outputs(), drawn(6), drawn(4, 4)

    def whole(given, rewards, weight):
        return sum(x.sum() for x in contrastive.taco_losses(given, rewards, weight))

    slopes, of_rewards, of_weight = jax.grad(whole, argnums=(0, 1, 2))(given, rewards, weight)
    assert not slopes.following.any() and not slopes.other_view.any() and not of_rewards.any()
    assert slopes.state.any() and slopes.predicted.any() and slopes.reward.any()
    assert of_weight.any()


def test_masked_rows_are_as_if_they_were_not_there():
    given, rewards, weight = outputs(), drawn(6), drawn(4, 4)
    mask = jnp.array([True, True, False, True, False, True])
    kept = np.flatnonzero(mask)
    found = contrastive.taco_losses(given, rewards, weight, mask=mask)
    alone = contrastive.taco_losses(jax.tree.map(lambda x: x[kept], given), rewards[kept], weight)
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_allclose(a[kept], b, rtol=1e-5)
        assert not a[~mask].any()


def test_codes_of_actions():
    assert [networks.token_size(x) for x in (1, 2, 4, 6)] == [2, 3, 6, 8]
    params = networks.init_actions(jax.random.key(0), 2, length=3)
    actions = drawn(5, 3, 2)
    code = networks.sequence_code(params, actions)
    assert code.shape == (5, 9) and (jnp.abs(code) < 1).all()
    tokens = networks.token(params, actions)
    x = tokens.reshape(5, 9) @ params["sequence"]["kernel"]
    x = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(code, jnp.tanh(x), atol=1e-5)
    assert not np.allclose(code, networks.sequence_code(params, actions[:, ::-1]))  # order counts
    with pytest.raises(ValueError, match="actions: expected 3 of them"):
        networks.sequence_code(params, actions[:, :2])
    with pytest.raises(ValueError, match="length"):
        networks.init_actions(jax.random.key(0), 2, length=0)
    with pytest.raises(ValueError, match="hidden"):
        networks.init_heads(jax.random.key(0), 8, 2, length=3, hidden=0)


RATE, GAMMA, TAU = 0.1, 0.9, 0.25
SMALL = {
    "channels": 2,
    "strides": (2,),
    "feature_size": 4,
    "hidden": 6,
    "pad": 0,
    "noise": (0.0, 0.0),
    "num_envs": 2,
    "num_steps": 2,
    "batch_size": 8,
    "capacity": 40,
    "start_steps": 20,
    "discount": GAMMA,
    "tau": TAU,
}
WORLD = envs.pixels.rendered_point(5, side=8)


def test_an_update_descends_three_losses_one_after_the_other():
    """Derived once more without noise and shifts, the return by a loop."""
    agent = agents.taco(WORLD, optimizer=optax.sgd(RATE), reward_weight=0.5, **SMALL)
    before = jax.jit(agent.init)(jax.random.key(0))
    other = jax.jit(agent.init)(jax.random.key(1)).learner.params["critic"]
    before = before._replace(learner=before.learner._replace(targets={"critic": other}))
    after, metrics = jax.jit(agent.update)(before)
    learn_key = jax.random.split(before.key, 3)[-1]
    sample_key, _ = jax.random.split(jax.random.split(learn_key, 1)[0])
    batch, ok = replay.sample_sequences(
        after.replay,
        sample_key,
        batch_size=8,
        length=3,
        ended=lambda x: x.terminated | x.truncated,
        stride=2,
    )
    assert ok.all() and batch.truncated[:, -1].any()
    params = before.learner.params
    first, last = batch.observation[:, 0], batch.next_observation[:, -1]

    def look(encoder, images):
        return pixels.apply(encoder["image"], images, strides=(2,))

    def act(actor, x):
        return jnp.tanh(
            mlp.apply(actor["mlp"], networks.squashed(actor["state"], x), activation=jax.nn.relu)
        )

    def q(critic, encoder, x, action):
        code = networks.token(encoder["actions"], action)
        both = jnp.concatenate([networks.squashed(critic["state"], x), code], -1)
        return jnp.stack(
            [
                mlp.apply(
                    jax.tree.map(lambda x, i=i: x[i], critic["mlp"]), both, activation=jax.nn.relu
                )[:, 0]
                for i in range(2)
            ]
        )

    gained = sum(GAMMA**k * batch.reward[:, k] for k in range(3))
    later = look(params["encoder"], last)
    y = gained + GAMMA**3 * q(other, params["encoder"], later, act(params["actor"], later)).min(0)

    def critic_loss(parts):
        encoder, critic = parts
        return (
            0.5
            * jnp.mean((q(critic, encoder, look(encoder, first), batch.action[:, 0]) - y) ** 2)
            * 2
        )

    def descended(loss, was):
        return jax.tree.map(lambda x, g: x - RATE * g, was, jax.grad(loss)(was))

    encoder, critic = descended(critic_loss, (params["encoder"], params["critic"]))
    seen = look(params["encoder"], first)  # by the encoder from before the step
    actor = descended(
        lambda a: -q(critic, encoder, seen, act(a, seen)).min(0).mean(), params["actor"]
    )

    def features_loss(parts):
        encoder, heads = parts
        z = networks.squashed(heads["state"], look(encoder, first))
        h = jax.lax.stop_gradient(networks.squashed(heads["state"], look(encoder, last)))
        v = networks.sequence_code(encoder["actions"], batch.action)
        g = networks.joint(heads["next"], z, v)
        total = 0.5 * jnp.mean((networks.joint(heads["reward"], z, v)[:, 0] - gained) ** 2)
        for left, right in ((g, h), (z, jax.lax.stop_gradient(z))):
            logits = left @ heads["weight"] @ right.T
            total += optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)).mean()
        return total

    encoder, heads = descended(features_loss, (encoder, params["heads"]))
    wanted = {"encoder": encoder, "critic": critic, "actor": actor, "heads": heads}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        after.learner.params,
        wanted,
    )
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(
            a, TAU * b + (1 - TAU) * c, rtol=1e-3, atol=1e-4
        ),
        after.learner.targets["critic"],
        critic,
        other,
    )
    assert np.isfinite(metrics["temporal_loss"]) and agent.steps == 4


def test_without_weights_the_heads_stay():
    agent = agents.taco(WORLD, temporal_weight=0.0, view_weight=0.0, reward_weight=0.0, **SMALL)
    before = jax.jit(agent.init)(jax.random.key(0))
    after, metrics = jax.jit(agent.update)(before)
    jax.tree.map(
        np.testing.assert_array_equal, before.learner.params["heads"], after.learner.params["heads"]
    )
    assert "temporal_loss" not in metrics and np.isfinite(metrics["critic_loss"])
    action = agent.act(after, jax.random.key(0), jnp.zeros((3, 8, 8, 1), jnp.uint8))
    assert action.shape == (3, 2) and (jnp.abs(action) <= 1).all()


def test_what_actions_lead_to_tells_more_of_the_next_state_than_another_view():
    """Linear-Gaussian: two numbers follow the actions, two louder ones are new at each step."""
    own = np.random.default_rng(0)
    mixing = jnp.asarray(np.linalg.qr(own.normal(size=(4, 4)))[0], jnp.float32)

    def sample(key, size):
        keys = jax.random.split(key, 6)
        s, a = jax.random.normal(keys[0], (size, 2)), jax.random.normal(keys[1], (size, 2))
        after = 0.8 * s + 0.6 * a + 0.1 * jax.random.normal(keys[2], (size, 2))
        noise = 2.0 * jax.random.normal(keys[3], (2, size, 2))

        def shown(x, noise):
            return jnp.concatenate([x, noise], 1) @ mixing

        view = 0.1 * jax.random.normal(keys[4], (2, size, 4))
        one = shown(s, noise[0])
        return one + view[0], one + view[1], shown(after, noise[1]), a, after

    def trained(temporal):
        params = {
            "encoder": 0.5 * jax.random.normal(jax.random.key(0), (4, 2)),
            "next": 0.5 * jax.random.normal(jax.random.key(1), (4, 2)),
            "weight": jnp.eye(2),
        }

        def loss(params, key):
            one, other, following, a, _ = sample(key, 64)
            z, z_other, h = (x @ params["encoder"] for x in (one, other, following))
            g = jnp.concatenate([z, a], 1) @ params["next"]
            found = contrastive.taco_losses(
                TacoOutputs(z, z_other, g, h, jnp.zeros(64)), jnp.zeros(64), params["weight"]
            )
            return (found.temporal if temporal else found.view).mean()

        adam = optax.adam(1e-2)

        def step(carry, key):
            params, state = carry
            updates, state = adam.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        start = params, adam.init(params)
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(2), 600))[0][0]["encoder"]

    scores = []
    for temporal in (True, False):
        encoder = jax.jit(trained, static_argnums=0)(temporal)
        one, _, _, a, after = sample(jax.random.key(9), 2000)
        x = np.concatenate([one @ encoder, a], 1)
        slope = np.linalg.lstsq(x[:1000], np.asarray(after[:1000]), rcond=None)[0]
        missed = np.square(after[1000:] - x[1000:] @ slope).sum()
        scores.append(1 - missed / np.square(after[1000:] - after[1000:].mean(0)).sum())
    assert scores[0] > 0.9 and scores[0] > scores[1] + 0.1, scores


def test_bad_input():
    given, rewards = outputs(), drawn(6)
    with pytest.raises(ValueError, match="rewards: expected shape"):
        contrastive.taco_losses(given, drawn(5), drawn(4, 4))
    with pytest.raises(ValueError, match="weight: expected shape"):
        contrastive.taco_losses(given, rewards, drawn(4, 3))
    with pytest.warns(UserWarning, match="one pair"):
        contrastive.taco_losses(jax.tree.map(lambda x: x[:1], given), rewards[:1], drawn(4, 4))
    with pytest.raises(ValueError, match="NaN"):
        contrastive.taco_losses(
            given._replace(predicted=jnp.full((6, 4), jnp.nan)), rewards, drawn(4, 4)
        )
    with pytest.raises(ValueError, match="length"):
        agents.taco(WORLD, length=0)
    with pytest.raises(ValueError, match="view_weight"):
        agents.taco(WORLD, view_weight=-1.0)
    with pytest.raises(ValueError, match="expected images"):
        agents.taco(envs.control.point_mass())
    with pytest.raises(ValueError, match=r"expected a vector in \[-1, 1\]"):
        agents.taco(envs.Environment(None, None, WORLD.observation, envs.Box((2,))))
    with pytest.raises(ValueError, match="too few"):
        agents.taco(WORLD)
