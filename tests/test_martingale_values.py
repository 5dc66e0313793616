"""Values in continuous time: minima and roots by exact expectation, updates by plain loops.

The worked example is Brownian motion on [0, 1] with terminal reward X_1 and the family
J(t, x) = x (1 + θ (1 - t)), right at θ = 0. All objectives are quadratic forms of the path, so
their expectation over Brownian motion is their sum over the columns of a root of its covariance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax import returns, values
from pgjax.envs import sde
from pgjax.values import martingale


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def near(one, other, tolerance=1e-10):
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def brownian_roots(n):
    """`[n, n + 1]`: n paths over which sums of quadratic forms are expectations."""
    t = np.arange(1, n + 1) / n
    root = np.linalg.cholesky(np.minimum(t[:, None], t))
    return np.concatenate([np.zeros((n, 1)), root.T], axis=1)


def family(theta, x):
    n = x.shape[-1] - 1
    return x * (1 + theta * (1 - np.arange(n + 1) / n))


def slopes(x):
    """∇_θ J, with its axis of parameters."""
    return family(1.0, x)[..., None] - x[..., None]


def minimiser(loss):
    """Of a quadratic in one parameter, by one Newton step."""
    return -jax.grad(loss)(0.0) / jax.grad(jax.grad(loss))(0.0)


@pytest.mark.parametrize("n, wanted", [(10, -1.3636), (50, -1.4706), (1000, -1.4985)])
def test_the_mean_square_td_error_has_the_wrong_minimum(n, wanted):
    x, zero = brownian_roots(n), np.zeros((n, n))

    def loss(theta):
        delta = martingale.increments(family(theta, x), zero, dt=1 / n)
        return martingale.mean_square_td_error(delta, dt=1 / n).sum()

    near(minimiser(loss), wanted, 1e-4)
    s, t = 1 - np.arange(1, n + 1) / n, np.arange(n) / n
    near(minimiser(loss), -s.sum() / ((s**2).sum() + t.sum() / n), 1e-8)
    # n times smaller, it is half the quadratic variation of M: ½ ∫ (1 + θ (1 - t))² dt.
    near(loss(-0.5) / n, 0.5 * (1 - 0.5 + 0.25 / 3), 2 / n)


def test_the_martingale_loss_has_the_right_one():
    n = 200
    x, zero = brownian_roots(n), np.zeros((n, n))

    def loss(theta, x=x, zero=zero):
        v = family(theta, x)[..., :-1]
        return martingale.martingale_loss(v, zero, x[..., -1], dt=1 / n).sum()

    near(minimiser(loss), 0.0)
    # By simulation.
    draw = jax.vmap(lambda key: sde.brownian_motion(key, 0.0, num_steps=n, dt=1 / n))
    paths = draw(jax.random.split(jax.random.key(0), 20_000))
    near(minimiser(lambda theta: loss(theta, paths, np.zeros((20_000, n)))), 0.0, 0.03)


def test_the_gradient_of_the_martingale_loss_is_gradient_monte_carlo():
    rng = np.random.default_rng(0)
    v, r, h, dt, rho = rng.normal(size=5), rng.normal(size=5), 1.3, 0.25, 0.4
    g = [
        np.exp(-rho * dt * (5 - i)) * h
        + sum(np.exp(-rho * dt * (j - i)) * r[j] * dt for j in range(i, 5))
        for i in range(5)
    ]
    near(martingale.path_returns(r, h, dt=dt, rho=rho), g)
    loss = martingale.martingale_loss(v, r, h, dt=dt, rho=rho)
    near(loss, 0.5 * np.sum((g - v) ** 2) * dt)
    slope = jax.grad(lambda v: martingale.martingale_loss(v, r, h, dt=dt, rho=rho))(v)
    near(slope, -(g - v) * dt)
    fixed = jax.grad(lambda r: martingale.martingale_loss(v, r, h, dt=dt, rho=rho))(r)
    near(fixed, np.zeros(5))


@pytest.mark.parametrize("theta", [-1.5, 0.0, 0.7])
def test_the_drift_of_ctd_leads_to_the_right_value(theta):
    n = 40
    x, zero = brownian_roots(n), np.zeros((n, n))
    delta = martingale.increments(family(theta, x), zero, dt=1 / n)
    drift = martingale.orthogonality(slopes(x)[:, :-1], delta).sum()
    near(drift, -theta / 6 * (1 - 1 / n**2))
    for lambda_ in (0.5, 1.0):
        z = martingale.trace_test_functions(slopes(x)[:, :-1], lambda_=lambda_, dt=1 / n)
        drift = martingale.orthogonality(z, delta).sum()
        assert np.sign(np.round(drift, 12)) == -np.sign(theta)
    gtd = martingale.gtd_objective(slopes(x)[:, :-1], delta)
    near(gtd, 0.5 * (theta / 6 * (1 - 1 / n**2) / n) ** 2)  # of the mean over n "paths"


def test_clstd_finds_what_the_family_holds():
    n = 30
    x, zero = brownian_roots(n), np.zeros((n, n))
    phi = slopes(x)
    near(values.clstd(phi, zero, dt=1 / n, known=x), [0.0])
    z = martingale.trace_test_functions(phi[:, :-1], lambda_=0.5, dt=1 / n)
    near(values.clstd(phi, zero, dt=1 / n, known=x, test_functions=z), [0.0])
    # dX = -κ X dt, r = X + 2: J = X / (κ + ρ) + 2 / ρ, on Euler's path at any dt.
    kappa, rho, dt = 0.8, 0.3, 0.2
    x = 2.0 * (1 - kappa * dt) ** np.arange(7)
    phi = np.stack([x, np.ones(7)], 1)
    found = values.clstd(phi, x[:-1] + 2, dt=dt, rho=rho)
    near(found, [1 / (kappa + rho), 2 / rho])
    near(found, jax.jit(lambda phi: values.clstd(phi, x[:-1] + 2, dt=dt, rho=rho))(phi))
    delta = martingale.increments(phi @ found, x[:-1] + 2, dt=dt, rho=rho)
    near(delta, np.zeros(6))


def test_traces():
    rng = np.random.default_rng(1)
    g, dt, lambda_ = rng.normal(size=(2, 6, 3)), 0.3, 0.6
    z = np.zeros((2, 3))
    found = martingale.trace_test_functions(g, lambda_=lambda_, dt=dt)
    for i in range(6):
        z = lambda_**dt * z + g[:, i] * dt
        near(found[:, i], z)
    near(martingale.trace_test_functions(g, lambda_=1e-300, dt=1.0), g)


def test_with_unit_steps_it_is_td_lambda():
    """The backward view is the forward one: Σ z δ = Σ ∇J (λ-return - J), trace λγ."""
    rng = np.random.default_rng(2)
    n, gamma, lambda_ = 7, 0.9, 0.7
    rho = -np.log(gamma)
    v, r, g = rng.normal(size=n + 1), rng.normal(size=n), rng.normal(size=(n, 3))
    rates = r * rho / (1 - gamma)  # a rate that pays r in a unit of time
    delta = martingale.exact_increments(v, rates, dt=1.0, rho=rho)
    near(delta, r + gamma * v[1:] - v[:-1])
    z = martingale.trace_test_functions(g, lambda_=gamma * lambda_, dt=1.0)
    target = returns.lambda_returns(r, v[1:], np.full(n, gamma), lambda_=lambda_)
    near(martingale.orthogonality(z, delta), g.T @ (target - v[:-1]))


def test_increments():
    rng = np.random.default_rng(3)
    v, r = rng.normal(size=(2, 5)), rng.normal(size=(2, 4))
    found = martingale.increments(v, r, dt=0.1, rho=0.5)
    near(found, v[:, 1:] - v[:, :-1] + 0.1 * (r - 0.5 * v[:, :-1]))
    near(martingale.exact_increments(v, r, dt=0.1), martingale.increments(v, r, dt=0.1))
    # On a smooth path the two forms part by order dt².
    apart = []
    for dt in (0.02, 0.01):
        v = np.sin(np.arange(5) * dt)
        options = {"dt": dt, "rho": 0.5}
        first = martingale.increments(v, np.ones(4), **options)
        apart.append(np.abs(first - martingale.exact_increments(v, np.ones(4), **options)).max())
    assert 3.8 < apart[0] / apart[1] < 4.2
    near(martingale.increments(np.full(6, 3.0), np.zeros(5), dt=0.1), np.zeros(5), 0)
    one = martingale.increments(np.array([1.0, 4.0]), np.array([2.0]), dt=0.5, rho=0.1)
    near(one, [3 + (2 - 0.1) * 0.5])
    near(martingale.mean_square_td_error(one, dt=0.5), 0.5 * one[0] ** 2 / 0.5)
    near(martingale.martingale_loss(np.ones(1), np.zeros(1), 3.0, dt=0.5), 0.5 * 4 * 0.5)
    many = jax.jit(jax.vmap(lambda v, r: martingale.increments(v, r, dt=0.1, rho=0.5)))
    v = rng.normal(size=(2, 5))
    near(many(v, r), martingale.increments(v, r, dt=0.1, rho=0.5))
    small = martingale.increments(jnp.ones(3, jnp.bfloat16), jnp.ones(2, jnp.bfloat16), dt=0.1)
    assert small.dtype == jnp.float32


def test_gtd_is_the_norm_of_the_expected_update():
    rng = np.random.default_rng(4)
    phi, r, dt = rng.normal(size=(20, 6, 2)), rng.normal(size=(20, 5)), 0.2
    xi = phi[:, :-1]
    gram = martingale.gram_of_test_functions(xi, dt=dt)
    near(gram, sum(np.outer(x, x) for path in xi for x in path) * dt / 20)

    def loss(theta, weight=None):
        delta = martingale.increments(phi @ theta, r, dt=dt, rho=0.3)
        return martingale.gtd_objective(xi, delta, weight=weight)

    theta = np.array([0.4, -0.2])
    delta = np.asarray(martingale.increments(phi @ theta, r, dt=dt, rho=0.3))
    m = np.einsum("kip,ki->p", xi, delta) / 20
    near(loss(theta), 0.5 * m @ m)
    near(loss(theta, np.linalg.inv(gram)), 0.5 * m @ np.linalg.inv(gram) @ m)
    root = values.clstd(phi, r, dt=dt, rho=0.3)
    near(loss(root), 0.0)
    near(jax.grad(loss)(root), np.zeros(2))
    near(jax.grad(lambda xi: martingale.gtd_objective(xi, delta))(xi), np.zeros_like(xi))


def test_learning_along_a_path_is_the_plain_loop():
    rng = np.random.default_rng(5)
    n, dt, rho, alpha, lambda_ = 6, 0.25, 0.3, 0.4, 0.5
    x, r = rng.normal(size=n + 1), rng.normal(size=n)

    def value(params, t, x):
        return params["a"] * x**2 + params["b"] * jnp.exp(-t)

    def loop(decay, gain, end):
        a, b, z, deltas = 0.5, -0.2, np.zeros(2), []
        for i in range(n):
            now = a * x[i] ** 2 + b * np.exp(-i * dt)
            then = a * x[i + 1] ** 2 + b * np.exp(-(i + 1) * dt)
            if end is not None and i == n - 1:
                then = end
            deltas.append(then - now + (r[i] - rho * now) * dt)
            z = decay * z + gain * np.array([x[i] ** 2, np.exp(-i * dt)])
            a, b = np.array([a, b]) + alpha * deltas[-1] * z
        return np.array([a, b]), deltas

    start = {"a": jnp.asarray(0.5), "b": jnp.asarray(-0.2)}
    options = {"learning_rate": alpha, "dt": dt, "rho": rho}
    for end in (None, 0.7):
        found, delta = values.ctd_online(value, start, x, r, terminal=end, **options)
        wanted, deltas = loop(0.0, 1.0, end)
        near([found["a"], found["b"]], wanted)
        near(delta, deltas)
        traced = jax.jit(
            lambda x, end=end: values.ctd_lambda_online(
                value, start, x, r, lambda_=lambda_, terminal=end, **options
            )
        )
        found, delta = traced(x)
        wanted, deltas = loop(lambda_**dt, dt, end)
        near([found["a"], found["b"]], wanted)
        near(delta, deltas)


def test_paths_of_diffusions():
    grid = sde.time_grid(1.0, 0.005)
    assert grid.shape == (201,) and grid[-1] == 1.0
    n, dt, kappa, sigma = 8, 0.25, 0.7, 0.6
    key, options = jax.random.key(0), {"num_steps": n, "dt": dt}
    start = jnp.array([1.0, -2.0])
    # Without drift and with unit noise Euler's scheme is Brownian motion itself.
    same = sde.euler_maruyama(key, lambda t, x: 0 * x, lambda t, x: 1 + 0 * x, start, **options)
    near(same, sde.brownian_motion(key, start, **options))
    still = sde.euler_maruyama(key, lambda t, x: -kappa * x, lambda t, x: 0 * x, start, **options)
    near(still, (1 - kappa * dt) ** np.arange(n + 1)[:, None] * np.asarray(start))
    clock = sde.euler_maruyama(key, lambda t, x: 1 + 0 * x + t, lambda t, x: 0 * x, 0.0, **options)
    near(clock[-1], n * dt + dt**2 * n * (n - 1) / 2)
    keys = jax.random.split(key, 40_000)
    w = jax.vmap(lambda key: sde.brownian_motion(key, 0.0, **options))(keys)
    t = dt * np.arange(n + 1)
    near(np.cov(w, rowvar=False, bias=True), np.minimum(t[:, None], t), 0.05)

    def ou(key, volatility=sigma, start=2.0):
        return sde.ornstein_uhlenbeck(
            key, start, rate=kappa, volatility=volatility, mean=0.5, **options
        )

    x = jax.vmap(ou)(keys)
    near(x.mean(0), 0.5 + 1.5 * np.exp(-kappa * t), 0.01)
    near(x.var(0), sigma**2 * (1 - np.exp(-2 * kappa * t)) / (2 * kappa), 0.01)
    near(ou(key, volatility=0.0), 0.5 + 1.5 * np.exp(-kappa * t))
    near(jax.grad(lambda start: ou(key, start=start)[-1])(2.0), np.exp(-kappa * t[-1]))


@pytest.mark.parametrize(
    "message, call",
    {
        "dt": lambda: martingale.increments(np.ones(3), np.ones(2), dt=0.0),
        "rho": lambda: martingale.increments(np.ones(3), np.ones(2), dt=0.1, rho=-1.0),
        "values: expected shape": lambda: martingale.increments(np.ones(3), np.ones(3), dt=0.1),
        "rewards: expected shape": lambda: martingale.increments(np.ones(1), np.ones(0), dt=0.1),
        "rewards: expected a floating": lambda: martingale.path_returns(
            np.ones(2, int), 0.0, dt=0.1
        ),
        "bootstrap": lambda: martingale.path_returns(np.ones(2), np.ones(3), dt=0.1),
        "values": lambda: martingale.martingale_loss(np.ones(3), np.ones(2), 0.0, dt=0.1),
        "lambda_": lambda: martingale.trace_test_functions(np.ones((2, 1)), lambda_=0.0, dt=0.1),
        "lambda_:": lambda: martingale.trace_test_functions(np.ones((2, 1)), lambda_=1.1, dt=0.1),
        "gradients": lambda: martingale.trace_test_functions(np.ones(2), lambda_=0.5, dt=0.1),
        "test_functions": lambda: martingale.orthogonality(np.ones((3, 1)), np.ones(2)),
        "weight": lambda: martingale.gtd_objective(
            np.ones((3, 1)), np.ones(3), weight=np.ones((2, 2))
        ),
        "features: expected shape": lambda: values.clstd(np.ones((2, 1)), np.ones(2), dt=0.1),
        "features: expected steps": lambda: values.clstd(
            np.ones((3, 2)), np.ones(2), dt=0.1, rho=0.1
        ),
        "test_functions: expected": lambda: values.clstd(
            np.ones((3, 1)), np.ones(2), dt=0.1, test_functions=np.ones((3, 1))
        ),
        "states": lambda: values.ctd_online(
            lambda p, t, x: p * x, 1.0, np.ones(2), np.ones(2), learning_rate=0.1, dt=0.1
        ),
        "learning_rate": lambda: values.ctd_online(
            lambda p, t, x: p * x, 1.0, np.ones(3), np.ones(2), learning_rate=0.0, dt=0.1
        ),
        "lambda_: ": lambda: values.ctd_lambda_online(
            lambda p, t, x: p * x,
            1.0,
            np.ones(3),
            np.ones(2),
            lambda_=0.0,
            learning_rate=0.1,
            dt=0.1,
        ),
        "horizon: expected a multiple": lambda: sde.time_grid(1.0, 0.3),
        "horizon": lambda: sde.time_grid(0.0, 0.1),
        "dt:": lambda: sde.time_grid(1.0, -0.1),
        "num_steps": lambda: sde.brownian_motion(jax.random.key(0), 0.0, num_steps=0, dt=0.1),
        "start": lambda: sde.brownian_motion(jax.random.key(0), 1, num_steps=1, dt=0.1),
        "rate": lambda: sde.ornstein_uhlenbeck(
            jax.random.key(0), 0.0, rate=0.0, volatility=1.0, num_steps=1, dt=0.1
        ),
    }.items(),
)
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_the_room():
    assert pg.values is values and pg.envs.sde is sde
