"""Bayesian policy gradients and the Gaussian processes under them, against dense formulas."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

import pgjax as pg
from pgjax import advantages, uncertainty
from pgjax.uncertainty import gp

MODELS = (advantages.bpg_model_1, advantages.bpg_model_2)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def problem(count=12, size=4, seed=0):
    """Scores as columns, returns, and a Fisher matrix that is not theirs."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(size, count))
    root = rng.normal(size=(size, size))
    return u, rng.normal(size=count), root @ root.T + np.eye(size)


def bandit(count, reward, seed=0):
    """Scores in mean and standard deviation of a ~ N(0, 1), and the rewards of the actions."""
    a = np.random.default_rng(seed).normal(size=count)
    return np.stack([a, a**2 - 1], 1), reward(a), np.diag([1.0, 2.0])


def near(one, other, tolerance=1e-10):
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_the_posterior_is_that_of_the_joint_gaussian(wide):
    """Against conditioning the joint covariance of observations and functionals."""
    rng = np.random.default_rng(1)
    root = rng.normal(size=(9, 9))
    joint = root @ root.T
    h, y, noise = rng.normal(size=(4, 6)), rng.normal(size=(4, 2)), np.diag([0.1, 0.2, 0.3, 0.4])
    k, b, b0 = joint[:6, :6], joint[:6, 6:], joint[6:, 6:]
    found = gp.linear_gp_posterior(k, y, b, b0, noise=noise, observe=h)
    inverse = np.linalg.inv(h @ k @ h.T + noise)
    near(found.mean, (h @ b).T @ inverse @ y)
    near(found.covariance, b0 - (h @ b).T @ inverse @ (h @ b))
    one = gp.linear_gp_posterior(k, y[:, 0], b, b0, noise=noise, observe=h)
    near(one.mean, found.mean[:, 0])
    plain = gp.linear_gp_posterior(k, np.ones(6), b, b0, noise=0.5)
    same = gp.linear_gp_posterior(k, np.ones(6), b, b0, noise=0.5 * np.eye(6), observe=np.eye(6))
    jax.tree.map(near, plain, same)


def test_the_two_forms_agree(wide):
    rng = np.random.default_rng(2)
    phi, y, b = rng.normal(size=(9, 3)), rng.normal(size=9), rng.normal(size=(3, 2))
    prior = b.T @ b + np.eye(2)
    jax.tree.map(
        near,
        gp.linear_gp_posterior(phi @ phi.T, y, phi @ b, prior, noise=0.3),
        gp.weight_space_posterior(phi.T @ phi, phi.T @ y, b, prior, noise=0.3),
    )
    least = gp.weight_space_posterior(phi.T @ phi, phi.T @ y, np.eye(3), np.eye(3), noise=0.0)
    near(least.mean, np.linalg.lstsq(phi, y)[0])


def test_an_integral_by_quadrature():
    """∫ f(x) N(x; 0, 1) dx with a Gaussian kernel, whose b and b₀ are known; f = cos: exp(-1/2)."""
    x, width = np.linspace(-4, 4, 15)[:, None].astype(np.float32), 1.0
    gram = gp.gaussian_kernel(x, x, width=width)
    for i, j in ((0, 3), (5, 5)):
        near(gram[i, j], np.exp(-((x[i, 0] - x[j, 0]) ** 2) / 2), 1e-5)
    b = np.sqrt(0.5) * np.exp(-(x**2) / 4)
    found = gp.linear_gp_posterior(gram, jnp.cos(x[:, 0]), b, jnp.full((1, 1), 3**-0.5), noise=1e-5)
    near(found.mean[0], np.exp(-0.5), 2e-3)
    assert 0 <= found.covariance[0, 0] < 1e-3


@pytest.mark.parametrize("noise", [0.05, 3.0])
def test_both_models_are_their_formulas(wide, noise):
    u, r, g = problem()
    size, count = u.shape
    q = u.T @ np.linalg.inv(g) @ u
    eye = np.eye(count)
    c = np.linalg.inv((1 + q) ** 2 + noise * eye)
    b = 1 + np.diag(q)
    one = advantages.bpg_model_1(u.T, r, g, noise=noise)
    near(one.mean, (u * r) @ c @ b)
    near(one.covariance, (1 + size - b @ c @ b) * np.eye(size))
    c = np.linalg.inv(q + noise * eye)
    two = advantages.bpg_model_2(u.T, r, g, noise=noise)
    near(two.mean, u @ c @ r)
    near(two.covariance, g - u @ c @ u.T)


def test_with_the_samples_own_fisher_it_is_a_shrunk_average(wide):
    u, r, _ = problem(count=20)
    fisher = advantages.fisher_matrix(u.T)
    near(fisher, np.cov(u, bias=True) + np.outer(u.mean(1), u.mean(1)))
    found = advantages.bpg_model_2(u.T, r, fisher, noise=0.7)
    near(found.mean, u @ r / (20 + 0.7), 1e-12)


@pytest.mark.parametrize("count", [3, 30])
def test_the_primal_form_is_the_dual_one(wide, count):
    u, r, g = problem(count)
    dual = advantages.bpg_model_2(u.T, r, g, noise=0.4)
    natural = advantages.bpg_natural_gradient(u.T, r, g, noise=0.4)
    near(g @ natural.mean, dual.mean, 1e-12)
    near(g @ natural.covariance @ g, dual.covariance, 1e-10)
    near(natural.mean, np.linalg.solve(u @ u.T + 0.4 * g, u @ r), 1e-12)


def test_much_noise_leaves_the_direction_of_the_average(wide):
    u, r, g = problem()
    near(1e9 * advantages.bpg_model_2(u.T, r, g, noise=1e9).mean, u @ r, 1e-6)


@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_gaussian_bandit(wide, count, seed):
    """Exact gradients: (1, 0) for the reward a, (0, 2) for its square."""
    scores, a, fisher = bandit(count, lambda a: a, seed)
    one = advantages.bpg_model_1(scores, a, fisher, noise=1e-6)
    near(one.mean, [1, 0], 5e-3)
    near(advantages.bpg_model_2(scores, a, fisher, noise=1e-6).mean, [1, 0], 5e-3)
    scores, square, fisher = bandit(count, lambda a: a**2, seed)
    near(advantages.bpg_model_1(scores, square, fisher, noise=1e-6).mean, [0, 2], 5e-3)
    two = advantages.bpg_model_2(scores, square, fisher, noise=1e-6)
    assert np.linalg.norm(two.mean - np.array([0, 2])) > 0.02  # no constant in its kernel
    centred = advantages.bpg_model_2(scores, square - 1, fisher, noise=1e-6)
    near(centred.mean, [0, 2], 5e-3)


def test_the_average_is_far_from_the_bandits_gradient():
    def error(seed):
        scores, square, _ = bandit(10, lambda a: a**2, seed)
        return np.linalg.norm(scores.T @ square / 10 - np.array([0, 2]))

    assert np.mean([error(seed) for seed in range(200)]) > 0.5


@pytest.mark.parametrize("model", MODELS)
def test_beliefs_sharpen_and_start_at_the_prior(wide, model):
    u, r, g = problem(count=16)
    covariances = [model(u.T[:m], r[:m], g, noise=0.5).covariance for m in (0, 1, 4, 16)]
    for before, after in itertools.pairwise(covariances):
        near(after, after.T, 0)
        assert np.linalg.eigvalsh(after).min() > -1e-10
        assert np.linalg.eigvalsh(before - after).min() > -1e-10
        assert np.trace(after) < np.trace(before)
    empty = model(u.T[:0], r[:0], g, noise=0.5)
    near(empty.mean, np.zeros(4))
    near(empty.covariance, 5 * np.eye(4) if model is MODELS[0] else g)


def test_priors_are_integrals_of_the_kernels():
    """b and b₀ of model 1 for one Gaussian score, G = 1, by numerical integration."""

    def density(x):
        return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)

    b, _ = integrate.quad(lambda x: (1 + 1.7 * x) ** 2 * density(x), -12, 12)
    near(b, 1 + 1.7**2, 1e-7)
    b0, _ = integrate.quad(lambda x: (1 + x * x) * density(x), -12, 12)
    none = jnp.zeros((0, 1)), jnp.zeros(0)
    near(advantages.bpg_model_1(*none, jnp.eye(1), noise=1.0).covariance[0, 0], b0, 1e-6)


def test_the_inverse_follows_the_running_fisher(wide):
    u, _, _ = problem(count=8)
    inverse = jnp.eye(4)
    for i, row in enumerate(u.T, start=2):
        inverse = advantages.fisher_inverse_update(inverse, row, step=1 / i)
    near(inverse, np.linalg.inv((np.eye(4) + u @ u.T) / 9), 1e-10)


def collected(points, kernel, threshold, capacity):
    keep = functools.partial(uncertainty.ald_update, kernel=kernel, threshold=threshold)
    start = uncertainty.ald_init(capacity, points.shape[1], dtype=points.dtype)
    return jax.jit(lambda x: jax.lax.scan(keep, start, x))(points)


def test_a_linear_dictionary_never_outgrows_the_parameters(wide):
    u, r, g = problem(count=40)
    white = advantages.whitened_scores(u.T, g)
    near(white @ white.T, u.T @ np.linalg.inv(g) @ u)
    kept, projections = collected(white, gp.linear_kernel, 1e-9, 10)
    assert kept.used == 4 and kept.refused == 0
    near(projections.coefficients[:, :4] @ kept.points[:4], white)
    near(kept.factor[:4, :4] @ kept.factor[:4, :4].T, kept.points[:4] @ kept.points[:4].T)
    assert np.all(projections.residual[4:] < 1e-9)
    jax.tree.map(
        near,
        advantages.bpg_model_2_sparse(r, g, kept, projections.coefficients, noise=0.3),
        advantages.bpg_model_2(u.T, r, g, noise=0.3),
    )


def test_a_quadratic_dictionary_serves_model_1(wide):
    """(1 + x·y)² has 15 features in four dimensions."""
    u, r, g = problem(count=40)
    white = advantages.whitened_scores(u.T, g)
    kept, projections = collected(white, gp.quadratic_kernel, 1e-8, 20)
    assert kept.used == 15
    full = advantages.bpg_model_1(u.T, r, g, noise=0.3)
    sparse = advantages.bpg_model_1_sparse(u.T, r, kept, projections.coefficients, noise=0.3)
    jax.tree.map(functools.partial(near, tolerance=1e-7), sparse, full)
    # Too small a dictionary says so, and still projects what it cannot keep.
    small, projections = collected(white, gp.quadratic_kernel, 1e-8, 6)
    assert small.used == 6 and small.refused > 0
    near(projections.coefficients[:6], np.eye(6))
    q = np.asarray(gp.quadratic_kernel(white, white))
    best = np.linalg.solve(q[:6, :6], q[:6, 6:])
    near(projections.coefficients[6:], best.T, 1e-6)
    near(projections.residual[6:], np.diag(q)[6:] - np.sum(q[:6, 6:] * best, 0), 1e-6)
    coarse = advantages.bpg_model_1_sparse(u.T, r, small, projections.coefficients, noise=0.3)
    a, k = np.asarray(projections.coefficients), q[:6, :6]
    b = 1 + np.sum(np.square(white[:6]), 1)
    near(coarse.mean, (u * r) @ a @ np.linalg.solve(k @ a.T @ a + 0.3 * np.eye(6), b), 1e-7)


def test_copies_are_kept_once():
    points = jnp.asarray([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0], [2.0, 4.0], [0.0, 0.0]])
    kept, projections = collected(points, gp.linear_kernel, 1e-4, 4)
    assert kept.used == 2
    near(projections.coefficients[:, :2] @ kept.points[:2], points, 1e-5)


def episodes(lengths, size=3, states=5, seed=3):
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    ends = np.isin(np.arange(count), np.cumsum(lengths) - 1)
    x = rng.integers(states, size=count)[:, None].astype(float)
    return (
        rng.normal(size=(count, size)),
        np.exp(-((x - x.T) ** 2) / 4),
        rng.normal(size=count),
        ends,
    )


def differences(ends, discount):
    h = np.eye(len(ends))
    for t in np.flatnonzero(~ends):
        h[t, t + 1] = -discount
    return h


def test_actor_critic_is_the_td_formula(wide):
    """Against H as a matrix and r as data; the code uses returns and no H."""
    u, k, r, ends = episodes([4, 1, 6])
    _, _, g = problem(size=3)
    discount, noise, scale = 0.9, 0.2, 0.3
    h = differences(ends, discount)
    gram = k + scale * u @ np.linalg.inv(g) @ u.T
    middle = h.T @ np.linalg.inv(h @ gram @ h.T + noise * h @ h.T)
    found = advantages.bac_gradient(
        u, k, r, ends, g, discount=discount, noise=noise, fisher_scale=scale
    )
    near(found.mean, scale * u.T @ middle @ r)
    near(found.covariance, scale * g - scale**2 * u.T @ middle @ h @ u)
    same = gp.linear_gp_posterior(gram, r, scale * u, scale * g, noise=noise * h @ h.T, observe=h)
    jax.tree.map(near, found, same)
    # Rows that do not count change nothing, whatever stands in them.
    where = np.array([0, 4, 4, 11])
    padded = {"scores": u, "state_gram": k, "rewards": r, "terminated": ends}
    mask = np.insert(np.ones(11, bool), where, False)
    padded = {
        name: np.insert(x, where, True if x.dtype == bool else np.nan, axis=0)
        for name, x in padded.items()
    }
    padded["state_gram"] = np.insert(padded["state_gram"], where, np.nan, axis=1)
    options = {"discount": discount, "noise": noise, "fisher_scale": scale, "mask": mask}
    jax.tree.map(near, found, advantages.bac_gradient(**padded, fisher=g, **options))
    slope = jax.grad(
        lambda r: advantages.bac_gradient(**(padded | {"rewards": r}), fisher=g, **options).mean[0]
    )(padded["rewards"])
    near(slope[mask], scale * (u.T @ middle)[0])
    near(slope[~mask], np.zeros(4))
    nothing = advantages.bac_gradient(u, k, r, ends, g, **(options | {"mask": np.zeros(11, bool)}))
    near(nothing.mean, np.zeros(3))
    near(nothing.covariance, scale * g)
    empty = advantages.bac_gradient(u[:0], k[:0, :0], r[:0], ends[:0], g, discount=0.5, noise=noise)
    near(empty.mean, np.zeros(3))
    near(empty.covariance, g)


def test_actor_critic_of_single_steps_is_model_2(wide):
    u, r, g = problem()
    found = advantages.bac_gradient(
        u.T, np.zeros((12, 12)), r, np.ones(12, bool), g, discount=0.9, noise=0.3
    )
    jax.tree.map(near, found, advantages.bpg_model_2(u.T, r, g, noise=0.3))


def test_they_work_under_jit_vmap_and_grad():
    u, r, g = (jnp.asarray(x, jnp.float32) for x in problem())
    for model in (*MODELS, advantages.bpg_natural_gradient):
        run = functools.partial(model, noise=0.2)
        one = run(u.T, r, g)
        assert one.mean.dtype == jnp.float32
        many = jax.jit(jax.vmap(run, in_axes=(None, 0, None)))(u.T, jnp.stack([r, 2 * r]), g)
        near(many.mean, np.stack([one.mean, 2 * one.mean]), 1e-4)
        near(many.covariance[1], one.covariance, 1e-4)
        slope = jax.grad(lambda r, run=run: run(u.T, r, g).mean.sum())(r)
        near(slope @ r, one.mean.sum(), 1e-4)  # linear in the returns
        half = model(u.T.astype(jnp.bfloat16), r.astype(jnp.bfloat16), g, noise=0.2)
        assert half.mean.dtype == jnp.float32
    # More samples than parameters and no noise: finite, whatever K does not determine.
    for model in MODELS:
        assert all(np.isfinite(x).all() for x in model(u.T, r, g, noise=0.0))


def test_bad_input():
    u, r, g = (np.asarray(x, np.float32) for x in problem())
    for model in (*MODELS, advantages.bpg_natural_gradient):
        for name, arguments in {
            "fisher: expected shape": (u.T, r, g[:3]),
            "fisher: expected a symmetric": (u.T, r, g + np.triu(np.ones((4, 4), np.float32), 1)),
            "fisher: expected a positive definite": (u.T, r, np.ones((4, 4), np.float32)),
            "trajectory_returns: expected shape": (u.T, r[:5], g),
            "trajectory_returns: expected a floating": (u.T, np.arange(12), g),
            "scores: expected rank 2": (u[0], r, g),
        }.items():
            with pytest.raises(ValueError, match=f"^{name}"):
                model(*arguments, noise=0.1)
        with pytest.raises(ValueError, match="^noise"):
            model(u.T, r, g, noise=-0.1)
    with pytest.raises(ValueError, match="^damping"):
        advantages.fisher_matrix(u.T, damping=-1.0)
    with pytest.raises(ValueError, match="^scores: expected at least one"):
        advantages.fisher_matrix(u.T[:0])
    with pytest.raises(ValueError, match="^weights"):
        advantages.fisher_matrix(u.T, weights=r[:3])
    advantages.bpg_model_2(u.T, r, advantages.fisher_matrix(u.T[:1], damping=0.1), noise=0.1)
    with pytest.raises(ValueError, match="^step"):
        advantages.fisher_inverse_update(g, r[:4], step=1.0)
    with pytest.raises(ValueError, match="^inverse"):
        advantages.fisher_inverse_update(g[:3], r[:4], step=0.5)
    checked = jax.experimental.checkify.checkify(jax.jit(advantages.whitened_scores))
    with pytest.raises(Exception, match="fisher: expected a positive definite"):
        checked(u.T, np.zeros((4, 4), np.float32))[0].throw()


def test_bad_input_of_the_actor_critic():
    u, k, r, ends = episodes([2, 3])
    good = {
        "scores": np.float32(u),
        "state_gram": np.float32(k),
        "rewards": np.float32(r),
        "terminated": ends,
        "fisher": np.eye(3, dtype=np.float32),
        "discount": 0.9,
        "noise": 0.1,
    }
    advantages.bac_gradient(**good)
    for name, value in {
        "discount": 1.0,
        "noise": -1.0,
        "fisher_scale": 0.0,
        "state_gram": np.eye(4, dtype=np.float32),
        "rewards": np.float32(r[:3]),
        "terminated": np.zeros(5, bool),
        "mask": np.ones(4, bool),
        "fisher": np.zeros((3, 3), np.float32),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            advantages.bac_gradient(**(good | {name: value}))
    with pytest.raises(ValueError, match="^terminated: expected true at the last"):
        advantages.bac_gradient(**good, mask=np.array([True, True, True, True, False]))


def test_bad_input_of_the_posteriors_and_the_dictionary():
    eye, y, b = np.eye(3, dtype=np.float32), np.ones(3, np.float32), np.ones((3, 1), np.float32)
    good = {"gram": eye, "targets": y, "cross": b, "prior": eye[:1, :1], "noise": 0.1}
    for name, value in {
        "gram": eye[:2],
        "targets": y[:2],
        "cross": b[:2],
        "prior": eye,
        "noise": -1.0,
        "observe": np.ones((2, 2), np.float32),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            uncertainty.linear_gp_posterior(**(good | {name: value}))
    with pytest.raises(ValueError, match="^gram: expected a symmetric"):
        uncertainty.linear_gp_posterior(**(good | {"gram": eye + np.eye(3, k=1, dtype=np.float32)}))
    with pytest.raises(ValueError, match="^noise: expected shape"):
        uncertainty.linear_gp_posterior(**(good | {"noise": eye[:2, :2]}))
    with pytest.raises(ValueError, match="^features_targets"):
        uncertainty.weight_space_posterior(eye, y[:2], b, eye[:1, :1], noise=0.1)
    with pytest.raises(ValueError, match="^width"):
        gp.gaussian_kernel(b, b, width=0.0)
    with pytest.raises(ValueError, match="^y: expected points of 1"):
        gp.linear_kernel(b, eye)
    with pytest.raises(ValueError, match="^capacity"):
        uncertainty.ald_init(0, 2)
    state = uncertainty.ald_init(3, 2)
    with pytest.raises(ValueError, match="^point"):
        uncertainty.ald_update(state, jnp.ones(3), kernel=gp.linear_kernel, threshold=0.1)
    with pytest.raises(ValueError, match="^threshold"):
        uncertainty.ald_update(state, jnp.ones(2), kernel=gp.linear_kernel, threshold=-0.1)
    with pytest.raises(ValueError, match="^coefficients, cross"):
        uncertainty.ald_posterior(state, eye[:, :2], y, b, eye[:1, :1], noise=0.1)
    with pytest.raises(ValueError, match="^targets: expected 3 rows"):
        uncertainty.ald_posterior(state, eye, y[:2], b, eye[:1, :1], noise=0.1)
    assert pg.uncertainty is uncertainty
