"""Grids, rounding and packed codes, against NumPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import quantize
from pgjax.quantize import core


def test_grid_by_hand():
    x = jnp.array([[-1.0, 0.5, 2.0, 0.0], [3.0, 1.5, 0.3, 2.0], [0.0, 0.0, 0.0, 0.0]])
    scale, zero = quantize.uniform_grid(x, bits=2)
    np.testing.assert_allclose(scale[:, 0], [1.0, 1.0, 1.0])  # spans -1..2, 0..3, nothing
    np.testing.assert_array_equal(zero[:, 0], [1, 0, 0])
    codes = quantize.quantize(x, scale, zero, bits=2)
    # 0.5 and 1.5 are ties: to the even 0 and 2.
    np.testing.assert_array_equal(codes, [[0, 1, 3, 1], [3, 2, 0, 2], [0, 0, 0, 0]])
    want = [[-1, 0, 2, 0], [3, 2, 0, 2], [0, 0, 0, 0]]
    np.testing.assert_array_equal(quantize.dequantize(codes, scale, zero), want)
    scale, zero = quantize.uniform_grid(x, bits=2, group_size=2)
    np.testing.assert_allclose(scale, [[0.5, 2 / 3], [1.0, 2 / 3], [1.0, 1.0]], rtol=1e-6)
    scale, zero = quantize.uniform_grid(x, bits=3, symmetric=True)
    np.testing.assert_allclose(scale[:, 0], [4 / 7, 6 / 7, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(zero, np.full((3, 1), 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_half_a_step_and_ends_are_reached(bits):
    x = np.random.default_rng(bits).normal(size=(6, 32)).astype(np.float32)
    scale, zero = quantize.uniform_grid(x, bits=bits, group_size=8)
    grouped = x.reshape(6, 4, 8).astype(np.float64)
    span = np.maximum(grouped.max(-1), 0) - np.minimum(grouped.min(-1), 0)
    np.testing.assert_allclose(scale, span / (2**bits - 1), rtol=1e-6)
    assert np.asarray(zero).min() >= 0 and np.asarray(zero).max() <= 2**bits - 1
    codes = np.asarray(quantize.quantize(x, scale, zero, bits=bits)).reshape(6, 4, 8)
    assert (codes.min(-1) == 0).all() and (codes.max(-1) == 2**bits - 1).all()
    error = np.abs(np.asarray(quantize.fake_quant(x, scale, zero, bits=bits)) - x)
    step = np.repeat(np.asarray(scale), 8, axis=1)
    # Half a step from rounding; the rounded zero point moves the ends by up to half a step more.
    assert (error <= step * (1 + 1e-5)).all()
    inside = (codes.reshape(6, 32) > 0) & (codes.reshape(6, 32) < 2**bits - 1)
    assert (error <= step * (0.5 + 1e-4))[inside].all()


def test_scale_fits_its_dtype():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
    scale, _ = quantize.uniform_grid(x, bits=3, scale_dtype=jnp.bfloat16)
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale, scale.astype(jnp.bfloat16).astype(jnp.float32))
    tiny, _ = quantize.uniform_grid(x * 1e-12, bits=3, scale_dtype=jnp.float16)
    np.testing.assert_array_equal(tiny, np.ones((4, 1)))  # would be 0 in that dtype


def test_numbers_that_are_none():
    x = jnp.array([[jnp.nan, 1.0, -1.0, 2.0], [jnp.inf, 3.0, -jnp.inf, 0.0]])
    scale, zero = quantize.uniform_grid(x, bits=2)
    np.testing.assert_allclose(scale[:, 0], [1.0, 1.0])
    back = quantize.fake_quant(x, scale, zero, bits=2)
    np.testing.assert_array_equal(back, [[0, 1, -1, 2], [3, 3, 0, 0]])


def test_straight_through_gradient():
    scale, zero = jnp.full((1, 1), 0.5), jnp.full((1, 1), 1.0)  # -0.5, 0, 0.5, 1
    x = jnp.array([[-0.9, -0.2, 0.3, 0.9, 1.6]])

    def total(x, ste):
        return (quantize.fake_quant(x, scale, zero, bits=2, ste=ste) * jnp.arange(1.0, 6)).sum()

    np.testing.assert_array_equal(jax.grad(total)(x, True), [[0, 2, 3, 4, 0]])
    np.testing.assert_array_equal(jax.grad(total)(x, False), np.zeros((1, 5)))
    for ste in (True, False):
        np.testing.assert_allclose(
            quantize.fake_quant(x, scale, zero, bits=2, ste=ste), [[-0.5, 0, 0.5, 1, 1]], atol=1e-6
        )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [7, 32])
def test_packing_is_a_stream_of_bits(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, (3, 2, count)).astype(np.uint8)
    packed = jax.jit(lambda c: quantize.pack(c, bits=bits))(codes)
    assert packed.dtype == jnp.uint8 and packed.shape[-1] == quantize.packed_width(count, bits)
    stream = (codes[..., None] >> np.arange(bits)) & 1
    want = np.packbits(stream.reshape(3, 2, -1), axis=-1, bitorder="little")
    np.testing.assert_array_equal(packed[..., : want.shape[-1]], want)
    assert not np.asarray(packed)[..., want.shape[-1] :].any()
    back = jax.jit(lambda p: quantize.unpack(p, bits=bits, count=count))(packed)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


def test_sizes():
    assert [quantize.packed_width(64, b) for b in (2, 3, 4, 8)] == [16, 24, 32, 64]
    assert quantize.packed_width(9, 3) == 6
    tree = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": [jnp.zeros(5, jnp.uint8)]}
    assert quantize.num_bytes(tree) == 17
    assert quantize.num_bytes(jax.eval_shape(lambda: tree)) == 17


def test_under_vmap_and_jit():
    x = np.random.default_rng(3).normal(size=(4, 5, 12)).astype(np.float32)

    def one(x):
        return quantize.fake_quant(x, *quantize.uniform_grid(x, bits=3, group_size=4), bits=3)

    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x), one(jnp.asarray(x)), rtol=1e-6)


def test_bad_input():
    x = jnp.ones((2, 6))
    for bits in (1, 9, 2.0, True):
        with pytest.raises(ValueError, match="bits: expected an int of 2 to 8"):
            quantize.uniform_grid(x, bits=bits)
    for group in (0, 4, -1, 2.0):
        with pytest.raises(ValueError, match="group_size: expected a divisor of 6"):
            quantize.uniform_grid(x, bits=2, group_size=group)
    with pytest.raises(ValueError, match="x: expected a floating dtype"):
        quantize.uniform_grid(jnp.ones((2, 6), int), bits=2)
    with pytest.raises(ValueError, match="at least one axis"):
        quantize.uniform_grid(jnp.float32(1.0), bits=2)
    with pytest.raises(ValueError, match="4 groups do not divide 6"):
        core.spread(jnp.ones((2, 4)), 6)
    with pytest.raises(ValueError, match="codes: expected dtype uint8"):
        quantize.pack(jnp.ones(4, jnp.int32), bits=4)
    with pytest.raises(ValueError, match="packed: expected dtype uint8"):
        quantize.unpack(jnp.ones(4, jnp.int32), bits=4, count=8)
    with pytest.raises(ValueError, match="expected 3 bytes for 8 codes of 3 bits, got shape"):
        quantize.unpack(jnp.zeros(4, jnp.uint8), bits=3, count=8)
    with pytest.raises(ValueError, match="bits: expected an int of 1 to 8, got 9"):
        quantize.pack(jnp.zeros(4, jnp.uint8), bits=9)
