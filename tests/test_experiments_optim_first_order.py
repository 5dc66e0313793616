"""The reproductions run and write what they found; whether claims hold takes their full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import tiny_runs

from experiments import adaptive_batch, gradient_sliding, last_iterate, pg_variance_reduction

NAMES = [
    "pg_variance_reduction",
    "adaptive_batch",
    "last_iterate",
    "acceleration",
    "gradient_sliding",
]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_run(name, tmp_path):
    tiny_runs.run(name, tmp_path)


def test_samples_have_the_true_gradient_on_average():
    config = pg_variance_reduction.Config()
    means = jax.random.uniform(jax.random.key(0), (4, 5))
    theta = jax.random.normal(jax.random.key(1), (4, 5))

    def one(key):
        logp, reward = pg_variance_reduction.draw(config, means, theta, key)
        return reward * jax.grad(logp)(theta)

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 40_000)))
    want = jax.grad(lambda t: pg_variance_reduction.value(means, t))(theta)
    error = draws.std(0) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - want) < 5 * error).all()


def test_powers_are_found():
    x = np.geomspace(1, 1000, 30)
    ys = np.stack([3 * x**-0.4, x**-0.5])
    np.testing.assert_allclose(pg_variance_reduction.exponents(x, ys), [-0.4, -0.5])


def test_least_loss_is_least():
    config = adaptive_batch.Config(samples=300, features=4)
    task = adaptive_batch.problem(config, 0)
    found = scipy.optimize.minimize(
        lambda w: np.logaddexp(0, -task.y * (task.x @ w)).mean(),
        np.zeros(4),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 10_000},
    )
    assert task.least == pytest.approx(found.fun, abs=1e-8)


def test_worst_case_by_hand():
    rows = last_iterate.worst_case(2)
    b = np.sqrt([1, 2]) / (2 * np.sqrt(2))
    np.testing.assert_allclose(rows, [[-b[0], 0], [1 / 16, -b[1]], [1 / 16, 1 / 8]])
    # From 0 all rows tie, and the first is taken; then the last two tie.
    values = last_iterate.worst_case_values(lambda count: jnp.float64(0.5), 2)
    x = 0.5 * np.array([b[0], 0])
    first = (rows @ x).max()
    x = x - 0.5 * rows[1]
    np.testing.assert_allclose(values, [first, (rows @ x).max()], rtol=1e-12)


def test_no_point_is_below_the_least_value():
    config = gradient_sliding.Config(dimension=6, rows=9)
    task = gradient_sliding.problem(config, 1)
    assert float(task.total(task.best)) == pytest.approx(task.least, abs=1e-4)
    rng = np.random.default_rng(0)
    near = task.best + rng.normal(size=(200, 6)) * 10.0 ** rng.uniform(-4, 0, (200, 1))
    with jax.enable_x64(True):
        assert min(float(task.gap(jnp.asarray(x))) for x in near) > -1e-9
