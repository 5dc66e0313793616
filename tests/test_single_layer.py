"""One attention layer that flattens its sequence, against NumPy and its own error bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models import single_layer


def sequences(count=200, tokens=3, features=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(count, tokens, features))


def flattening_error(beta, dtype):
    x = jnp.asarray(sequences(), dtype)
    attention = single_layer.routing_attention_params(tokens=3, features=2, beta=beta)
    slots = single_layer.attention_slots(attention, x)
    heads = slots[..., 2:8]
    flat = x.reshape(-1, 1, 6)
    np.testing.assert_allclose(slots[..., :2], x, rtol=1e-6)
    np.testing.assert_array_equal(slots[..., 8:], np.broadcast_to(np.eye(3), (200, 3, 3)))
    return float(jnp.abs(heads - flat).max())


def test_heads_flatten_the_sequence():
    bound = 2 * 2 * np.exp(-10.0)
    found = flattening_error(10.0, jnp.float32)
    assert 2e-5 < found <= bound
    with jax.enable_x64(True):
        assert flattening_error(30.0, jnp.float64) < 1e-12


def test_weights_by_hand():
    x = jnp.asarray(sequences(), jnp.float32)
    for beta in (0.0, 1.5):
        attention = single_layer.routing_attention_params(tokens=3, features=2, beta=beta)
        weights = single_layer.attention_weights(attention, x)
        assert weights.shape == (200, 3, 3, 3)  # heads, then queries, then keys
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
        want = (np.exp(beta * np.eye(3)) / (np.exp(beta) + 2))[:, None]
        np.testing.assert_allclose(weights, np.broadcast_to(want, weights.shape), rtol=1e-5)
    attention = single_layer.routing_attention_params(tokens=3, features=2, beta=0.0)
    heads = single_layer.attention_slots(attention, x)[..., 2:8].reshape(200, 3, 3, 2)
    mean = np.asarray(x).mean(1)[:, None, None]
    np.testing.assert_allclose(heads, np.broadcast_to(mean, heads.shape), rtol=1e-5)


def test_layer_against_numpy():
    params = single_layer.single_layer_init(
        jax.random.key(0), tokens=3, features=2, width=5, outputs=2, heads=4
    )
    params["attention"]["query_bias"] = jax.random.normal(jax.random.key(1), (4, 3))
    x = sequences(count=6)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row, found in zip(x, jax.jit(single_layer.single_layer_apply)(params, x), strict=True):
        inputs = np.concatenate([row, np.eye(3)], axis=1)
        slots = [row]
        for h in range(4):
            query = inputs @ p["attention"]["query"][h] + p["attention"]["query_bias"][h]
            scores = query @ (inputs @ p["attention"]["key"][h]).T
            weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            slots.append(weights @ inputs @ p["attention"]["value"][h])
        z = np.concatenate([*slots, np.eye(3)], axis=1)
        hidden = np.maximum(z @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        np.testing.assert_allclose(found, hidden @ p["output"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_equivariance_needs_absent_positions(positions):
    params = single_layer.single_layer_init(
        jax.random.key(0), tokens=3, features=2, width=16, positions=positions
    )
    x = jnp.asarray(sequences(), jnp.float32)
    order = np.array([2, 0, 1])
    apply = jax.jit(lambda x: single_layer.single_layer_apply(params, x, positions=positions))
    gap = np.abs(apply(x[:, order]) - apply(x)[:, order]).max()
    assert (gap > 0.05) if positions else (gap < 1e-6)


def test_only_targets_of_other_tokens_need_attention():
    x = jnp.asarray(sequences(1500), jnp.float32)
    train, test = x[:1000], x[1000:]
    params = single_layer.single_layer_init(jax.random.key(0), tokens=3, features=2, width=256)
    blind = single_layer.routing_attention_params(tokens=3, features=2, beta=0.0)
    blind["value"] = jnp.zeros_like(blind["value"])
    routed = single_layer.routing_attention_params(tokens=3, features=2)

    @functools.partial(jax.jit, static_argnums=1)
    def error(attention, target):
        """Relative to the target's standard deviation."""

        def units(x):
            slots = single_layer.attention_slots(attention, x)
            return single_layer.hidden_units(params["hidden"], slots).reshape(-1, 256)

        output = single_layer.random_feature_fit(units(train), target(train).reshape(-1, 1))
        found = units(test) @ output["kernel"] + output["bias"]
        wanted = target(test).reshape(-1, 1)
        return jnp.sqrt(jnp.mean((found - wanted) ** 2)) / jnp.std(wanted)

    def own(x):
        return jnp.sin(3 * x[..., 0]) * x[..., 1]

    def others(x):
        return jnp.broadcast_to(jnp.sin(3 * x[..., 0]).mean(-1, keepdims=True), x.shape[:-1])

    assert error(blind, own) < 0.15 and error(blind, own) <= error(routed, own)
    # Of three equal parts a token sees one: √(2/3) of the deviation is the best there is.
    assert float(error(blind, others)) == pytest.approx((2 / 3) ** 0.5, rel=0.03)
    assert error(routed, others) < 0.6


def test_fit_is_ridge_regression():
    rng = np.random.default_rng(0)
    units, targets = rng.normal(size=(50, 4)) + 1, rng.normal(size=(50, 2))
    found = single_layer.random_feature_fit(jnp.asarray(units), jnp.asarray(targets), ridge=0.1)
    size = units.var(0).sum()
    # The same by rows appended to a least squares problem.
    extra = np.sqrt(50 * 0.1 * size) * np.eye(4)
    rows = np.concatenate([units - units.mean(0), extra])
    want = np.linalg.lstsq(rows, np.concatenate([targets - targets.mean(0), np.zeros((4, 2))]))[0]
    np.testing.assert_allclose(found["kernel"], want, rtol=1e-4, atol=1e-5)
    bias = targets.mean(0) - units.mean(0) @ want
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-4, atol=1e-5)
    dead = single_layer.random_feature_fit(jnp.zeros((50, 4)), jnp.asarray(targets))
    np.testing.assert_allclose(dead["kernel"], 0.0)
    np.testing.assert_allclose(dead["bias"], targets.mean(0), rtol=1e-5)


def test_bad_input():
    for name in ("tokens", "features"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            single_layer.routing_attention_params(**{"tokens": 3, "features": 2, name: 0})
    with pytest.raises(ValueError, match="beta"):
        single_layer.routing_attention_params(tokens=3, features=2, beta=-1.0)
    sizes = {"tokens": 3, "features": 2, "width": 4}
    for name in ("width", "outputs", "heads"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            single_layer.single_layer_init(jax.random.key(0), **{**sizes, name: 0})
    params = single_layer.single_layer_init(jax.random.key(0), **sizes)
    for shape in ((4, 2), (3, 3), (2,), (5, 2, 3)):
        with pytest.raises(ValueError, match="x: expected"):
            single_layer.single_layer_apply(params, jnp.ones(shape))
    with pytest.raises(ValueError, match="x: expected a floating"):
        single_layer.single_layer_apply(params, jnp.ones((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="slots: expected last axis 11"):
        single_layer.hidden_units(params["hidden"], jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="ridge"):
        single_layer.random_feature_fit(jnp.ones((3, 2)), jnp.ones((3, 1)), ridge=0.0)
    with pytest.raises(ValueError, match="targets: expected one row for each"):
        single_layer.random_feature_fit(jnp.ones((3, 2)), jnp.ones((2, 1)))
