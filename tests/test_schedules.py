"""Step-size sequences and mirror steps, against their formulas and a numerical minimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from pgjax.optim import mirror, schedules


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_linear(total):
    found = np.array([schedules.last_iterate_linear(0.3, total)(t) for t in range(total)])
    want = [0.3 * (total - t) / total**1.5 for t in range(total)]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert found[-1] == pytest.approx(0.3 / total**1.5) and found[-1] > 0
    assert found.sum() == pytest.approx(0.3 * (total + 1) / (2 * total**0.5), rel=1e-5)
    late = schedules.last_iterate_linear(0.3, total)(jnp.array([total, total + 5]))
    np.testing.assert_allclose(late, 0.3 / total**1.5, rtol=1e-6)


def test_smoothness_caps_the_step():
    for schedule in (
        schedules.last_iterate_linear(5.0, 10, smoothness=4.0),
        schedules.last_iterate_sqrt(5.0, smoothness=4.0),
    ):
        assert float(schedule(0)) == pytest.approx(1 / 8)
    assert float(schedules.last_iterate_sqrt(5.0, smoothness=4.0)(9999)) == pytest.approx(0.05)
    assert float(schedules.last_iterate_sqrt(1.0)(3)) == pytest.approx(0.5)


@pytest.mark.parametrize("kappa", [0.0, 3.0])
@pytest.mark.parametrize("total", [1, 9, 10])
def test_strongly_convex(kappa, total):
    mu = 0.5
    one = schedules.strongly_convex_decay(mu, kappa)
    two = schedules.strongly_convex_decay(mu, kappa, variant=2)
    phases = schedules.strongly_convex_two_phase(mu, kappa, total)
    half = -(-total // 2)
    for count in range(total):
        t = count + 1
        assert float(one(count)) == pytest.approx(1 / (mu * (t + 2 * kappa)))
        assert float(two(count)) == pytest.approx(2 / (mu * (t + 1 + 4 * kappa)))
        want = 1 / (mu * (1 + 2 * kappa))
        if t > half:
            want = 2 / (mu * (t - half + 2 + 4 * kappa))
        assert float(phases(count)) == pytest.approx(want)
    values = np.array([phases(count) for count in range(total)])
    assert (values > 0).all() and (np.diff(values) <= 0).all()
    # Where the second phase starts, steps fall by one term of its sequence, no more.
    ratios = values[1:] / values[:-1]
    assert (ratios >= (2 + 4 * kappa) / (3 + 4 * kappa) - 1e-6).all()


def test_policy_gradient_schedules():
    count = jnp.arange(50)
    q = 2 / (np.arange(50) + 2)
    for build, step, weight in (
        (schedules.igt_schedules, 1.0, 0.8),
        (schedules.normalized_harpg_schedules, 1.0, 1.0),
        (schedules.harpg_schedules, 0.5, 1.0),
        (schedules.normalized_momentum_schedules, 1.0, 2 / 3),
        (schedules.plain_gradient_schedules, 2 / 3, 0.0),
    ):
        rates = build(0.7)
        np.testing.assert_allclose(rates.learning_rate(count), 0.7 * q**step, rtol=1e-5)
        np.testing.assert_allclose(rates.eta(count), q**weight, rtol=1e-5)
        assert float(rates.eta(0)) == 1.0


def test_in_optax_under_jit():
    optimizer = optax.sgd(schedules.last_iterate_linear(1.0, 4))
    params = jnp.array([1.0])
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for count in range(5):
        u, state = update(jnp.array([1.0]), state, params)
        assert float(u[0]) == pytest.approx(-max(4 - count, 1) / 8)


def test_simplex_step():
    x, g = jnp.array([0.2, 0.5, 0.3]), jnp.array([1.0, -2.0, 0.4])
    same = mirror.mirror_step(x, jnp.full(3, 7.0), 0.9, geometry="simplex")
    np.testing.assert_allclose(same, x, rtol=1e-5)
    found = mirror.mirror_step(x, g, 0.9, geometry="simplex")
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    # The natural-gradient step of a softmax policy moves its logits by the gradient itself.
    logits = np.log(x) - 0.9 * np.asarray(g)
    want = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found, want, rtol=1e-5)

    def objective(z):
        u = np.exp(z) / np.exp(z).sum()
        return u @ np.asarray(g, float) + np.sum(u * np.log(u / np.asarray(x, float))) / 0.9

    best = scipy.optimize.minimize(objective, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(found, np.exp(best) / np.exp(best).sum(), atol=1e-4)


def test_simplex_step_keeps_zeros_and_survives_large_gradients():
    x = jnp.array([[0.0, 0.4, 0.6], [0.2, 0.3, 0.5]])
    g = jnp.array([[-1e6, 0.0, 0.0], [1e4, 0.0, -1e4]])
    found = jax.jit(lambda x, g: mirror.mirror_step(x, g, 1.0, geometry="simplex"))(x, g)
    np.testing.assert_allclose(found, [[0.0, 0.4, 0.6], [0.0, 0.0, 1.0]], atol=1e-6)
    slope = jax.grad(lambda x: mirror.mirror_step(x, g, 1e-3, geometry="simplex")[0, 1])(x)
    assert np.isfinite(slope).all()


def test_euclidean_steps():
    x, g = jnp.array([0.3, -2.0]), jnp.array([0.0, 1.0])
    np.testing.assert_allclose(mirror.mirror_step(x, g, 0.5), [0.3, -2.5])

    def shrink(u, lr):
        return mirror.soft_threshold(u, 1.0 * lr)

    found = mirror.mirror_step(x, g, 0.5, prox=shrink)
    np.testing.assert_allclose(found, [0.0, -2.0])
    assert float(found[0]) == 0.0

    def project(u, lr):
        return optax.projections.projection_l2_ball(u, 1.0)

    inside = mirror.mirror_step(x, g, 0.5, prox=project)
    np.testing.assert_allclose(inside, np.array([0.3, -2.5]) / np.hypot(0.3, 2.5), rtol=1e-6)


def test_bad_input():
    for base in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="base"):
            schedules.last_iterate_linear(base, 10)
        with pytest.raises(ValueError, match="base"):
            schedules.last_iterate_sqrt(base)
    for total in (0, -3, 2.5):
        with pytest.raises(ValueError, match="total"):
            schedules.last_iterate_linear(1.0, total)
        with pytest.raises(ValueError, match="total"):
            schedules.strongly_convex_two_phase(1.0, 0.0, total)
    with pytest.raises(ValueError, match="smoothness"):
        schedules.last_iterate_linear(1.0, 10, smoothness=0.0)
    for mu in (0.0, -1.0):
        with pytest.raises(ValueError, match="mu"):
            schedules.strongly_convex_decay(mu)
        with pytest.raises(ValueError, match="mu"):
            schedules.strongly_convex_two_phase(mu, 0.0, 10)
    with pytest.raises(ValueError, match="kappa"):
        schedules.strongly_convex_decay(1.0, -1.0)
    with pytest.raises(ValueError, match="variant"):
        schedules.strongly_convex_decay(1.0, variant=3)
    with pytest.raises(ValueError, match="gamma0"):
        schedules.igt_schedules(0.0)
    good = jnp.array([0.5, 0.5])
    for x in ([0.5, 0.6], [-0.1, 1.1]):
        with pytest.raises(ValueError, match="x: expected points of the simplex"):
            mirror.mirror_step(jnp.array(x), good, 0.1, geometry="simplex")
    with pytest.raises(ValueError, match="geometry"):
        mirror.mirror_step(good, good, 0.1, geometry="sphere")
    with pytest.raises(ValueError, match="gradient: expected shape"):
        mirror.mirror_step(good, jnp.ones(3), 0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        mirror.mirror_step(good, good, -0.1)
    with pytest.raises(ValueError, match="threshold"):
        mirror.soft_threshold(good, -1.0)
