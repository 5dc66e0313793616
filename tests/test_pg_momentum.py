"""Bias-free averages of policy gradients, against enumeration and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax.optim import pg_momentum, points, schedules

MATRIX = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]])


def run(transform, where, gradient, start, steps, rate=0.05):
    """Directions d_t, and the parameters at which each was to be the gradient."""
    state, params, found = transform.init(start), start, []
    for _ in range(steps):
        point = where(state, params)
        d, state = transform.update(gradient(point), state, params)
        found.append((params, d))
        params = jax.tree.map(lambda x, u: x - rate * u / np.linalg.norm(u), params, d)
    return found


def test_igt_has_no_bias_on_a_quadratic():
    with jax.enable_x64(True):
        rates = schedules.igt_schedules(0.1)
        transform = pg_momentum.scale_by_igt(rates.eta)
        start = jnp.array([1.0, -2.0, 0.5])
        found = run(
            transform,
            lambda state, x: pg_momentum.igt_point(state, x, rates.eta),
            lambda x: MATRIX @ x,
            start,
            steps=40,
        )
        for params, d in found:
            np.testing.assert_allclose(d, MATRIX @ params, atol=1e-6)
        # Without the shift of the point the average lags behind.
        plain = run(transform, lambda state, x: x, lambda x: MATRIX @ x, start, steps=40)
        errors = [float(np.linalg.norm(d - MATRIX @ params)) for params, d in plain]
        assert errors[0] == 0 and min(errors[2:]) > 1e-3


def test_igt_with_eta_one_is_the_gradient():
    transform = pg_momentum.scale_by_igt(1.0)
    params = jnp.array([1.0, 2.0])
    state = transform.init(params)
    for gradient in (jnp.array([1.0, -1.0]), jnp.array([0.5, 3.0])):
        np.testing.assert_array_equal(pg_momentum.igt_point(state, params, 1.0), params)
        d, state = transform.update(gradient, state, params)
        np.testing.assert_array_equal(d, gradient)
        params = params + d


def test_point_by_hand():
    transform = pg_momentum.scale_by_igt(0.25)
    state = transform.init({"x": jnp.array([1.0])})
    first = pg_momentum.igt_point(state, {"x": jnp.array([1.0])}, 0.25)
    assert float(first["x"][0]) == 1.0
    _, state = transform.update({"x": jnp.array([2.0])}, state, {"x": jnp.array([1.0])})
    after = {"x": jnp.array([1.5])}
    assert float(pg_momentum.igt_point(state, after, 0.25)["x"][0]) == 1.5 + 3 * 0.5
    d, _ = transform.update({"x": jnp.array([4.0])}, state, after)
    assert float(d["x"][0]) == 0.75 * 2 + 0.25 * 4


def test_harpg_without_a_step_is_momentum():
    transform = pg_momentum.scale_by_harpg(0.1)
    params = jnp.zeros(3)
    state, want = transform.init(params), None
    rng = np.random.default_rng(0)
    for _ in range(5):
        g = rng.normal(size=3).astype(np.float32)
        point, v = pg_momentum.harpg_point(state, params, 0.3)
        np.testing.assert_array_equal(v, 0)
        np.testing.assert_array_equal(point, params)
        d, state = transform.update(jnp.asarray(g), state, params, hvp=jnp.zeros(3))
        want = g if want is None else 0.9 * want + 0.1 * g
        np.testing.assert_allclose(d, want, rtol=1e-6)


REWARDS = np.array([1.0, 0.2, -0.5])
ACTIONS = jnp.arange(3)


def value(theta):
    return jax.nn.softmax(theta) @ jnp.asarray(REWARDS)


def logp(theta):
    return jax.nn.log_softmax(theta)


@jax.jit
def exact_hessian_product(theta, v):
    """Σ_a π(a) B(a) v over the three actions, each a trajectory of one step."""

    def one(action, reward):
        return pg_momentum.trajectory_hvp(lambda t: logp(t)[action][None], reward[None], theta, v)

    return jax.nn.softmax(theta) @ jax.vmap(one)(ACTIONS, jnp.asarray(REWARDS, theta.dtype))


def test_hessian_estimate_is_unbiased():
    with jax.enable_x64(True):
        theta, v = jnp.array([0.3, -1.0, 0.8]), jnp.array([0.5, 0.1, -0.7])
        want = jax.hessian(value)(theta) @ v
        np.testing.assert_allclose(exact_hessian_product(theta, v), want, atol=1e-9)
        weighted = points.score_hvp(logp, jax.nn.softmax(theta) * REWARDS, theta, v)
        np.testing.assert_allclose(weighted, want, atol=1e-9)
        np.testing.assert_allclose(points.hvp(value, theta, v), want, atol=1e-9)


def test_segment_average_is_the_gradients_difference():
    with jax.enable_x64(True):
        before, now = jnp.array([0.3, -1.0, 0.8]), jnp.array([0.9, -0.2, 0.1])
        nodes, weights = np.polynomial.legendre.leggauss(16)
        total = sum(
            w
            / 2
            * exact_hessian_product(points.segment_point(before, now, (x + 1) / 2), now - before)
            for x, w in zip(nodes, weights, strict=True)
        )
        want = jax.grad(value)(now) - jax.grad(value)(before)
        np.testing.assert_allclose(total, want, atol=1e-6)


def test_harpg_in_expectation_is_the_gradient():
    with jax.enable_x64(True):
        rates = schedules.harpg_schedules(0.3)
        transform = pg_momentum.scale_by_harpg(rates.eta)
        params = jnp.array([0.3, -1.0, 0.8])
        state = transform.init(params)
        nodes, weights = np.polynomial.legendre.leggauss(16)

        @jax.jit
        def update(state, params):
            def product(share):
                return exact_hessian_product(*pg_momentum.harpg_point(state, params, share))

            total = weights / 2 @ jax.vmap(product)((nodes + 1) / 2)
            gradient = jax.grad(value)(params)
            return *transform.update(gradient, state, params, hvp=total), gradient

        for step in range(12):
            d, state, gradient = update(state, params)
            np.testing.assert_allclose(d, gradient, atol=1e-9)
            params = params + rates.learning_rate(step) * d


def test_hessian_of_two_step_trajectories():
    """Rewards to go, two steps, a softmax at each: all nine trajectories against autodiff."""
    with jax.enable_x64(True):
        rewards = np.array([[0.4, -1.0, 0.7], [1.3, 0.2, -0.6]])
        theta = jnp.array([[0.1, 0.5, -0.3], [0.9, 0.0, -0.4]])
        v = jnp.array([[0.2, -0.1, 0.4], [0.3, 0.7, -0.2]])
        discount = 0.9

        def objective(t):
            p = jax.nn.softmax(t)
            return p[0] @ rewards[0] + discount * p[1] @ rewards[1]

        actions = jnp.array([(a, b) for a in range(3) for b in range(3)])
        last = discount * jnp.asarray(rewards)[1, actions[:, 1]]
        returns = jnp.stack([jnp.asarray(rewards)[0, actions[:, 0]] + last, last], axis=1)

        def chosen(t, pair):
            return jax.nn.log_softmax(t)[jnp.arange(2), pair]

        def product(pair, weights):
            return pg_momentum.trajectory_hvp(lambda t: chosen(t, pair), weights, theta, v)

        each = jax.vmap(product)(actions, returns)
        chances = np.exp(jax.vmap(functools.partial(chosen, theta))(actions).sum(1))
        want = points.hvp(objective, theta, v)
        np.testing.assert_allclose(np.tensordot(chances, each, 1), want, atol=1e-9)
        batch = pg_momentum.trajectory_hvp(
            lambda t: jax.vmap(functools.partial(chosen, t))(actions), returns, theta, v
        )
        np.testing.assert_allclose(batch, np.mean(each, axis=0), atol=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_normalized_updates_have_the_step_as_their_norm(size):
    rates = schedules.igt_schedules(0.3)
    optimizer = optax.chain(
        pg_momentum.scale_by_igt(rates.eta),
        pg_momentum.normalize_global(),
        optax.scale_by_learning_rate(rates.learning_rate),
    )
    rng = np.random.default_rng(1)
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    state = optimizer.init(params)
    for step in range(4):
        gradient = jax.tree.map(
            lambda p: jnp.asarray(size * rng.normal(size=p.shape), jnp.float32), params
        )
        updates, state = optimizer.update(gradient, state, params)
        norm = np.sqrt(
            sum(np.sum(np.square(u, dtype=np.float64)) for u in jax.tree.leaves(updates))
        )
        assert norm == pytest.approx(0.3 * 2 / (step + 2), rel=1e-6)
        params = optax.apply_updates(params, updates)


def test_zero_and_broken_gradients():
    transform = pg_momentum.normalize_global()
    zero = {"a": jnp.zeros(3), "b": jnp.zeros((0, 2))}
    out, _ = transform.update(zero, transform.init(zero))
    np.testing.assert_array_equal(out["a"], 0)
    broken, _ = transform.update({"a": jnp.array([1.0, jnp.nan])}, transform.init(None))
    assert np.isnan(broken["a"]).all()  # not hidden
    half, _ = pg_momentum.normalize_global(eps=5.0).update({"a": jnp.array([3.0, 4.0])}, None)
    np.testing.assert_allclose(half["a"], [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("build", [pg_momentum.scale_by_igt, pg_momentum.scale_by_harpg])
def test_flat_and_tree_agree_under_jit(build):
    transform = optax.chain(build(0.3), pg_momentum.normalize_global())
    rng = np.random.default_rng(2)
    tree = {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=3)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    update = jax.jit(transform.update)
    states = [transform.init(tree), transform.init(flat)]
    for _ in range(3):
        g, h = (jnp.asarray(rng.normal(size=flat.shape), jnp.float32) for _ in range(2))
        extra = {"hvp": h} if build is pg_momentum.scale_by_harpg else {}
        as_tree = {name: unravel(x) for name, x in extra.items()}
        one, states[0] = update(unravel(g), states[0], tree, **as_tree)
        two, states[1] = update(g, states[1], flat, **extra)
        np.testing.assert_allclose(jax.flatten_util.ravel_pytree(one)[0], two, rtol=1e-6)
        tree, flat = optax.apply_updates(tree, one), flat + two


def test_dtypes_are_kept():
    params = {"x": jnp.ones(2, jnp.bfloat16)}
    transform = pg_momentum.scale_by_harpg(0.5)
    state = transform.init(params)
    for _ in range(2):
        d, state = transform.update(params, state, params, hvp=params)
    assert d["x"].dtype == state.average["x"].dtype == jnp.bfloat16
    assert pg_momentum.igt_point(state, params, 0.5)["x"].dtype == jnp.bfloat16


def test_points_by_hand():
    now, before = {"x": jnp.array([3.0])}, {"x": jnp.array([1.0])}
    assert float(points.lookahead(now, before, 0.5)["x"][0]) == 4.0
    assert float(points.segment_point(before, now, 0.25)["x"][0]) == 1.5
    gradient = {"x": jnp.array([3.0]), "y": jnp.array([4.0])}
    params = {"x": jnp.array([1.0]), "y": jnp.array([2.0])}
    point = points.sam_point(params, gradient, rho=0.5)
    np.testing.assert_allclose([point["x"][0], point["y"][0]], [1.3, 2.4], rtol=1e-6)
    scaled = points.asam_point(params, gradient, rho=0.5)
    norm = np.hypot(3.0, 8.0)
    np.testing.assert_allclose(
        [scaled["x"][0], scaled["y"][0]], [1 + 0.5 * 3 / norm, 2 + 0.5 * 16 / norm], rtol=1e-6
    )
    still = points.sam_point(params, jax.tree.map(jnp.zeros_like, params), rho=0.5)
    assert float(still["x"][0]) == 1.0 and float(still["y"][0]) == 2.0


def test_bad_input():
    params = jnp.ones(2)
    for build in (pg_momentum.scale_by_igt, pg_momentum.scale_by_harpg):
        for eta in (0.0, -0.1, 1.5, lambda count: 0.0 * count):
            with pytest.raises(ValueError, match="eta"):
                build(eta)
        transform = build(0.5)
        extra = {"hvp": params}
        with pytest.raises(ValueError, match="params: expected the present parameters"):
            transform.update(params, transform.init(params), **extra)
        with pytest.raises(ValueError, match="params: expected a tree like the state's previous"):
            transform.update(params, transform.init(params), {"x": params}, **extra)
    transform = pg_momentum.scale_by_harpg(0.5)
    with pytest.raises(ValueError, match="hvp: expected a Hessian-vector product"):
        transform.update(params, transform.init(params), params)
    with pytest.raises(ValueError, match="hvp: expected leaves of the shapes of updates"):
        transform.update(params, transform.init(params), params, hvp=jnp.ones(3))
    with pytest.raises(ValueError, match="previous: expected leaves of the shapes"):
        pg_momentum.igt_point(transform.init(params), jnp.ones(3), 0.5)
    with pytest.raises(ValueError, match="share"):
        pg_momentum.harpg_point(transform.init(params), params, 1.5)
    with pytest.raises(ValueError, match="eps"):
        pg_momentum.normalize_global(-1.0)
    with pytest.raises(ValueError, match="return_weights: expected shape"):
        pg_momentum.trajectory_hvp(logp, jnp.ones(2), jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="rho"):
        points.sam_point(params, params, rho=-0.1)
    with pytest.raises(ValueError, match="v: expected a tree like params"):
        points.hvp(jnp.sum, params, (params,))
