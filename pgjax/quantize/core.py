"""Uniform grids of a few bits, rounding to them, and codes packed without a gap.

A matrix is `[out, in]`: rows are quantised alone, and along a row `group_size` neighbouring
columns share one step and one zero point.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pgjax import _checks


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "scale_dtype"))
def uniform_grid(
    x: Float[Array, "*rows c"],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    scale_dtype: Any = jnp.float32,
) -> tuple[Float[Array, "*rows k"], Float[Array, "*rows k"]]:
    """Step and zero point of the grid that spans each group from its least to its largest entry.

        s = (max - min) / (2^b - 1),   z = round(-min / s)

    The span always holds 0, so that 0 is a grid point and z fits into b bits; without that rule
    (the GPTQ code has it, the papers' formula does not) z is negative for groups of one sign.

    Args:
      x: any floating array; entries that are NaN or infinite count as 0.
      bits: static, 2 to 8.
      group_size: static, divides the last axis; None: one group a row.
      symmetric: static; the span is ±max|x| and z is 2^(b-1).
      scale_dtype: s is rounded to what this dtype can hold, so that it can be stored in it.

    Returns:
      scale: positive; 1 for a group of zeros. Float32 or wider.
      zero: whole numbers in [0, 2^b - 1], in the same dtype.

    Raises:
      ValueError: bits out of range, a group size that does not divide, no axis, a dtype that is
        not floating.

    Source: Frantar et al., "GPTQ", 2022, arXiv:2210.17323.
    """
    levels = check_bits(bits)
    _checks.floating(x=x)
    wide = _finite(x)
    if wide.ndim < 1:
        raise ValueError("x: expected at least one axis, got a scalar")
    columns = wide.shape[-1]
    size = check_group(group_size, columns)
    grouped = wide.reshape(*wide.shape[:-1], columns // size, size)
    low, high = jnp.minimum(grouped.min(-1), 0.0), jnp.maximum(grouped.max(-1), 0.0)
    if symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    scale = ((high - low) / levels).astype(scale_dtype).astype(wide.dtype)
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)
    if symmetric:
        return scale, jnp.full_like(scale, (levels + 1) // 2)
    return scale, jnp.clip(jnp.round(-low / scale), 0, levels)


@functools.partial(jax.jit, static_argnames=("bits",))
def quantize(
    x: Float[Array, "*rows c"],
    scale: Float[Array, "*rows k"],
    zero: Float[Array, "*rows k"],
    *,
    bits: int,
) -> UInt8[Array, "*rows c"]:
    """Codes `clip(round(x / s) + z, 0, 2^b - 1)`; ties go to the even number, NaN to the code of 0.

    Args:
      x: any floating array.
      scale, zero: of the k groups of each row, as from `uniform_grid`.
      bits: static, 2 to 8.

    Raises:
      ValueError: bits out of range, groups that do not divide the last axis.
    """
    levels = check_bits(bits)
    scale, zero = spread(scale, x.shape[-1]), spread(zero, x.shape[-1])
    steps = jnp.round(x.astype(scale.dtype) / scale)
    codes = jnp.clip(jnp.where(jnp.isnan(steps), 0.0, steps) + zero, 0, levels)
    return codes.astype(jnp.uint8)


@jax.jit
def dequantize(
    codes: UInt8[Array, "*rows c"], scale: Float[Array, "*rows k"], zero: Float[Array, "*rows k"]
) -> Float[Array, "*rows c"]:
    """`s · (code - z)`."""
    scale, zero = spread(scale, codes.shape[-1]), spread(zero, codes.shape[-1])
    return scale * (codes.astype(scale.dtype) - zero)


@functools.partial(jax.jit, static_argnames=("bits", "ste"))
def fake_quant(
    x: Float[Array, "*rows c"],
    scale: Float[Array, "*rows k"],
    zero: Float[Array, "*rows k"],
    *,
    bits: int,
    ste: bool = False,
) -> Float[Array, "*rows c"]:
    """The nearest grid point of each entry: `s · (clip(round(x / s) + z, 0, 2^b - 1) - z)`.

    Args:
      x: any floating array.
      scale, zero: of the k groups of each row.
      bits: static, 2 to 8.
      ste: static; gradients pass to x as if there were no rounding, and are 0 beyond the grid's
        ends. Otherwise they are 0 everywhere.

    Returns:
      in the dtype of x.
    """
    levels = check_bits(bits)
    rounded = dequantize(quantize(x, scale, zero, bits=bits), scale, zero).astype(x.dtype)
    if not ste:
        return rounded
    scale, zero = spread(scale, x.shape[-1]), spread(zero, x.shape[-1])
    held = jnp.clip(x, (-zero * scale).astype(x.dtype), ((levels - zero) * scale).astype(x.dtype))
    return held + jax.lax.stop_gradient(rounded - held)


@functools.partial(jax.jit, static_argnames=("bits",))
def pack(codes: UInt8[Array, "*rows c"], *, bits: int) -> UInt8[Array, "*rows w"]:
    """Codes as one stream of bits along the last axis, low bits first.

    Rows are filled up with zeros to whole units: 4 codes a byte at 2 bits, 8 in three bytes at 3
    bits, 2 a byte at 4 bits.

    Args:
      codes: in [0, 2^bits); higher bits are dropped.
      bits: static, 1 to 8.

    Returns:
      `[..., w]` with `w = packed_width(c, bits)`.

    Raises:
      ValueError: another dtype, bits out of range.
    """
    if codes.dtype != jnp.uint8:
        raise ValueError(f"codes: expected dtype uint8, got {codes.dtype}")
    count, width = _unit(bits)
    extra = -codes.shape[-1] % count
    padded = jnp.pad(codes & (2**bits - 1), [(0, 0)] * (codes.ndim - 1) + [(0, extra)])
    units = padded.reshape(*codes.shape[:-1], -1, count).astype(jnp.uint16)
    parts = []
    for byte in range(width):
        part = jnp.zeros(units.shape[:-1], jnp.uint16)
        for i in range(count):
            shift = i * bits - 8 * byte
            if -bits < shift < 8:
                code = units[..., i]
                part |= code << shift if shift >= 0 else code >> -shift
        parts.append((part & 255).astype(jnp.uint8))
    return jnp.stack(parts, axis=-1).reshape(*codes.shape[:-1], -1)


@functools.partial(jax.jit, static_argnames=("bits", "count"))
def unpack(packed: UInt8[Array, "*rows w"], *, bits: int, count: int) -> UInt8[Array, "*rows c"]:
    """The first `count` codes of each row; the exact inverse of `pack`.

    Raises:
      ValueError: another dtype, bits out of range, a width that is not that of so many codes.
    """
    if packed.dtype != jnp.uint8:
        raise ValueError(f"packed: expected dtype uint8, got {packed.dtype}")
    wanted = packed_width(count, bits)
    if packed.shape[-1] != wanted:
        raise ValueError(
            f"packed: expected {wanted} bytes for {count} codes of {bits} bits, got shape "
            f"{packed.shape}"
        )
    per_unit, width = _unit(bits)
    units = packed.reshape(*packed.shape[:-1], -1, width).astype(jnp.uint16)
    codes = []
    for i in range(per_unit):
        code = jnp.zeros(units.shape[:-1], jnp.uint16)
        for byte in range(width):
            shift = i * bits - 8 * byte
            if -bits < shift < 8:
                part = units[..., byte]
                code |= part >> shift if shift >= 0 else part << -shift
        codes.append((code & (2**bits - 1)).astype(jnp.uint8))
    return jnp.stack(codes, axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of a row take."""
    per_unit, width = _unit(bits)
    return -(-count // per_unit) * width


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, as they are stored."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def spread(grouped: Float[Array, "*rows k"], columns: int) -> Float[Array, "*rows c"]:
    """Each group's value at each of its columns."""
    groups = grouped.shape[-1]
    if groups < 1 or columns % groups:
        raise ValueError(f"scale: {groups} groups do not divide {columns} columns")
    return jnp.repeat(grouped, columns // groups, axis=-1)


def check_bits(bits: int) -> int:
    """The highest code, `2^bits - 1`; ValueError unless bits is an int of 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: expected an int of 2 to 8, got {bits!r}")
    return 2**bits - 1


def check_group(group_size: int | None, columns: int) -> int:
    """The group size, a whole row for None; ValueError unless it divides."""
    size = columns if group_size is None else group_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or columns % size:
        raise ValueError(f"group_size: expected a divisor of {columns} columns, got {group_size!r}")
    return size


def _unit(bits: int) -> tuple[int, int]:
    """Fewest codes that fill whole bytes, and those bytes."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: expected an int of 1 to 8, got {bits!r}")
    count = 8 // math.gcd(bits, 8)
    return count, count * bits // 8


def _finite(x: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(jnp.isfinite(wide), wide, 0.0)
