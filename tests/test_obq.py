"""GPTQ, GPTAQ and FOEM against least squares, KKT systems and a plain loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import quantize

METHODS = ("gptq", "gptaq", "foem", "foem_all", "both", "v1")


@functools.cache
def problem(columns=24, rows=5, samples=60, seed=0):
    """Correlated inputs, and others that drifted from them."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) / columns**0.5 + 0.5 * np.eye(columns)
    x = rng.normal(size=(samples, columns)) @ mix
    drifted = x + 0.2 * rng.normal(size=x.shape)
    w = rng.normal(size=(rows, columns))
    return w.astype(np.float32), drifted.astype(np.float32), x.astype(np.float32)


def run(name, w, x, x_full, **options):
    h = quantize.input_hessian(x)
    dxx = quantize.input_mismatch(x_full, x)
    options = {"bits": 3, "group": None, **options}
    match name:
        case "gptq":
            return quantize.gptq(w, h, **options)
        case "gptaq":
            return quantize.gptaq(w, h, dxx, **options)
        case "foem":
            return quantize.foem(w, h, **options)
        case "foem_all":
            return quantize.foem(w, h, shift="all", **options)
        case "both":
            return quantize.foem(w, h, dxx, alpha=0.25, **options)
    return quantize.foem(w, h, beta=options.pop("beta", 3e-2), variant="v1", **options)


def grid_of(w, bits):
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    scale = (high - low) / (2**bits - 1)
    return scale, np.round(-low / scale)


def rounded(column, scale, zero, bits):
    return scale * (np.clip(np.round(column / scale) + zero, 0, 2**bits - 1) - zero)


def reference(w, h, dxx, *, bits, group, alpha, beta, shift, variant="v2"):
    """One column after another in float64, from the formulas."""
    w = w.astype(np.float64)
    columns = w.shape[1]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    steer = alpha * np.triu(dxx @ upper.T, 1) @ upper
    now, q, error, latent = w.copy(), np.zeros_like(w), 0.0, np.zeros_like(w)
    for i in range(columns):
        if i % group == 0:
            scale, zero = grid_of(now[:, i : i + group], bits)
        column = now[:, i].copy()
        latent[:, i] = column
        q[:, i] = rounded(column, scale, zero, bits)
        error += np.sum((column - q[:, i]) ** 2) / upper[i, i] ** 2 / 2
        free = beta * (now - w)
        if variant == "v1":
            # The inverse of what is left of H, by itself.
            free = np.zeros_like(now)
            free[:, i:] = beta * (now - w)[:, i:] @ np.linalg.inv(h[i:, i:])
        miss = (column - q[:, i] - free[:, i]) / upper[i, i]
        now -= np.outer(miss, upper[i])
        now += np.outer(column, steer[i])
        if variant == "v1":
            now -= free
        else:
            to = slice(i + 1, i + 2) if shift == "next" else slice(i + 1, None)
            now[:, to] -= beta * (now - w)[:, to]
    return q, error, latent


def test_two_weights_by_hand():
    w, h = jnp.array([[0.6, 0.6]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(
        quantize.chol_inv_upper(h), [[0.8165, -0.4082], [0.0, 0.7071]], atol=1e-4
    )
    unit = (jnp.ones((1, 1)), jnp.zeros((1, 1)))
    found = quantize.gptq(w, h, bits=2, group=None, damp=0.0, grid=unit)
    np.testing.assert_array_equal(found.q, [[1.0, 0.0]])
    # 0.6 + 0.4 · (-1/2) = 0.4 is left for the second.
    np.testing.assert_allclose(found.latent, [[0.6, 0.4]], rtol=1e-5)
    # With δ = (0.4, -0.6): δᵀHδ = 0.56; rounding both up gives (0.4, 0.4): 0.96.
    assert 2 * float(found.error) == pytest.approx(0.56, rel=1e-5)
    assert 2 * float(quantize.quadratic_error(w, found.q, h)) == pytest.approx(0.56, rel=1e-5)
    plain = quantize.quadratic_error(w, jnp.ones((1, 2)), h)
    assert 2 * float(plain) == pytest.approx(0.96, rel=1e-5)


def test_factor_of_the_inverse():
    _, x, _ = problem()
    h = quantize.input_hessian(x, damp=0.01)
    want = 2 * x.T.astype(np.float64) @ x / len(x)
    want += 0.01 * np.mean(np.diag(want)) * np.eye(len(want))
    np.testing.assert_allclose(h, want, rtol=1e-4, atol=1e-5)
    upper = np.asarray(quantize.chol_inv_upper(h), np.float64)
    assert not np.tril(upper, -1).any() and (np.diag(upper) > 0).all()
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(want), rtol=2e-3, atol=2e-3)


def test_gptq_leaves_the_best_weights_to_the_right():
    """After each column, those not yet rounded are the least-squares answer to those that are."""
    w, x, _ = problem()
    with jax.enable_x64(True):
        h = quantize.input_hessian(jnp.asarray(x, jnp.float64))
        found = quantize.gptq(jnp.asarray(w, jnp.float64), h, bits=3, group=None)
        q, latent, h = (np.asarray(a) for a in (found.q, found.latent, h))
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    for i in range(1, w.shape[1]):
        done, left = slice(None, i), slice(i, None)
        gap = w[:, done] - q[:, done]
        best = w[:, left] + np.linalg.solve(h[left, left], h[left, done] @ gap.T).T
        np.testing.assert_allclose(latent[:, i], best[:, 0], atol=1e-8)
    gap = w - q
    assert float(found.error) == pytest.approx(0.5 * np.trace(gap @ h @ gap.T), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "group", "block"),
    [
        ("gptq", 8, 128),
        ("gptq", 4, 8),
        ("gptq", None, 10),
        ("gptaq", 8, 4),
        ("foem", 8, 16),
        ("foem", None, 10),
        ("foem_all", 8, 8),
        ("foem_all", None, 10),
        ("both", 8, 4),
        ("both", None, 128),
        ("v1", 8, 128),
    ],
)
def test_formulas_whatever_the_block(name, group, block):
    w, x, x_full = problem()
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, jnp.float64) for a in (w, x, x_full)]
        found = run(name, *arrays, group=group, block=block)
        found = [np.asarray(a) for a in (found.q, found.error, found.latent)]
    wide = [a.astype(np.float64) for a in (x, x_full)]
    h = 2 * wide[0].T @ wide[0] / len(x)
    dxx = 2 * (wide[1] - wide[0]).T @ wide[0] / len(x)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    want = reference(
        w,
        h,
        dxx,
        bits=3,
        group=group or w.shape[1],
        alpha=0.25 if name in ("gptaq", "both") else 0.0,
        beta={"gptq": 0.0, "gptaq": 0.0, "v1": 3e-2}.get(name, 0.2),
        shift="all" if name == "foem_all" else "next",
        variant="v1" if name == "v1" else "v2",
    )
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7)


def test_limits():
    w, x, x_full = problem()
    h, dxx = quantize.input_hessian(x), quantize.input_mismatch(x_full, x)
    gptq = quantize.gptq(w, h, bits=3, group=8, block=8)
    for found in (
        quantize.foem(w, h, bits=3, group=8, block=8, beta=0.0),
        quantize.gptaq(w, h, dxx, bits=3, group=8, block=8, alpha=0.0),
        quantize.gptaq(w, h, 0 * dxx, bits=3, group=8, block=8),
        quantize.foem(w, h, bits=3, group=8, block=8, beta=jnp.float32(0.0)),
    ):
        np.testing.assert_array_equal(found.codes, gptq.codes)
        np.testing.assert_allclose(found.error, gptq.error, rtol=1e-6)
    gptaq = quantize.gptaq(w, h, dxx, bits=3, group=8, block=8)
    both = quantize.foem(w, h, dxx, bits=3, group=8, block=8, alpha=0.25, beta=0.0)
    np.testing.assert_array_equal(gptaq.codes, both.codes)
    first = {
        int(c)
        for b in (0.0, 0.3, 1.0)
        for c in quantize.foem(w[:1], h, bits=3, group=None, beta=b).codes[:, 0]
    }
    assert len(first) == 1
    # All the way back to the given weights before each column: plain rounding.
    back = quantize.foem(w, h, bits=3, group=8, block=8, beta=1.0, shift="all")
    np.testing.assert_allclose(back.latent, w, atol=1e-6)
    np.testing.assert_array_equal(back.codes, quantize.rtn(w, bits=3, group=8).codes)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.7])
def test_identity_is_plain_rounding(beta):
    w, *_ = problem()
    eye = 3.0 * jnp.eye(w.shape[1])
    plain = quantize.rtn(w, bits=3, group=8)
    for options in ({"shift": "all"}, {"shift": "next"}, {"variant": "v1"}):
        found = quantize.foem(w, eye, bits=3, group=8, beta=jnp.float32(beta), **options)
        np.testing.assert_array_equal(found.codes, plain.codes)
        np.testing.assert_array_equal(found.scale, plain.scale)


def test_act_order_is_undone():
    w, x, _ = problem()
    x = x * np.linspace(0.2, 3.0, x.shape[1])[np.random.default_rng(1).permutation(x.shape[1])]
    x = x.astype(np.float32)
    order = np.argsort(-np.sum(np.square(x), axis=0), kind="stable")
    found = quantize.gptq(w, quantize.input_hessian(x), bits=3, group=8, block=8, act_order=True)
    sorted_run = quantize.gptq(
        w[:, order], quantize.input_hessian(x[:, order]), bits=3, group=8, block=8
    )
    np.testing.assert_allclose(found.q[:, order], sorted_run.q, atol=1e-4)
    np.testing.assert_array_equal(found.g_idx[order], np.arange(24) // 8)
    scale, zero = (np.asarray(a)[:, found.g_idx] for a in (found.scale, found.zero))
    np.testing.assert_allclose(found.q, scale * (np.asarray(found.codes) - zero), rtol=1e-6)


def test_step_solves_the_constrained_problem():
    rng = np.random.default_rng(5)
    for index in (0, 2, 4):
        root = rng.normal(size=(5, 9))
        h, g, miss = root @ root.T, rng.normal(size=5), rng.normal()
        system = np.zeros((6, 6))
        system[:5, :5], system[5, index], system[index, 5] = h, 1.0, 1.0
        want = np.linalg.solve(system, [*-g, -miss])[:5]
        found = quantize.first_order_step(
            jnp.float32(miss), jnp.asarray(g), jnp.asarray(np.linalg.inv(h)), index=index
        )
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("gptaq", "both")])
def test_weights_on_the_grid_stay(name):
    rng = np.random.default_rng(2)
    _, x, _ = problem()
    codes = rng.integers(0, 8, (5, 24))
    codes[:, ::8], codes[:, 1::8] = 0, 7  # each group spans its grid
    w = (0.25 * (codes - 3)).astype(np.float32)
    found = run(name, w, x, x, group=8, block=8)
    np.testing.assert_array_equal(found.q, w)
    assert float(found.error) == 0.0


def test_gptq_beats_rounding_and_gptaq_follows_the_original_network():
    gains, steered = [], []
    for seed in range(5):
        w, x, x_full = problem(seed=seed)
        h, dxx = quantize.input_hessian(x), quantize.input_mismatch(x_full, x)
        gptq = quantize.gptq(w, h, bits=3, group=None)
        plain = quantize.rtn(w, h, bits=3, group=None)
        gains.append(float(quantize.quadratic_error(w, gptq.q, h) / plain.error))
        want = x_full @ w.T
        errors = [
            np.square(x @ np.asarray(q).T - want).sum()
            for q in (gptq.q, quantize.gptaq(w, h, dxx, bits=3, group=None, alpha=1.0).q)
        ]
        steered.append(errors[1] / errors[0])
    assert max(gains) < 0.9 and max(steered) < 1.0


def test_dead_columns_and_masks():
    w, x, _ = problem()
    silent = x.copy()
    silent[:, 5] = 0.0
    found = quantize.gptq(w, quantize.input_hessian(silent), bits=3, group=None)
    np.testing.assert_array_equal(found.q[:, 5], np.zeros(5))
    assert np.isfinite(np.asarray(found.latent)).all()
    nothing = quantize.gptq(w, jnp.zeros((24, 24)), bits=3, group=None)
    np.testing.assert_array_equal(nothing.q, np.zeros((5, 24)))
    mask = np.arange(60) < 40
    spoiled = np.where(mask[:, None], x, np.nan).astype(np.float32)
    np.testing.assert_allclose(
        quantize.input_hessian(spoiled, mask=mask), quantize.input_hessian(x[:40]), rtol=1e-5
    )
    np.testing.assert_array_equal(
        quantize.input_hessian(x, mask=np.zeros(60, bool)), np.zeros((24, 24))
    )
    np.testing.assert_allclose(
        quantize.input_mismatch(2 * x, x), quantize.input_hessian(x), rtol=1e-4, atol=1e-5
    )


def test_under_jit_and_vmap():
    w, x, _ = problem()
    h = quantize.input_hessian(x)
    run = functools.partial(quantize.foem, bits=3, group=8, block=8)
    want = run(w, h)
    np.testing.assert_array_equal(jax.jit(run)(w, h).codes, want.codes)
    stacked = jax.vmap(run)(jnp.stack([w, -w]), jnp.stack([h, h]))
    np.testing.assert_array_equal(stacked.codes[0], want.codes)
    low = quantize.gptq(jnp.asarray(w, jnp.bfloat16), h, bits=3, group=8, block=8)
    assert low.q.dtype == jnp.float32 and low.codes.dtype == jnp.uint8


def test_bad_input():
    w, x, x_full = problem()
    h = quantize.input_hessian(x)
    options = {"bits": 3, "group": None}
    for bad in (jnp.ones((24, 23)), jnp.ones((5, 5)), jnp.ones(24)):
        with pytest.raises(ValueError, match="h: expected shape"):
            quantize.gptq(w, bad, **options)
    with pytest.raises(ValueError, match="h: expected a symmetric matrix"):
        quantize.gptq(w, h.at[0, 1].add(1.0), **options)
    with pytest.raises(ValueError, match="h: expected finite numbers"):
        quantize.gptq(w, h.at[0, 0].set(jnp.nan), **options)
    with pytest.raises(ValueError, match="w: expected finite numbers"):
        quantize.gptq(jnp.full((5, 24), jnp.inf), h, **options)
    with pytest.raises(ValueError, match="w: expected rank 2"):
        quantize.gptq(w[0], h, **options)
    with pytest.raises(ValueError, match="bits: expected an int of 2 to 8, got 1"):
        quantize.gptq(w, h, bits=1, group=None)
    with pytest.raises(ValueError, match="group_size: expected a divisor of 24 columns, got 128"):
        quantize.gptq(w, h, bits=3)
    with pytest.raises(ValueError, match="block: expected a multiple or a divisor"):
        quantize.gptq(w, h, bits=3, group=8, block=12)
    flat = -jnp.eye(24)
    with pytest.raises(ValueError, match=r"not positive definite with damp=0.01; try damp=0\.1"):
        quantize.gptq(w, flat, **options)
    with pytest.raises(ValueError, match=r"with damp=0.0; try damp=0\.01"):
        quantize.chol_inv_upper(flat)
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="beta: expected a number in"):
            quantize.foem(w, h, beta=beta, **options)
    with pytest.raises(ValueError, match="shift: expected one of 'next', 'all'"):
        quantize.foem(w, h, shift="none", **options)
    with pytest.raises(ValueError, match="variant: expected one of"):
        quantize.foem(w, h, variant="v3", **options)
    with pytest.raises(ValueError, match="alpha: expected"):
        quantize.foem(w, h, alpha=-1.0, **options)
    with pytest.raises(ValueError, match="dxx: expected the input_mismatch"):
        quantize.foem(w, h, alpha=0.5, **options)
    with pytest.raises(ValueError, match="dxx: expected shape"):
        quantize.gptaq(w, h, jnp.ones((3, 3)), **options)
    with pytest.raises(ValueError, match="grid: expected scale of shape"):
        quantize.gptq(w, h, grid=(jnp.ones((5, 2)), jnp.ones((5, 2))), **options)
    with pytest.raises(ValueError, match="damp: expected"):
        quantize.input_hessian(x, damp=-1.0)
    with pytest.raises(ValueError, match="x: expected at least one row"):
        quantize.input_hessian(x[:0])
    with pytest.raises(ValueError, match="mask: expected shape"):
        quantize.input_hessian(x, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="x_quantized: expected shape"):
        quantize.input_mismatch(x_full, x[:5])
