"""Consensus-based optimisation, against its limits and exact integrals on a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pgjax.search import consensus


def cloud(seed=0, count=30, size=3):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=count), jnp.float32),
        jnp.asarray(rng.normal(size=(count, size)), jnp.float32),
    )


def half_square(v):
    return 0.5 * jnp.sum(v**2)


def test_limits_of_the_temperature():
    values, particles = cloud()
    mean = consensus.consensus_point(values, particles, alpha=0.0)
    np.testing.assert_allclose(mean, particles.mean(0), atol=1e-6)
    best = consensus.consensus_point(values, particles, alpha=1e6)
    np.testing.assert_allclose(best, particles[jnp.argmin(values)], atol=1e-6)
    weights = np.exp(-2.0 * np.asarray(values, np.float64))
    want = weights @ np.asarray(particles) / weights.sum()
    found = consensus.consensus_point(values, particles, alpha=2.0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_what_does_not_matter():
    values, particles = cloud()
    want = consensus.consensus_point(values, particles, alpha=3.0)
    order = np.random.default_rng(1).permutation(30)
    np.testing.assert_allclose(
        consensus.consensus_point(values[order], particles[order], alpha=3.0), want, atol=1e-6
    )
    np.testing.assert_allclose(
        consensus.consensus_point(values + 64.0, particles, alpha=3.0), want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bad", [1e30, np.inf, -np.inf, np.nan])
def test_unusable_values_weigh_nothing(bad):
    values, particles = cloud()
    want = consensus.consensus_point(values[3:], particles[3:], alpha=2.0)
    spoiled = values.at[:3].set(bad)
    found = consensus.consensus_point(spoiled, particles, alpha=2.0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_agreement_is_stationary_and_drift_contracts():
    key = jax.random.key(0)
    same = jnp.broadcast_to(jnp.array([1.0, -2.0, 3.0]), (5, 3))
    values = jnp.arange(5.0)
    for anisotropic in (False, True):
        moved = consensus.cbo_step(key, same, values, sigma=9.0, anisotropic=anisotropic)
        np.testing.assert_allclose(moved, same, rtol=1e-6)
    values, particles = cloud()
    center = consensus.consensus_point(values, particles, alpha=2.0)
    moved = consensus.cbo_step(key, particles, values, alpha=2.0, lam=0.7, sigma=0.0, dt=0.1)
    np.testing.assert_allclose(moved - center, (1 - 0.07) * (particles - center), atol=1e-6)


@pytest.mark.parametrize("noise_at", consensus.NOISE_AT)
@pytest.mark.parametrize("anisotropic", [False, True])
def test_size_of_the_noise(noise_at, anisotropic):
    particles = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    values = jnp.array([0.0, 100.0])  # consensus at the origin
    options = {"alpha": 10.0, "lam": 1.0, "sigma": 0.5, "dt": 0.25, "anisotropic": anisotropic}
    draw = jax.jit(
        jax.vmap(
            lambda k: consensus.cbo_step(k, particles, values, noise_at=noise_at, **options)[1]
        )
    )
    moved = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(moved.mean(0), [2.25, 3.0], atol=0.03)
    away = np.array([3.0, 4.0]) if anisotropic else np.array([5.0, 5.0])
    want = 0.5 * 0.5 * away * (0.75 if noise_at == "post_drift" else 1.0)
    np.testing.assert_allclose(moved.std(0), want, rtol=0.03)


def test_anisotropic_noise_spares_agreed_coordinates():
    values, particles = cloud()
    particles = particles.at[:, 1].set(2.0)
    key = jax.random.key(0)
    moved = consensus.cbo_step(key, particles, values, anisotropic=True)
    np.testing.assert_allclose(moved[:, 1], 2.0, rtol=1e-6)
    moved = consensus.cbo_step(key, particles, values, anisotropic=False)
    assert np.abs(moved[:, 1] - 2.0).max() > 0.05


def test_hopping_finds_the_proximal_point():
    """For ‖v‖²/2 the weighted cloud is Gaussian about x / (1 + α s²), for any α."""
    x = jnp.array([1.0, 2.0])
    hop = jax.jit(
        lambda key: consensus.hopping_step(
            key, x, jax.vmap(half_square), n=20_000, sigma=0.1, alpha=10.0
        )
    )
    # Many clouds rather than one of two million, whose sums in float32 are off by 0.4%.
    found = jnp.stack([hop(key) for key in jax.random.split(jax.random.key(0), 100)]).mean(0)
    np.testing.assert_allclose(found, x / 1.1, atol=3e-3)
    gradient = consensus.consensus_gradient(x, found, alpha=10.0, sigma=0.1)
    np.testing.assert_allclose(gradient, x / 1.1, atol=3e-2)  # of E at the proximal point
    exact = consensus.consensus_gradient(x, x / 1.1, alpha=10.0, sigma=0.1)
    np.testing.assert_allclose(exact, x / 1.1, rtol=1e-5)


def test_hopping_follows_the_proximal_map():
    start = jnp.array([1.0, -2.0])
    run = jax.jit(
        lambda key: consensus.run_hopping(
            key, half_square, start, steps=20, n=20_000, sigma=0.3, alpha=5.0
        )
    )
    found = run(jax.random.key(0))
    want = np.asarray(start) / 1.45 ** np.arange(1, 22)[:, None]
    np.testing.assert_allclose(found.centers, want, atol=0.02)
    assert found.particles.shape == (20_000, 2)
    assert float(found.particles.std()) == pytest.approx(0.3, rel=0.02)


def test_width_decays():
    found = consensus.run_hopping(
        jax.random.key(0),
        half_square,
        jnp.zeros(2),
        steps=4,
        n=5000,
        sigma=1.0,
        alpha=0.0,
        decay=0.5,
        decay_every=2,
    )
    assert float(found.particles.std()) == pytest.approx(0.25, rel=0.03)  # steps 0-1, 2-3, 4


def test_swarm_finds_the_minimum():
    particles = 3.0 + jax.random.normal(jax.random.key(0), (100, 2))
    found = jax.jit(lambda p: consensus.run_cbo(jax.random.key(1), half_square, p, steps=400))(
        particles
    )
    assert found.centers.shape == (401, 2)
    first = consensus.consensus_point(jax.vmap(half_square)(particles), particles, alpha=100.0)
    np.testing.assert_allclose(found.centers[0], first, rtol=1e-4)
    assert np.linalg.norm(found.centers[-1]) < 0.05
    # One step with a gradient's share: the drift less γ η dt ∇E.
    options = {"steps": 1, "sigma": 0.0, "dt": 0.1, "alpha": 0.0}
    plain = consensus.run_cbo(jax.random.key(0), half_square, particles, **options)
    bent = consensus.run_cbo(
        jax.random.key(0), half_square, particles, gradient_step=0.5, **options
    )
    np.testing.assert_allclose(
        bent.particles, plain.particles - 0.05 * particles, rtol=1e-4, atol=1e-5
    )


def test_trees_and_nothing_finite():
    tree = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    start, unravel = ravel_pytree(tree)
    found = consensus.run_hopping(
        jax.random.key(0), lambda v: half_square(v - 3), start, steps=30, n=500, sigma=0.3
    )
    np.testing.assert_allclose(unravel(found.centers[-1])["w"], 3.0, atol=0.3)
    lost = consensus.run_hopping(jax.random.key(0), lambda v: jnp.nan, start, steps=2, n=3)
    assert np.isnan(lost.centers).all()
    lost = consensus.run_cbo(jax.random.key(0), lambda v: jnp.inf, jnp.ones((3, 2)), steps=2)
    assert np.isnan(lost.centers).all()
    inside = jax.jit(lambda v, p: consensus.consensus_point(v, p, alpha=1.0))
    assert np.isnan(inside(jnp.full(3, jnp.nan), jnp.ones((3, 2)))).all()


def test_bad_input():
    values, particles = cloud()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="values: expected one for each of 30 particles"):
        consensus.consensus_point(values[:3], particles, alpha=1.0)
    with pytest.raises(ValueError, match="particles: expected rank 2"):
        consensus.consensus_point(values, particles[:, 0], alpha=1.0)
    with pytest.raises(ValueError, match="particles: expected at least 1"):
        consensus.consensus_point(values[:0], particles[:0], alpha=1.0)
    with pytest.raises(ValueError, match="alpha"):
        consensus.consensus_point(values, particles, alpha=-1.0)
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="values: expected at least one that is finite"):
            consensus.consensus_point(jnp.full(30, bad), particles, alpha=1.0)
    for name, value in (("sigma", -1.0), ("dt", 0.0), ("lam", -1.0), ("alpha", -1.0)):
        with pytest.raises(ValueError, match=name):
            consensus.cbo_step(key, particles, values, **{name: value})
        with pytest.raises(ValueError, match=name):
            consensus.run_cbo(key, half_square, particles, **{name: value})
    with pytest.raises(ValueError, match="noise_at"):
        consensus.cbo_step(key, particles, values, noise_at="later")
    for name, value in (("n", 0), ("sigma", -1.0), ("alpha", -1.0)):
        with pytest.raises(ValueError, match=name):
            consensus.hopping_step(key, particles[0], jax.vmap(half_square), **{name: value})
    for name, value in (("steps", 0), ("decay", 0.0), ("decay_every", 0)):
        with pytest.raises(ValueError, match=name):
            consensus.run_hopping(key, half_square, particles[0], **{name: value})
    with pytest.raises(ValueError, match="consensus"):
        consensus.consensus_gradient(particles[0], particles[0, :2], alpha=1.0, sigma=1.0)
    with pytest.raises(ValueError, match="alpha"):
        consensus.consensus_gradient(particles[0], particles[0], alpha=0.0, sigma=1.0)
