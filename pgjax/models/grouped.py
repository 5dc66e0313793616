"""Products of sorted rows with one matrix a group, at the cost of the rows alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 1024


def grouped_matmul(
    x: Float[Array, "N in"], weights: Float[Array, E in out], sizes: Int[Array, " E"]
) -> Float[Array, "N out"]:
    """`x[n] · weights[e]` where rows are sorted by group e and `sizes[e]` of them are e's.

    `jax.lax.ragged_dot` has a kernel of its own on TPUs, and is used there. On CPUs, and on most
    GPUs, XLA makes one product over all groups of it, with E times the FLOPs and an array of E
    copies of the rows. There blocks of one group's rows are multiplied one after the other, as
    many as there are, and a group's last block is filled with its neighbours' rows, which do not
    count: `Σ_e ⌈sizes[e] / b⌉ · b` rows' FLOPs, b about N / 2E, and no temporary array larger than
    a block or a matrix. The same holds for both gradients, each of which adds up in float32.

    Args:
      x: rows, those of group 0 first; the product is in its dtype.
      weights: one matrix a group, of x's dtype.
      sizes: rows of each group, at most N together; rows beyond their sum give 0.

    Returns:
      `[N, out]`. Reverse-mode derivatives only, except on TPUs.

    Raises:
      ValueError: shapes that do not fit.
    """
    if (
        x.ndim != 2
        or weights.ndim != 3
        or x.shape[1] != weights.shape[1]
        or sizes.shape != weights.shape[:1]
    ):
        raise ValueError(
            "weights: expected shapes [N, in], [E, in, out] and [E] of rows, weights and sizes, "
            f"got {x.shape}, {weights.shape} and {sizes.shape}"
        )
    if jax.default_backend() == "tpu":
        return jax.lax.ragged_dot(x, weights, sizes)
    return _grouped(x, weights, sizes)


@jax.custom_vjp
def _grouped(x: Array, weights: Array, sizes: Array) -> Array:
    return _rows(x, weights, sizes, transposed=False)


def _forward(x: Array, weights: Array, sizes: Array) -> tuple[Array, Any]:
    return _grouped(x, weights, sizes), (x, weights, sizes)


def _backward(kept: Any, out: Array) -> tuple[Array, Array, Any]:
    x, weights, sizes = kept
    gradient = _rows(out, weights, sizes, transposed=True)
    no_gradient = np.zeros(sizes.shape, jax.dtypes.float0)
    return gradient, _outer(x, out, sizes).astype(weights.dtype), no_gradient


_grouped.defvjp(_forward, _backward)


def _block(rows: int, groups: int) -> int:
    """A power of two near half of a group's mean size."""
    wanted = max(1, rows // (2 * groups))
    return min(max(1 << (wanted.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK, max(rows, 1))


def _padded(x: Array, block: int) -> Array:
    # The last block may reach beyond the last row; a slice would be moved back to fit.
    return jnp.pad(x, ((0, block), (0, 0)))


def _slice(x: Array, start: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, block)


def _product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _rows(x: Array, weights: Array, sizes: Array, *, transposed: bool) -> Array:
    """Every group's rows times its matrix, or its transpose."""
    count, block = x.shape[0], _block(x.shape[0], weights.shape[0])
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // block)
    last_block = jnp.cumsum(blocks)
    padded = _padded(x, block)

    def body(i: Array, out: Array) -> Array:
        group = jnp.searchsorted(last_block, i, side="right")
        within = i - (last_block[group] - blocks[group])
        start = ends[group] - sizes[group] + within * block
        weight = jax.lax.dynamic_index_in_dim(weights, group, keepdims=False)
        rows = _product(_slice(padded, start, block), weight, (1, 1 if transposed else 0))
        own = start + jnp.arange(block) < ends[group]
        # Groups come in order, so what a block writes beyond its own rows is written again.
        rows = jnp.where(own[:, None], rows, 0).astype(out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, rows, start, 0)

    out = jnp.zeros((count + block, weights.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.fori_loop(0, last_block[-1], body, out)[:count]


def _outer(x: Array, out: Array, sizes: Array) -> Array:
    """Every group's `xᵀ · out`."""
    block = _block(x.shape[0], sizes.shape[0])
    ends = jnp.cumsum(sizes)
    padded, outs = _padded(x, block), _padded(out, block)

    def of_group(_: Any, group: Array) -> tuple[None, Array]:
        first, end = ends[group] - sizes[group], ends[group]

        def body(i: Array, total: Array) -> Array:
            start = first + i * block
            own = start + jnp.arange(block) < end
            rows = jnp.where(own[:, None], _slice(padded, start, block), 0)
            return total + _product(rows, _slice(outs, start, block), (0, 0))

        zeros = jnp.zeros((x.shape[1], out.shape[1]), jnp.float32)
        total = jax.lax.fori_loop(0, -(-sizes[group] // block), body, zeros)
        return None, total.astype(x.dtype)

    return jax.lax.scan(of_group, None, jnp.arange(sizes.shape[0]))[1]
