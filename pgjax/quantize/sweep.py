"""The loop over columns under `obq`: blocks outside, columns inside, rows all at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pgjax.quantize import core

SHIFTS = ("next", "all")
VARIANTS = ("v2", "v1")
_HIGHEST = jax.lax.Precision.HIGHEST


def sweep(
    w: Float[Array, "r c"],
    upper: Float[Array, "c c"],
    steering: Float[Array, "c c"] | None,
    grid: tuple[Array, Array] | None,
    beta: Float[Array, ""],
    *,
    pulled: bool,
    bits: int,
    group: int,
    block: int,
    shift: str,
    variant: str,
    symmetric: bool,
    scale_dtype: Any,
) -> tuple[UInt8[Array, "r c"], Array, Array, Array, Array]:
    """Codes, columns as they were when rounded, scale, zero point and error.

    Args:
      w: columns in the order in which they are rounded.
      upper: U.
      steering: GPTAQ's P.
      grid: scale and zero point of each group; None: found on the way.
      beta: of FOEM, looked at only where `pulled`.
    """
    rows, columns = w.shape
    find = functools.partial(
        core.uniform_grid, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype
    )
    fixed = grid is not None or group == columns
    if grid is None:
        grid = find(w, group_size=group)
    # Padding to whole blocks: columns of zeros that nothing is coupled to.
    extra = -columns % block
    padded = columns + extra
    start_w = jnp.pad(w, ((0, 0), (0, extra)))
    upper = jnp.pad(upper, ((0, extra), (0, extra)))
    upper += jnp.diag((jnp.arange(padded) >= columns).astype(w.dtype))
    if steering is not None:
        steering = jnp.pad(steering, ((0, extra), (0, extra)))
    more = -(-padded // group) - grid[0].shape[1]
    scale, zero = (
        jnp.pad(part, ((0, 0), (0, more)), constant_values=1.0) for part in (grid[0], grid[1])
    )
    inside = jnp.arange(block)

    def outer(number: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        w, codes, latent, scale, zero, error = state
        start = number * block
        if not fixed and group > block:
            columns_now = jax.lax.dynamic_slice(w, (0, start), (rows, group))
            scale, zero = _renew(start % group == 0, start // group, columns_now, scale, zero, find)
        part = jax.lax.dynamic_slice(w, (0, start), (rows, block))
        part0 = jax.lax.dynamic_slice(start_w, (0, start), (rows, block))
        below = jax.lax.dynamic_slice(upper, (start, 0), (block, padded))
        square = jax.lax.dynamic_slice(below, (0, start), (block, block))
        steer = steer_square = None
        if steering is not None:
            steer = jax.lax.dynamic_slice(steering, (start, 0), (block, padded))
            steer_square = jax.lax.dynamic_slice(steer, (0, start), (block, block))

        def inner(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            part, errors, rounded, seen, scale, zero, error = state
            if not fixed and group <= block:
                columns_now = jax.lax.dynamic_slice(part, (0, i), (rows, group))
                place = (start + i) // group
                scale, zero = _renew(i % group == 0, place, columns_now, scale, zero, find)
            place = (start + i) // group
            step, offset = scale[:, place, None], zero[:, place, None]
            column, pivot = part[:, i], square[i, i]
            code = core.quantize(column[:, None], step, offset, bits=bits)
            miss = column - core.dequantize(code, step, offset)[:, 0]
            error += jnp.sum(jnp.square(miss / pivot)) / 2
            seen = seen.at[:, i].set(column)
            rounded = rounded.at[:, i].set(code[:, 0])
            free = None
            if pulled and variant == "v1":
                pull = jnp.where(inside >= i, beta * (part - part0), 0.0)
                turned = jnp.matmul(pull, square.T, precision=_HIGHEST)
                turned = jnp.where(inside >= i, turned, 0.0)
                free = jnp.matmul(turned, square, precision=_HIGHEST)
                miss -= free[:, i]
            elif pulled:
                miss -= beta * (column - part0[:, i])
            miss /= pivot
            part -= miss[:, None] * square[i]
            if free is not None:
                part -= free
            if steer_square is not None:
                part += column[:, None] * steer_square[i]
            if pulled and variant == "v2":
                moving = inside == i + 1 if shift == "next" else inside > i
                part -= jnp.where(moving, beta * (part - part0), 0.0)
            return part, errors.at[:, i].set(miss), rounded, seen, scale, zero, error

        empty = jnp.zeros_like(part)
        _, errors, rounded, seen, scale, zero, error = jax.lax.fori_loop(
            0,
            block,
            inner,
            (part, empty, empty.astype(jnp.uint8), empty, scale, zero, error),
        )
        codes = jax.lax.dynamic_update_slice(codes, rounded, (0, start))
        latent = jax.lax.dynamic_update_slice(latent, seen, (0, start))
        if block < padded:
            w = later(w, start + block, errors, seen, below, steer)
        return w, codes, latent, scale, zero, error

    def later(
        w: Array, end: Array, errors: Array, seen: Array, below: Array, steer: Array | None
    ) -> Array:
        """The columns from `end` on after all columns of a block."""
        place = jnp.arange(padded)
        every = pulled and shift == "all"
        # Of what column i did, the pulls at i, i+1, ... of its block leave so much.
        left = (1 - beta) ** (block - inside) if every else 1.0
        moved = -jnp.matmul(errors * left, below, precision=_HIGHEST)
        if steer is not None:
            moved += jnp.matmul(seen * left, steer, precision=_HIGHEST)
        if every:
            new = start_w + (1 - beta) ** block * (w - start_w) + moved
        else:
            new = w + moved
            if pulled:
                new -= jnp.where(place == end, beta * (new - start_w), 0.0)
        return jnp.where(place >= end, new, w)

    state = (
        start_w,
        jnp.zeros(start_w.shape, jnp.uint8),
        jnp.zeros_like(start_w),
        scale,
        zero,
        jnp.zeros([], w.dtype),
    )
    _, codes, latent, scale, zero, error = jax.lax.fori_loop(0, padded // block, outer, state)
    groups = columns // group
    return codes[:, :columns], latent[:, :columns], scale[:, :groups], zero[:, :groups], error


def _renew(
    due: Array, place: Array, columns: Array, scale: Array, zero: Array, find: Any
) -> tuple[Array, Array]:
    """The grids with that of one group found anew, where it is due."""

    def renewed() -> tuple[Array, Array]:
        step, offset = find(columns)
        return scale.at[:, place].set(step[:, 0]), zero.at[:, place].set(offset[:, 0])

    return jax.lax.cond(due, renewed, lambda: (scale, zero))
