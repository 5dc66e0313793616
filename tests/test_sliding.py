"""Gradient sliding: its limits, its inner problem by brute force, counts, and convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from pgjax.optim import sliding
from pgjax.optim import smoothed_sliding as fast

RNG = np.random.default_rng(0)
VALUES = np.array([0.0, 0.5, 3.0, 10.0])
ROWS = RNG.normal(size=(6, 4))
TARGET = RNG.normal(size=6)
SHIFT = RNG.normal(size=4)
MU, L = 1.0, 10.0


def prox(v, w, mu=MU):
    """Of χ = μ/2 ‖u‖²."""
    return w * v / (w + mu)


def grad_f(x):
    return VALUES * x - SHIFT


def subgrad_h(x):
    return jnp.sign(ROWS @ x - TARGET) @ ROWS / 6


def total(x):
    x = np.asarray(x)
    smooth = 0.5 * x @ (VALUES * x) - SHIFT @ x
    return smooth + np.abs(ROWS @ x - TARGET).mean() + MU / 2 * x @ x


def optimum():
    """The least value, by a smooth program with a bound for each absolute value."""
    start = np.concatenate([np.zeros(4), np.abs(TARGET)])
    found = scipy.optimize.minimize(
        lambda z: (
            0.5 * z[:4] @ (VALUES * z[:4]) - SHIFT @ z[:4] + MU / 2 * z[:4] @ z[:4] + z[4:].mean()
        ),
        start,
        constraints=[
            {"type": "ineq", "fun": lambda z, s=s: z[4:] - s * (ROWS @ z[:4] - TARGET)}
            for s in (1, -1)
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return total(found.x[:4])


def test_rate():
    gamma = sliding.sliding_rate(1.0, 100.0)
    assert gamma == pytest.approx(0.095125, abs=5e-7)
    assert 100 * gamma**2 == pytest.approx(1 - gamma, rel=1e-12)
    schedule = sliding.restart_free(1.0, 100.0)(3)
    np.testing.assert_allclose(schedule.beta, 9.51249, rtol=1e-6)
    # Telescoping needs these of β.
    assert (schedule.beta <= (schedule.beta + 1) * (1 - schedule.gamma) * (1 + 1e-12)).all()
    tiny = sliding.sliding_rate(1e-12, 1.0)
    assert tiny == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize("inner0", [2.0, 0.3])
def test_counts(inner0):
    policy = sliding.restart_free(MU, L, inner0=inner0)
    gamma = sliding.sliding_rate(MU, L)
    want = [max(1, int(np.ceil(inner0 * (1 - gamma) ** -k))) for k in range(1, 13)]
    assert policy(12).inner.tolist() == want
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return grad_f(x)

    _, trace = sliding.gradient_sliding(
        counted, subgrad_h, prox, jnp.zeros(4), policy=policy, n_outer=12
    )
    jax.effects_barrier()
    assert len(calls) == trace.gradients[-1] == 12
    assert trace.inner[-1] == sum(want) and trace.metric is None


def test_lan_steps_by_hand():
    schedule = sliding.lan_convex(2.0, 3.0, 0.5)(4)
    np.testing.assert_allclose(schedule.gamma, [1, 2 / 3, 1 / 2, 2 / 5])
    np.testing.assert_allclose(schedule.beta, [4, 2, 4 / 3, 1])
    assert schedule.inner.tolist() == [18, 72, 162, 288]
    assert sliding.lan_convex(2.0, 0.0, 0.5)(3).inner.tolist() == [1, 1, 1]


def test_inner_step_is_the_minimiser():
    """The first two inner steps, each against a numerical minimiser; T = 1 returns the step."""
    x, g, beta = np.array([0.3, -0.5, 1.0, 0.2]), np.array([1.0, 0.3, -0.4, 2.0]), 1.7
    slide = functools.partial(
        sliding.prox_sliding, jnp.asarray(g), subgrad_h, prox, jnp.asarray(x), beta=beta
    )

    def best(u, p):
        slope = g + np.asarray(subgrad_h(u))

        def objective(z):
            pull = beta / 2 * np.sum((z - x) ** 2) + beta * p / 2 * np.sum((z - u) ** 2)
            return slope @ z + pull + MU / 2 * z @ z

        return scipy.optimize.minimize(objective, np.zeros(4), tol=1e-14).x

    first = best(x, 0.5)
    u, average = slide(inner=1)
    np.testing.assert_allclose(u, first, atol=1e-5)
    np.testing.assert_array_equal(average, u)
    second = best(first, 1.0)
    u, average = slide(inner=2)
    np.testing.assert_allclose(u, second, atol=1e-5)
    np.testing.assert_allclose(average, 0.4 * first + 0.6 * second, atol=1e-5)


def test_without_h_it_is_nesterov():
    """One inner step and h = 0: an accelerated method written out on its own, at the rate 1 - γ."""
    with jax.enable_x64(True):
        gamma, steps = sliding.sliding_rate(MU, L), 40
        policy = sliding.restart_free(MU, L, inner0=1e-9)
        x0 = jnp.ones(4)
        found, trace = sliding.gradient_sliding(
            grad_f, jnp.zeros_like, prox, x0, policy=policy, n_outer=steps, metric=lambda x: x
        )
        assert trace.inner[-1] == steps
        beta = L * gamma
        x, average = np.ones(4), np.ones(4)
        for _ in range(steps):
            slope = np.asarray(grad_f((1 - gamma) * average + gamma * x))
            # argmin <slope, u> + (3/2) β/2 ‖u - x‖² + μ/2 ‖u‖², since p_1 = 1/2 and u_0 = x.
            x = (1.5 * beta * x - slope) / (1.5 * beta + MU)
            average = (1 - gamma) * average + gamma * x
        np.testing.assert_allclose(found, average, rtol=1e-9)
        best = SHIFT / (VALUES + MU)
        gaps = [
            0.5 * (np.asarray(x) - best) @ ((VALUES + MU) * (np.asarray(x) - best))
            for x in trace.metric
        ]
        slope = np.polyfit(np.arange(10, steps), np.log(gaps[10:]), 1)[0]
        assert slope < 0.8 * np.log(1 - gamma)


def test_without_f_it_is_the_averaged_subgradient_method():
    x = np.array([0.5, -1.0, 0.0, 2.0])
    beta, inner = 0.8, 30
    u, average = x.copy(), np.zeros(4)
    weights = 0.0
    for t in range(1, inner + 1):
        p = t / 2
        slope = np.asarray(subgrad_h(u), np.float64)
        u = (beta * x + beta * p * u - slope) / (beta * (1 + p) + MU)
        average, weights = average + (t + 1) * u, weights + t + 1
    found, steady = sliding.prox_sliding(
        jnp.zeros(4), subgrad_h, prox, jnp.asarray(x, jnp.float32), beta=beta, inner=inner
    )
    np.testing.assert_allclose(found, u, rtol=1e-4, atol=1e-5)
    # The averaging weights θ amount to weights t + 1.
    np.testing.assert_allclose(steady, average / weights, rtol=1e-4, atol=1e-5)


def test_gap_falls_to_a_millionth():
    with jax.enable_x64(True):
        best = optimum()
        policy = sliding.restart_free(MU, L)
        _, trace = sliding.gradient_sliding(
            grad_f,
            subgrad_h,
            prox,
            jnp.zeros(4),
            policy=policy,
            n_outer=40,
            metric=lambda x: x,
        )
        gaps = np.array([total(x) for x in trace.metric]) - best
        every_ten = gaps[9::10]
        assert (np.diff(every_ten) < 0).all() and every_ten[-1] < 1e-6
        assert gaps.min() > -1e-9


def test_accelerated_reaches_the_same():
    def dual(v, eta):
        return jnp.clip((v - TARGET) / eta, -1 / 6, 1 / 6)

    with jax.enable_x64(True):
        best = optimum()
        _, trace = fast.accelerated_sliding(
            grad_f,
            lambda u: ROWS @ u,
            lambda y: y @ ROWS,
            dual,
            prox,
            jnp.zeros(4),
            mu=MU,
            smoothness=L,
            operator_norm=float(np.linalg.norm(ROWS, 2)),
            eta0=10.0,
            n_outer=60,
            metric=lambda x: x,
        )
        gaps = np.array([total(x) for x in trace.metric]) - best
        assert (np.diff(gaps[9::10]) < 0).all() and gaps[-1] < 1e-6
        gamma = sliding.sliding_rate(MU, L)
        eta = 10 * (1 - gamma) ** np.arange(1, 61)
        ratio = np.linalg.norm(ROWS, 2) ** 2 / (eta * (L * gamma + MU))
        np.testing.assert_array_equal(trace.inner, np.cumsum(np.ceil(2 * np.sqrt(ratio + 1))))


def test_noise_trees_and_jit():
    """Noisy subgradients need a key; trees, jit and vmap work, and keys differ by step."""
    policy = sliding.restart_free(MU, L)

    def noisy(u, key):
        return {"x": subgrad_h(u["x"]) + jax.random.normal(key, (4,))}

    def run(key):
        found, _ = sliding.gradient_sliding(
            lambda u: {"x": grad_f(u["x"])},
            noisy,
            lambda v, w: jax.tree.map(lambda z: prox(z, w), v),
            {"x": jnp.zeros(4)},
            policy=policy,
            n_outer=15,
            key=key,
        )
        return found["x"]

    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 3))
    assert found.shape == (3, 4) and np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 1e-3
    keys = []

    def spy(u, key):
        jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return jnp.zeros_like(u)

    sliding.gradient_sliding(
        grad_f, spy, prox, jnp.zeros(4), policy=policy, n_outer=4, key=jax.random.key(1)
    )
    jax.effects_barrier()
    assert len(set(keys)) == len(keys) == policy(4).inner.sum()


def test_long_inner_loops_do_not_overflow():
    u, average = sliding.prox_sliding(
        jnp.float32(0), lambda u: jnp.sign(u), prox, jnp.float32(1), beta=1.0, inner=70_000
    )
    assert abs(float(u)) < 1e-3 and abs(float(average)) < 1e-3


def test_bad_input():
    run = functools.partial(sliding.gradient_sliding, grad_f, subgrad_h, x0=jnp.zeros(4), n_outer=3)
    policy = sliding.restart_free(MU, L)
    for mu, smoothness, name in (
        (0.0, 1.0, "mu"),
        (-1.0, 1.0, "mu"),
        (1.0, 0.0, "smoothness"),
        (1.0, float("inf"), "smoothness"),
    ):
        with pytest.raises(ValueError, match=name):
            sliding.restart_free(mu, smoothness)
    with pytest.raises(ValueError, match="inner0"):
        sliding.restart_free(MU, L, inner0=0.0)
    with pytest.raises(ValueError, match="distance"):
        sliding.lan_convex(L, 1.0, 0.0)
    with pytest.raises(ValueError, match="lipschitz"):
        sliding.lan_convex(L, -1.0, 1.0)
    with pytest.raises(ValueError, match="prox_chi: expected finite values"):
        run(prox_chi=lambda v, w: v / 0.0, policy=policy)
    for n_outer in (0, 2.5):
        with pytest.raises(ValueError, match="n_outer"):
            run(prox_chi=prox, policy=policy, n_outer=n_outer)
    for capped, number in (
        (sliding.restart_free(MU, L, most_inner=50), 40),
        (sliding.restart_free(MU, L), 5000),  # beyond what a float can hold
        (sliding.lan_convex(1.0, 1.0, 1.0, most_inner=50), 10),
    ):
        with pytest.raises(ValueError, match=r"n_outer: expected at most .* inner steps"):
            run(prox_chi=prox, policy=capped, n_outer=number)
    with pytest.raises(ValueError, match="beta"):
        sliding.prox_sliding(jnp.zeros(4), subgrad_h, prox, jnp.zeros(4), beta=0.0, inner=1)
    with pytest.raises(ValueError, match="inner"):
        sliding.prox_sliding(jnp.zeros(4), subgrad_h, prox, jnp.zeros(4), beta=1.0, inner=0)
    good = {"mu": MU, "smoothness": L, "operator_norm": 1.0, "eta0": 1.0, "n_outer": 3}
    for bad in (
        {"mu": 0.0},
        {"smoothness": -1.0},
        {"operator_norm": 0.0},
        {"eta0": 0.0},
        {"inner_factor": 0.0},
        {"n_outer": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fast.accelerated_sliding(
                grad_f, lambda u: u, lambda u: u, lambda v, e: v, prox, jnp.zeros(4), **good | bad
            )
