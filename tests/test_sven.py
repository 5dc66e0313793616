"""Singular value descent, against NumPy's pseudo-inverses and Gauss-Newton."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax.optim import pseudo_inverse, sven

METHODS = list(pseudo_inverse.METHODS)


def system(rows, columns, seed=0, decay=None):
    """A Jacobian and residuals; with `decay`, singular values `decay^i`."""
    rng = np.random.default_rng(seed)
    jac = rng.normal(size=(rows, columns))
    if decay is not None:
        u, s, vt = np.linalg.svd(jac, full_matrices=False)
        jac = (u * decay ** np.arange(len(s))) @ vt
    return jac.astype(np.float32), rng.normal(size=rows).astype(np.float32)


def direction(jac, resid, **options):
    options.setdefault("key", jax.random.key(1))
    return pseudo_inverse.pinv_direction(jnp.asarray(jac), jnp.asarray(resid), **options)


@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method):
    jac, resid = np.array([[1.0, 0, 0], [0, 2, 0]]), np.array([1.0, 2.0])
    found, info = direction(jac, resid, k=2, method=method)
    np.testing.assert_allclose(-found, [-1, -1, 0], atol=1e-6)
    np.testing.assert_allclose(info.singular_values, [2, 1], rtol=1e-6)
    assert info.rank == 2 and float(info.residual_norm) == pytest.approx(5**0.5)


@pytest.mark.parametrize("method", METHODS)
def test_minimum_norm_and_least_squares(method):
    jac, resid = system(6, 20)
    want = jac.T @ np.linalg.solve(jac @ jac.T, resid)
    found, _ = direction(jac, resid, k=6, rtol=0.0, method=method)
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(jac @ found, resid, atol=1e-4)
    jac, resid = system(20, 6)
    want = np.linalg.solve(jac.T @ jac, jac.T @ resid)
    found, _ = direction(jac, resid, k=6, rtol=0.0, method=method)
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_methods_agree_on_a_decaying_spectrum(shape):
    jac, resid = system(*shape, decay=0.7)
    u, s, vt = np.linalg.svd(jac.astype(np.float64), full_matrices=False)
    for k in (5, 10):
        want = (vt[:k].T / s[:k]) @ u[:, :k].T @ resid
        for method in METHODS:
            found, info = direction(jac, resid, k=k, method=method)
            assert np.linalg.norm(found - want) < 1e-3 * np.linalg.norm(want), method
            np.testing.assert_allclose(info.singular_values, s[:k], rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_small_singular_values_are_cut(method):
    jac, resid = system(8, 12, decay=0.3)  # 1, .3, .09, .027, .0081, ...
    found, info = direction(jac, resid, k=8, rtol=0.01, method=method)
    u, s, vt = np.linalg.svd(jac.astype(np.float64), full_matrices=False)
    assert info.rank == 4
    np.testing.assert_allclose(info.singular_values[4:], 0.0)
    want = (vt[:4].T / s[:4]) @ u[:, :4].T @ resid
    assert np.linalg.norm(found - want) < 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("method", METHODS)
def test_rank_one(method):
    jac, resid = system(8, 12, decay=0.5)
    found, _ = direction(jac, resid, k=1, method=method)
    top = np.linalg.svd(jac)[2][0]
    assert abs(found @ top) == pytest.approx(float(jnp.linalg.norm(found)), rel=1e-4)
    # M = σ u vᵀ: gradient descent on ½‖R‖², whose gradient is Mᵀ R, with step 1/σ².
    rng = np.random.default_rng(3)
    u, v = rng.normal(size=5), rng.normal(size=7)
    jac = 3.0 * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    resid = rng.normal(size=5)
    found, _ = direction(jac, resid, k=1, method=method)
    np.testing.assert_allclose(found, jac.T @ resid / 9, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_duplicated_rows_and_zero(method):
    jac, resid = system(5, 12)
    twice, again = np.concatenate([jac, jac]), np.concatenate([resid, resid])
    once, _ = direction(jac, resid, k=5, method=method)
    found, info = direction(twice, again, k=10, method=method)
    np.testing.assert_allclose(found, once, rtol=1e-3, atol=1e-5)
    assert info.rank == 5
    found, info = direction(np.zeros((4, 6)), np.ones(4), k=2, method=method)
    assert not found.any() and info.rank == 0


def linear(params, example):
    x, y = example
    return x @ params["w"] + params["b"] - y


def data(count, size, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.normal(size=count).astype(np.float32))


def test_linear_model_is_solved_in_one_step():
    batch = data(6, 9)
    params = {"w": jnp.ones(9), "b": jnp.zeros(())}
    step = jax.jit(lambda p, b: sven.sven_step(linear, p, b, learning_rate=1.0, k=6, rtol=0.0)[0])
    moved = step(params, batch)
    np.testing.assert_allclose(jax.vmap(linear, (None, 0))(moved, batch), 0, atol=1e-4)
    jac = np.concatenate([np.ones((6, 1)), batch[0]], axis=1)  # leaves by name: b, w
    resid = np.asarray(batch[0]).sum(1) - np.asarray(batch[1])
    want = -np.linalg.pinv(jac) @ resid
    np.testing.assert_allclose(moved["b"], want[0], atol=1e-4)
    np.testing.assert_allclose(moved["w"] - 1, want[1:], atol=1e-4)


def test_gauss_newton_on_a_nonlinear_fit():
    x, y = data(30, 2)

    def residual(params, example):
        return jnp.tanh(example[0] @ params) - example[1]

    params = jnp.array([0.3, -0.2])
    moved, _ = sven.sven_step(residual, params, (x, y), learning_rate=1.0, k=2, rtol=0.0)
    slope = 1 - np.tanh(x @ params) ** 2
    jac = np.asarray(x) * np.asarray(slope)[:, None]
    resid = np.tanh(x @ params) - y
    want = params - np.linalg.lstsq(jac, resid)[0]
    np.testing.assert_allclose(moved, want, rtol=1e-3)


def test_squared_loss_goes_half_way():
    """R = l: the linearised l = 0 is half of a Gauss-Newton step, for one residual exactly."""
    batch = data(1, 3)
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    whole, _ = sven.sven_direction(linear, params, batch)
    squared = sven.loss_residual(lambda p, e: linear(p, e) ** 2)
    half, _ = sven.sven_direction(squared, params, batch)
    np.testing.assert_allclose(half["w"], 0.5 * whole["w"], rtol=1e-5)
    root = sven.loss_residual(lambda p, e: linear(p, e) ** 2, kappa=1.0)
    found, _ = sven.sven_direction(root, params, batch)
    np.testing.assert_allclose(found["w"], whole["w"], rtol=1e-5)
    assert squared(params, (batch[0][0], batch[1][0])) == pytest.approx(
        float(linear(params, (batch[0][0], batch[1][0])) ** 2)
    )


def test_root_of_a_zero_loss_is_an_inert_row():
    root = sven.loss_residual(lambda p, e: (p - e) ** 2, kappa=1.0)
    found, info = sven.sven_direction(root, jnp.float32(1.0), jnp.array([1.0, 3.0]), k=1)
    # Residuals |1 - 1| = 0 and |1 - 3| = 2, slope -1 of the second.
    assert float(found) == pytest.approx(-2.0, rel=1e-5) and info.rank == 1
    assert float(info.residual_norm) == pytest.approx(2.0)


def test_vector_residuals_are_rows():
    rng = np.random.default_rng(0)
    maps = jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32)
    found, info = sven.sven_direction(lambda p, m: m @ p - 1.0, jnp.ones(8), maps, k=6, rtol=0.0)
    flat = np.asarray(maps).reshape(6, 8)
    np.testing.assert_allclose(found, np.linalg.pinv(flat) @ (flat.sum(1) - 1), atol=1e-4)
    assert info.singular_values.shape == (6,)


def test_micro_batches_average_before_the_power():
    x, y = data(6, 9)
    params = {"w": jnp.ones(9), "b": jnp.zeros(())}
    parts = sven.micro_batches((x, y), 2)
    assert parts[0].shape == (3, 2, 9) and parts[1].shape == (3, 2)

    def loss(p, e):
        return linear(p, e) ** 2

    fn = sven.loss_residual(loss, kappa=1.0, mean=True)
    found, info = sven.sven_direction(fn, params, parts, k=3, rtol=0.0)
    resid = np.asarray(jax.vmap(linear, (None, 0))(params, (x, y)))
    root = np.sqrt((resid.reshape(3, 2) ** 2).mean(1))
    jac = np.concatenate([np.ones((6, 1)), x], axis=1)
    rows = (resid[:, None] * jac).reshape(3, 2, -1).mean(1) / root[:, None]
    want = np.linalg.pinv(rows) @ root
    np.testing.assert_allclose(found["b"], want[0], atol=1e-4)
    np.testing.assert_allclose(found["w"], want[1:], atol=1e-4)
    assert float(info.residual_norm) == pytest.approx(float(np.linalg.norm(root)), rel=1e-5)


def test_subset_and_scale_of_parameters():
    x, y = data(4, 9)
    params = {"w": jnp.ones(9), "b": jnp.zeros(())}
    where = sven.parameter_subset(jax.random.key(0), params, 0.6)
    drawn = sven.parameter_subset(jax.random.key(1), jnp.zeros(2000), 0.3)
    assert 0.25 < drawn.mean() < 0.35
    tensors = sven.parameter_subset(jax.random.key(2), params, 0.5, whole=True)
    assert tensors["w"].all() or not tensors["w"].any()
    found, _ = sven.sven_direction(linear, params, (x, y), k=4, rtol=0.0, where=where)
    kept = np.asarray(where["w"])
    assert 4 <= kept.sum() < 9 and not np.asarray(found["w"])[~kept].any()
    jac = np.concatenate([np.ones((4, 1)), x], axis=1)
    resid = np.asarray(x).sum(1) - np.asarray(y)
    moved = np.concatenate([np.reshape(found["b"], 1), found["w"]])
    np.testing.assert_allclose(jac @ moved, resid, atol=1e-3)
    # The shortest solution of those in ‖D step‖: D⁻¹ pinv(M D⁻¹) R.
    scale = np.linspace(1, 3, 10).astype(np.float32)
    tree = {"b": jnp.asarray(scale[0]), "w": jnp.asarray(scale[1:])}
    found, _ = sven.sven_direction(linear, params, (x, y), k=4, rtol=0.0, column_scale=tree)
    want = np.linalg.pinv(jac / scale) @ resid / scale
    np.testing.assert_allclose(found["w"], want[1:], rtol=1e-2, atol=1e-4)


def test_greedy_rank_stops_where_the_loss_rises():
    batch = data(6, 9)
    params = {"w": jnp.ones(9), "b": jnp.zeros(())}
    # On a linear model every singular value helps.
    moved, info = jax.jit(
        lambda p: sven.sven_greedy_step(linear, p, batch, learning_rate=1.0, k=6, rtol=0.0)
    )(params)
    assert info.rank == 6
    np.testing.assert_allclose(jax.vmap(linear, (None, 0))(moved, batch), 0, atol=1e-3)
    # Going ten times too far never helps: nothing moves.
    still, info = sven.sven_greedy_step(linear, params, batch, learning_rate=10.0, k=6)
    assert info.rank == 0
    np.testing.assert_array_equal(still["w"], params["w"])

    # Residuals (2 p, q³ - 1) at p = 1, q = 0.1: the steeper, p, solves; q's step to 33 does not.
    def residual(p, which):
        return jnp.where(which == 0, 2 * p[0], p[1] ** 3 - 1)

    moved, info = sven.sven_greedy_step(
        residual, jnp.array([1.0, 0.1]), jnp.arange(2), learning_rate=1.0, k=2
    )
    assert info.rank == 1
    np.testing.assert_allclose(moved, [0.0, 0.1], atol=1e-5)


def test_direction_goes_through_optax():
    batch = data(6, 9)
    params = {"w": jnp.ones(9, jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    optimizer = optax.chain(optax.scale_by_rms(0.99, 1e-8), optax.scale(-0.1))
    found, _ = sven.sven_direction(linear, params, batch)
    assert found["w"].dtype == jnp.bfloat16 and found["b"].dtype == jnp.float32
    update, _ = optimizer.update(found, optimizer.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda u: jnp.all(jnp.isfinite(u)), update))


def test_bad_input():
    jac, resid = jnp.ones((4, 6)), jnp.ones(4)
    with pytest.raises(ValueError, match="resid: expected one number per sample, got a scalar"):
        direction(jac, jnp.float32(1.0))
    with pytest.raises(ValueError, match="resid: expected one for each of the rows"):
        direction(jac, jnp.ones(3))
    with pytest.raises(ValueError, match="jac: expected rank 2"):
        direction(resid, resid)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        direction(jac, resid, k=0)
    with pytest.raises(ValueError, match="method: expected one of"):
        direction(jac, resid, method="qr")
    with pytest.raises(ValueError, match="rtol"):
        direction(jac, resid, rtol=1.0)
    with pytest.raises(ValueError, match="key: method 'randomized'"):
        direction(jac, resid, method="randomized", key=None)
    with pytest.warns(UserWarning, match="k: 9 is above min"):
        assert direction(jac, resid, k=9)[1].singular_values.shape == (4,)
    params, batch = jnp.ones(6), jnp.ones((4, 6))

    def product(p, x):
        return p @ x

    with pytest.raises(ValueError, match=r"max_bytes: the Jacobian of 4 residuals by 6 .* 96 "):
        sven.sven_step(product, params, batch, max_bytes=95)
    with pytest.raises(ValueError, match="batch: expected leaves with the same number"):
        sven.sven_step(lambda p, e: p @ e[0], params, (batch, jnp.ones(3)))
    with pytest.raises(ValueError, match="batch"):
        sven.sven_step(lambda p, e: p @ batch[0], params, jnp.ones(()))
    with pytest.raises(ValueError, match="loss_fn: expected a scalar per example"):
        sven.sven_step(sven.loss_residual(lambda p, x: p * x), params, batch)
    with pytest.raises(ValueError, match="learning_rate"):
        sven.sven_step(product, params, batch, learning_rate=-0.1)
    with pytest.raises(ValueError, match="kappa"):
        sven.loss_residual(product, kappa=0.0)
    negative = sven.loss_residual(lambda p, x: -1.0 - p @ x, kappa=1.0)
    with pytest.raises(ValueError, match="expected losses >= 0, got -7"):
        negative(params, batch[0])
    with pytest.raises(ValueError, match="residual_fn: expected finite"):
        sven.sven_step(negative, params, batch)
    with pytest.raises(ValueError, match="size: expected a divisor of the batch's 4 examples"):
        sven.micro_batches(batch, 3)
    with pytest.raises(ValueError, match="fraction"):
        sven.parameter_subset(jax.random.key(0), params, 0.0)
    with pytest.raises(ValueError, match="column_scale"):
        sven.sven_step(product, params, batch, column_scale=jnp.ones(5))
