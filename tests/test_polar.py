"""Polar factors against singular value decompositions and published constants."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.optim import coefficients, inner, inverse_sqrt, polar
from pgjax.optim.matrix import frobenius_norm, row_normalize
from pgjax.optim.polar import symmetric_matmul

EXACT = ("qdwh", "svd", "eigh")
METHODS = ("ns", "polar_express", "gram_ns", *EXACT)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def reference(x):
    left, _, right = np.linalg.svd(np.asarray(x), full_matrices=False)
    return left @ right


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def scalar(s, rows):
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize(
    ("start", "end"), [(1.0, 0.69643641), (0.5, 0.76543853), (0.1, 0.71212008)]
)
def test_keller_steps_take_singular_values_where_published(start, end):
    # The second singular value makes the norm 1, so that the first is where it is said to be.
    other = np.sqrt(max(1 - start**2, 0.0))
    u = polar(jnp.diag(jnp.array([start, other])), method="ns", eps=0.0)
    np.testing.assert_allclose(u[0, 0], end, atol=1e-8)
    np.testing.assert_allclose(scalar(start, coefficients.take(coefficients.KELLER, 5)), end, 1e-7)


def test_images_of_the_published_sets():
    s = np.geomspace(1e-2, 1, 4001)
    keller = scalar(s, coefficients.take(coefficients.KELLER, 5))
    dion = scalar(s, coefficients.DION)
    np.testing.assert_allclose([keller.min(), keller.max()], [0.682, 1.134], atol=1e-3)
    np.testing.assert_allclose([dion.min(), dion.max()], [0.978, 1.032], atol=1e-3)
    np.testing.assert_allclose(dion[-1], 0.97834556, atol=1e-8)
    five = scalar(s / 1.01, coefficients.polar_express(steps=5))
    np.testing.assert_allclose([five.min(), five.max()], [0.870, 1.124], atol=1e-3)
    inside = scalar(s / 1.02, coefficients.POLAR_EXPRESS_5)
    assert np.abs(inside - 1).max() < 0.15
    eight = scalar(np.geomspace(1e-3, 1, 4001) / 1.01, coefficients.polar_express(steps=8))
    assert np.abs(eight - 1).max() < 1e-4


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 3, 12, 12)])
@pytest.mark.parametrize("method", [*EXACT, "polar_express", "zolo"])
def test_factor_is_that_of_the_decomposition(method, shape):
    x = gaussian(*shape)
    np.testing.assert_allclose(polar(x, method=method), reference(x), atol=1e-9)


@pytest.mark.parametrize("method", ["qdwh", "svd", "zolo"])
def test_exact_methods_hold_for_condition_numbers_of_a_million(method):
    left, right = orthogonal(20, 1)[:, :8], orthogonal(8, 2)
    x = jnp.asarray(left * np.geomspace(1, 1e-6, 8) @ right)
    np.testing.assert_allclose(polar(x, method=method), left @ right, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_turning_scaling_and_transposing_commute_with_it(method):
    x, q, r = gaussian(6, 10), orthogonal(6, 1), orthogonal(10, 2)
    u = polar(x, method=method)
    np.testing.assert_allclose(polar(q @ x @ r, method=method), q @ u @ r, atol=1e-7)
    np.testing.assert_allclose(polar(x.T, method=method), u.T, atol=1e-12)
    tolerance = 1e-10 if method in EXACT else 1e-5  # the iterations add eps to the norm
    np.testing.assert_allclose(polar(7.0 * x, method=method), u, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices(method):
    x = gaussian(3, 5, 9)
    singles = [polar(one, method=method) for one in x]
    np.testing.assert_allclose(polar(x, method=method), singles, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_zero_gives_zero_and_finite_derivatives(method):
    x = jnp.zeros((2, 4, 6)).at[1].set(gaussian(4, 6))
    u = polar(x, method=method)
    np.testing.assert_array_equal(u[0], 0)
    assert np.abs(u[1]).max() > 0.1
    if method != "qdwh":  # has no reverse mode
        grad = jax.grad(lambda x: jnp.sum(polar(x, method=method) ** 3))(jnp.zeros((4, 6)))
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("method", EXACT)
def test_inner_product_is_the_nuclear_norm_of_rank_deficient_matrices_too(method):
    full = gaussian(6, 10)
    low = gaussian(6, 2, seed=1) @ gaussian(2, 10, seed=2)
    for x in (full, low):
        nuclear = np.linalg.svd(np.asarray(x), compute_uv=False).sum()
        np.testing.assert_allclose(inner(x, polar(x, method=method)), nuclear, rtol=1e-5)


def test_kellers_steps_reach_most_of_the_nuclear_norm():
    x = gaussian(40, 10)
    nuclear = np.linalg.svd(np.asarray(x), compute_uv=False).sum()
    share = inner(x, polar(x, method="ns")) / nuclear
    assert 0.9 < share < 1.0


def test_gram_iteration_is_the_same_polynomial():
    x = gaussian(2, 6, 30)
    for rows in (coefficients.KELLER * 5, coefficients.polar_express(steps=7)):
        plain = polar(x, method="ns", coefficients=rows)
        np.testing.assert_allclose(polar(x, method="gram_ns", coefficients=rows), plain, atol=1e-9)


def test_two_qdwh_steps_are_no_polar_factor():
    left, right = orthogonal(8, 1), orthogonal(8, 2)
    x = jnp.asarray(left * np.geomspace(1, 1e-4, 8) @ right)
    values = np.linalg.svd(np.asarray(polar(x, method="qdwh", steps=2)), compute_uv=False)
    assert values.min() < 0.9
    exact = np.linalg.svd(np.asarray(polar(x, method="qdwh")), compute_uv=False)
    np.testing.assert_allclose(exact, 1, atol=1e-10)


def test_symmetric_products_leave_out_what_is_mirrored(monkeypatch):
    x = gaussian(2, 64, 48)

    def flops():
        return (
            jax.jit(lambda a, b: symmetric_matmul(a, b))
            .lower(x, x)
            .compile()
            .cost_analysis()["flops"]
        )

    whole = flops()
    monkeypatch.setattr(sys.modules["pgjax.optim.polar"], "SYMMETRIC_BLOCK", 16)
    np.testing.assert_allclose(symmetric_matmul(x, x), x @ jnp.swapaxes(x, -1, -2), atol=1e-12)
    assert flops() < 0.66 * whole  # four by four blocks: 5/8
    gram = x @ jnp.swapaxes(x, -1, -2)
    np.testing.assert_allclose(symmetric_matmul(gram, gram @ gram), gram @ gram @ gram, rtol=1e-10)
    for rows in (34, 35):  # two by two blocks, and none
        part = x[:, :rows]
        np.testing.assert_allclose(
            symmetric_matmul(part, part), part @ jnp.swapaxes(part, -1, -2), atol=1e-12
        )


def test_dtype_is_kept_and_bfloat16_is_roughly_orthogonal():
    x = gaussian(4, 8, 16, dtype=jnp.bfloat16)
    u = polar(x, method="polar_express", dtype=jnp.bfloat16)
    assert u.dtype == jnp.bfloat16
    u = np.asarray(u, np.float64)
    np.testing.assert_allclose(
        u @ u.swapaxes(-1, -2), np.broadcast_to(np.eye(8), (4, 8, 8)), atol=0.1
    )


def test_inverse_square_root():
    x = gaussian(3, 6, 9)
    a = x @ jnp.swapaxes(x, -1, -2)
    root = inverse_sqrt(a, eps=0.0)
    np.testing.assert_allclose(root @ a @ root, np.broadcast_to(np.eye(6), (3, 6, 6)), atol=1e-8)
    damped = inverse_sqrt(jnp.zeros((3, 3)), eps=0.25)
    np.testing.assert_allclose(damped, 2 * np.eye(3), atol=1e-6)


def test_zero_rows_and_norms():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(row_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-7)
    assert np.isfinite(jax.grad(lambda x: row_normalize(x).sum())(x)).all()
    assert jax.grad(lambda x: frobenius_norm(x).sum())(jnp.zeros((2, 2))).sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cubic"}, "method: expected one of"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"method": "svd", "steps": 3}, "steps: 'svd' is not iterated"),
        ({"method": "qdwh", "dtype": jnp.bfloat16}, "dtype: 'qdwh' takes none"),
        ({"method": "svd", "coefficients": coefficients.DION}, "coefficients: 'svd' takes none"),
        ({"coefficients": [(1.0, 2.0)]}, "coefficients: expected rows"),
        ({"method": "ns", "coefficients": ()}, "coefficients: expected rows"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        polar(gaussian(3, 4), **options)


def test_bad_arrays():
    with pytest.raises(ValueError, match="x: expected rank 2 or more"):
        polar(gaussian(3))
    with pytest.raises(ValueError, match="x: expected a floating dtype, got int32"):
        polar(jnp.ones((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="x: 'zolo' needs float64"):
        polar(gaussian(2, 3, dtype=np.float32), method="zolo")
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda x: polar(x, method="zolo"))(gaussian(2, 3))
    with pytest.raises(ValueError, match="a: expected square matrices"):
        inverse_sqrt(gaussian(2, 3))
    with pytest.raises(ValueError, match="safety: expected a number in"):
        coefficients.polar_express(safety=0.9)
