"""Gradients of several tasks in one, against numbers by hand, plain loops and SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from pgjax.optim import multitask

PAIR = jnp.array([[3.0, 4.0], [0.0, 1.0]])


def gradients(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(count, 2, 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
    }


def rows_of(tree):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in tree.values()], axis=1)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in tree.values()])


def samgs(grads, **options):
    options.setdefault("clip", None)
    return multitask.samgs(multitask.samgs_init(grads), grads, **options)


def reference_samgs(steps, gamma, b1, b2, rule="mean"):
    """Step after step in float64, one pair at a time."""
    m, v, found = np.zeros_like(steps[0]), 0.0, []
    for t, g in enumerate(steps, start=1):
        norm = np.linalg.norm(g, axis=1)
        pairs = [
            2 * norm[i] * norm[j] / (norm[i] ** 2 + norm[j] ** 2)
            for i, j in itertools.combinations(range(len(g)), 2)
        ]
        psi = np.mean(pairs)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (1 - psi) ** 2 + 1e-8
        if (psi if rule == "mean" else min(pairs)) < gamma:
            out = (g / norm[:, None]).sum(0) * norm.mean()
        else:
            out = (g * np.abs(m / (1 - b1**t))).sum(0) / np.sqrt(v / (1 - b2**t))
        found.append(out)
    return found


def test_by_hand():
    psi = multitask.magnitude_similarity(PAIR)
    np.testing.assert_allclose(psi, [[1, 0.3846154], [0.3846154, 1]], rtol=1e-6)
    found, _ = samgs(PAIR, gamma=0.7)
    np.testing.assert_allclose(found, [1.8, 5.4], rtol=1e-6)
    clipped, _ = samgs(PAIR, gamma=0.7, clip=1.0)
    np.testing.assert_allclose(clipped, np.array([1.8, 5.4]) / np.hypot(1.8, 5.4), rtol=1e-6)
    doubled, _ = samgs(PAIR, gamma=0.7, factor=2.0)
    np.testing.assert_allclose(doubled, [3.6, 10.8], rtol=1e-6)
    within, _ = samgs(PAIR, gamma=0.7, clip=10.0)
    np.testing.assert_allclose(within, [1.8, 5.4], rtol=1e-6)


def test_equal_norms():
    grads = jnp.array([[3.0, 4.0], [5.0, 0.0], [0.0, -5.0]])
    np.testing.assert_allclose(multitask.magnitude_similarity(grads), np.ones((3, 3)), rtol=1e-6)
    found, _ = samgs(grads, gamma=1.1)
    np.testing.assert_allclose(found, grads.sum(0), rtol=1e-6)
    # v = 1e-8 alone, so that √v̂ = 1e-3 at b2 = 0.99: a thousand times g |g|.
    modulated, state = samgs(grads, gamma=0.7)
    np.testing.assert_allclose(modulated, 1e3 * (grads * jnp.abs(grads)).sum(0), rtol=1e-3)
    assert float(state.dissimilarity) == pytest.approx(1e-8, rel=1e-3)


def test_one_large_gradient_only_lengthens():
    found, _ = samgs(PAIR, gamma=1.1)
    scaled, _ = samgs(PAIR * jnp.array([[1000.0], [1.0]]), gamma=1.1)
    np.testing.assert_allclose(
        scaled / jnp.linalg.norm(scaled), found / jnp.linalg.norm(found), rtol=1e-5
    )
    np.testing.assert_allclose(scaled, found * 5001 / 6, rtol=1e-5)


def test_gamma_decides():
    grads = gradients()
    rows = rows_of(grads)
    norms = np.linalg.norm(rows, axis=1)
    equalised = (rows / norms[:, None]).sum(0) * norms.mean()
    never, _ = samgs(grads, gamma=0.0)
    always, _ = samgs(grads, gamma=1.01)
    np.testing.assert_allclose(flat(always), equalised, rtol=1e-4)
    (want,) = reference_samgs([rows], 0.0, 0.9, 0.99)
    np.testing.assert_allclose(flat(never), want, rtol=1e-3)
    assert not np.allclose(want, equalised, rtol=0.1)


@pytest.mark.parametrize("rule", multitask.RULES)
def test_steps_against_a_loop(rule):
    """Both branches occur, and both keep the averages going."""
    scales = np.array([[1, 1, 1], [1, 9, 1], [1, 1, 1.2], [1, 1, 2.5]])
    trees = [
        jax.tree.map(lambda x, s=s: x * s.reshape(3, *[1] * (x.ndim - 1)), gradients(seed=i))
        for i, s in enumerate(scales.astype(np.float32))
    ]
    steps = [rows_of(t).astype(np.float64) for t in trees]
    want = reference_samgs(steps, 0.85, 0.8, 0.9, rule)
    state = multitask.samgs_init(trees[0])
    update = jax.jit(
        lambda s, g: multitask.samgs(s, g, gamma=0.85, b1=0.8, b2=0.9, rule=rule, clip=None)
    )
    for grads, out in zip(trees, want, strict=True):
        found, state = update(state, grads)
        np.testing.assert_allclose(flat(found), out, rtol=1e-3, atol=1e-5)
    psi = [np.array(multitask.magnitude_similarity(t))[np.triu_indices(3, 1)] for t in trees]
    compared = [x.mean() if rule == "mean" else x.min() for x in psi]
    assert {bool(x < 0.85) for x in compared} == {True, False}


def test_order_of_tasks_does_not_matter():
    grads, order = gradients(), np.array([2, 0, 1])
    mixed = jax.tree.map(lambda x: x[order], grads)
    for gamma in (0.0, 1.1):
        one, state = samgs(grads, gamma=gamma)
        other, permuted = samgs(mixed, gamma=gamma)
        np.testing.assert_allclose(flat(other), flat(one), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            permuted.momentum["a"], np.asarray(state.momentum["a"])[order], rtol=1e-6
        )
    one, other = multitask.cagrad(grads), multitask.cagrad(mixed)
    np.testing.assert_allclose(flat(other), flat(one), rtol=1e-3, atol=1e-4)


def test_one_task_and_zero_gradients():
    single = jax.tree.map(lambda x: x[:1], gradients())
    found, _ = samgs(single, gamma=0.9)
    rows = rows_of(single)
    np.testing.assert_allclose(flat(found), 1e3 * (rows * np.abs(rows))[0], rtol=1e-3)
    np.testing.assert_allclose(
        flat(multitask.pcgrad(jax.random.key(0), single)), rows[0], rtol=1e-6
    )
    found = multitask.cagrad(single, alpha=0.5)
    np.testing.assert_allclose(flat(found), rows[0] * 1.5 / 1.25, rtol=1e-4)
    some = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(
        multitask.magnitude_similarity(some), np.array([[1.0, 0.0], [0.0, 0.0]])
    )
    found, _ = samgs(some, gamma=0.5)
    np.testing.assert_allclose(found, [1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(multitask.pcgrad(jax.random.key(0), some), some[0], rtol=1e-6)
    none = jnp.zeros((2, 2))
    for value in (samgs(none)[0], multitask.pcgrad(jax.random.key(0), none)):
        np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(multitask.cagrad(none), 0.0)


def test_pcgrad_by_hand():
    grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    for seed in range(3):
        key = jax.random.key(seed)
        np.testing.assert_allclose(multitask.pcgrad(key, grads), [0.5, 1.5], rtol=1e-6)
    mean = multitask.pcgrad(key, grads, reduction="mean")
    np.testing.assert_allclose(mean, [0.25, 0.75], rtol=1e-6)
    agree = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(multitask.pcgrad(key, agree), agree.sum(0), rtol=1e-6)


def test_pcgrad_takes_one_of_the_orders():
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(3, 2)) + np.array([[2, 0], [-2, 1], [-1, -2]])
    sums = []
    for orders in itertools.product(*[itertools.permutations({0, 1, 2} - {i}) for i in range(3)]):
        total = np.zeros(2)
        for i, order in enumerate(orders):
            g = grads[i].copy()
            for j in order:
                along = g @ grads[j]
                if along < 0:
                    g -= along / (grads[j] @ grads[j]) * grads[j]
            total += g
        sums.append(total)
    draw = jax.jit(jax.vmap(lambda k: multitask.pcgrad(k, jnp.asarray(grads, jnp.float32))))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    nearest = np.abs(found[:, None] - np.array(sums)).max(-1)
    assert nearest.min(1).max() < 1e-5
    different = np.unique(np.round(sums, 5), axis=0)
    assert len(different) > 1 and len(np.unique(np.round(found, 4), axis=0)) == len(different)


@pytest.mark.parametrize("seed", range(4))
def test_cagrad_against_scipy(seed):
    count, alpha = 3 + seed % 2, 0.4 + 0.2 * seed
    rows = np.random.default_rng(seed).normal(size=(count, 5)) * np.array(
        [[3.0]] + [[0.5]] * (count - 1)
    )
    size = np.sqrt(np.mean(np.sum(rows**2, axis=1)))
    unit = rows / size
    gram = unit @ unit.T
    radius = alpha * np.sqrt(gram.mean() + 1e-8)

    def objective(w):
        return (w @ gram).mean() + radius * np.sqrt(w @ gram @ w + 1e-8)

    best = min(
        (
            scipy.optimize.minimize(
                objective,
                start,
                bounds=[(0, 1)] * count,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                options={"ftol": 1e-14, "maxiter": 500},
            )
            for start in [np.full(count, 1 / count), *np.eye(count)]
        ),
        key=lambda found: found.fun,
    ).x
    bent = best @ unit
    want = size * (unit.mean(0) + radius * bent / np.linalg.norm(bent))
    found = multitask.cagrad(jnp.asarray(rows, jnp.float32), alpha=alpha, rescale=False)
    assert np.linalg.norm(found - want) < 2e-3 * np.linalg.norm(want)
    scaled = multitask.cagrad(jnp.asarray(rows, jnp.float32), alpha=alpha)
    np.testing.assert_allclose(scaled, found / (1 + alpha**2), rtol=1e-5)
    np.testing.assert_allclose(
        multitask.cagrad(jnp.asarray(rows, jnp.float32), alpha=0.0), rows.mean(0), rtol=1e-5
    )


def test_cagrad_helps_the_task_that_gains_least():
    """It maximises the smallest gain within the ball, up to its own optimum."""
    rows = jnp.array([[4.0, 0.0], [-1.0, 1.0]])
    found = multitask.cagrad(rows, alpha=0.5, rescale=False)
    mean = rows.mean(0)
    assert jnp.linalg.norm(found - mean) <= 0.5 * jnp.linalg.norm(mean) * 1.001
    angles = np.linspace(0, 2 * np.pi, 2001)
    ball = mean + 0.5 * np.linalg.norm(mean) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert (rows @ found).min() >= (ball @ np.asarray(rows).T).min(1).max() - 1e-3


def test_task_gradients():
    def losses(params, batch):
        out = batch @ params["w"] + params["b"]
        return jnp.stack([jnp.mean(out), jnp.mean(out**2)])

    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.float32(0.5)}
    batch = jnp.array([[1.0, 0.0], [0.5, -1.0]])
    found = multitask.task_gradients(losses, params, batch)
    for task in range(2):
        want = jax.grad(lambda p, t=task: losses(p, batch)[t])(params)
        np.testing.assert_allclose(found["w"][task], want["w"], rtol=1e-6)
        np.testing.assert_allclose(found["b"][task], want["b"], rtol=1e-6)


def test_dtypes_are_kept():
    grads = {"w": jnp.ones((2, 3), jnp.bfloat16) * jnp.array([[1], [2]], jnp.bfloat16)}
    found, state = samgs(grads)
    assert found["w"].dtype == state.momentum["w"].dtype == jnp.bfloat16
    assert multitask.pcgrad(jax.random.key(0), grads)["w"].dtype == jnp.bfloat16
    assert multitask.cagrad(grads)["w"].dtype == jnp.bfloat16


def test_bad_input():
    key = jax.random.key(0)
    methods = (samgs, lambda g: multitask.pcgrad(key, g), multitask.cagrad)
    for method in methods:
        with pytest.raises(ValueError, match="task_grads: expected leaves with the same number"):
            method({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
        with pytest.raises(ValueError, match="task_grads: expected at least 1"):
            method(jnp.ones((0, 3)))
        with pytest.raises(ValueError, match="task_grads: expected finite gradients.* in b"):
            method({"a": jnp.ones((2, 3)), "b": jnp.array([1.0, jnp.nan])})
    for name, value in (("gamma", -0.1), ("b1", 1.0), ("b2", -0.5), ("clip", 0.0)):
        with pytest.raises(ValueError, match=name):
            samgs(PAIR, **{name: value})
    with pytest.raises(ValueError, match="rule: expected one of"):
        samgs(PAIR, rule="least")
    with pytest.raises(ValueError, match="task_grads: expected the shapes of the state"):
        multitask.samgs(multitask.samgs_init(PAIR), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="reduction"):
        multitask.pcgrad(key, PAIR, reduction="max")
    with pytest.raises(ValueError, match="alpha"):
        multitask.cagrad(PAIR, alpha=-1.0)
    with pytest.raises(ValueError, match="iters"):
        multitask.cagrad(PAIR, iters=0)
    with pytest.raises(ValueError, match="losses_fn: expected rank 1"):
        multitask.task_gradients(lambda p, b: p.sum(), PAIR, None)
