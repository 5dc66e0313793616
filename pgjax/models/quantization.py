"""Frozen weights in 8 or 4 bits, as leaves of a tree of parameters."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, UInt8

from pgjax import _checks, _paths
from pgjax.models import matrices

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Dettmers et al., 2023, appendix E."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Matrix:
    """A matrix as `scale · values`.

    Attributes:
      values: in [-127, 127], `[*lead, *in, *out]`.
      scale: of the same rank, 1 along the inputs.
    """

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*scale_shape"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        """Of the scale, and by default of the dense matrix."""
        return self.scale.dtype

    def dense(self, dtype: Any = None) -> Array:
        """The matrix, multiplied out in the scale's dtype and cast."""
        return (self.values.astype(self.dtype) * self.scale).astype(dtype or self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4Matrix:
    """A matrix as `scale · NF4_LEVELS[code]`, scales of blocks along the last input axis.

    Attributes:
      codes: two a byte; the low bits are those of a block's first half.
      scale: one for each block.
      axis: static, of the blocks, counted from the end; leading axes can be sliced away.
    """

    codes: UInt8[Array, "*packed_shape"]
    scale: Float[Array, "*scale_shape"]
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Of the scale, and by default of the dense matrix."""
        return self.scale.dtype

    def dense(self, dtype: Any = None) -> Array:
        """The matrix, multiplied out in the scale's dtype and cast."""
        codes = _blocked(self.codes, self.axis, self.scale.shape[self.axis])
        halves = [_level(codes & 15, self.dtype), _level(codes >> 4, self.dtype)]
        values = jnp.concatenate(halves, axis=self.axis)
        scaled = values * jnp.expand_dims(self.scale, self.axis)
        return scaled.reshape(self.shape).astype(dtype or self.dtype)


QuantizedMatrix = Int8Matrix | NF4Matrix


def int8(params: Mapping[str, Any], *, targets: Sequence[str] = ("*",)) -> dict[str, Any]:
    """Parameters with the layers' matrices in 8 bits, for use as a frozen base.

        W ≈ s · q,   q = round(W / s),   s = max|W| / 127 over the inputs of each output

    No entry is off by more than s / 2. The decoder multiplies out one layer at a time, in the
    backward pass again.

    Args:
      params: the decoder's, or a tree that holds them.
      targets: globs of "/"-joined paths such as "layers/mlp/*" among the layers' matrices.

    Returns:
      a tree like `params` with `Int8Matrix` leaves, placed as the arrays were; a mesh axis that
      does not divide an axis of the scales is dropped there.

    Raises:
      ValueError: a pattern that matches no matrix, or a target that is no array.
    """
    return _replaced(params, targets, None)


def nf4(
    params: Mapping[str, Any], *, targets: Sequence[str] = ("*",), block_size: int = 64
) -> dict[str, Any]:
    """Parameters with the layers' matrices in 4-bit NormalFloat, for use as a frozen base.

        W ≈ s · level[q],   the nearest of 16 levels,   s = max|W| of each block

    A block is `block_size` consecutive entries of the last input axis, with a float32 scale:
    `4 + 32 / block_size` bits a weight. The decoder multiplies out one layer at a time, in the
    backward pass again.

    Args:
      params: the decoder's, or a tree that holds them.
      targets: globs of "/"-joined paths such as "layers/mlp/*" among the layers' matrices.
      block_size: even; divides the last input axis of every target.

    Returns:
      as `int8`, with `NF4Matrix` leaves.

    Raises:
      ValueError: as `int8`, and a block size that is odd or does not divide.

    Source: Dettmers et al., "QLoRA", 2023, arXiv:2305.14314; the scales are not quantised in
    turn ("double quantisation"), and blocks run along the inputs only.
    """
    _checks.in_range("block_size", block_size, 2)
    if block_size % 2:
        raise ValueError(f"block_size: expected an even number, got {block_size}")
    return _replaced(params, targets, block_size)


def _replaced(
    params: Mapping[str, Any], targets: Sequence[str], block_size: int | None
) -> dict[str, Any]:
    """The targets as `NF4Matrix`, or as `Int8Matrix` where there is no block size."""
    layouts = matrices.of(params)
    targets = _paths.sequence_of_patterns("targets", targets)
    _paths.check_patterns("targets", targets, layouts, "matrices")

    def leaf(path: Any, weight: Any) -> Any:
        name = _paths.joined(path)
        if name not in layouts or not any(_paths.matches(p, name) for p in targets):
            return weight
        if not isinstance(weight, jax.Array):
            raise ValueError(f"{name}: expected a JAX array, got {type(weight).__name__}")
        layout = layouts[name]
        size = weight.shape[-layout.outs - 1]
        if block_size is not None and size % block_size:
            raise ValueError(
                f"block_size: {block_size} does not divide {size}, the last input axis of {name}"
            )
        where = weight.sharding if isinstance(weight.sharding, NamedSharding) else None
        return _quantized(weight, layout=layout, block_size=block_size, where=where)

    return jax.tree_util.tree_map_with_path(leaf, dict(params), is_leaf=matrices.is_leaf)


@functools.partial(jax.jit, static_argnames=("layout", "block_size", "where"))
def _quantized(
    weight: Array,
    *,
    layout: matrices.Layout,
    block_size: int | None,
    where: NamedSharding | None,
) -> QuantizedMatrix:
    """Each layer in turn, so that no float32 copy of all is made, on the weight's devices."""
    layout = layout._replace(lead=layout.lead - 1)
    matrix: QuantizedMatrix
    if block_size is None:
        matrix = jax.lax.map(lambda layer: _int8(layer, layout), weight)
    else:
        matrix = jax.lax.map(lambda layer: _nf4(layer, layout, block_size), weight)
    if where is None:
        return matrix
    shardings = jax.tree.map(lambda x: _fitting(where, x.shape), matrix)
    return jax.lax.with_sharding_constraint(matrix, shardings)


def _int8(weight: Array, layout: matrices.Layout) -> Int8Matrix:
    wide = weight.astype(jnp.float32)
    inputs = tuple(range(layout.lead, layout.lead + layout.ins))
    scale = _nonzero(jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / 127)
    return Int8Matrix(values=jnp.round(wide / scale).astype(jnp.int8), scale=scale)


def _nf4(weight: Array, layout: matrices.Layout, block_size: int) -> NF4Matrix:
    axis = -layout.outs - 1
    blocks = _blocked(weight.astype(jnp.float32), axis, weight.shape[axis] // block_size)
    scale = _nonzero(jnp.max(jnp.abs(blocks), axis=axis, keepdims=True))
    ratio = blocks / scale
    code = sum(
        (ratio > (low + high) / 2).astype(jnp.uint8) for low, high in itertools.pairwise(NF4_LEVELS)
    )
    first, second = jnp.split(code, 2, axis=axis)
    shape = list(weight.shape)
    shape[axis] //= 2
    return NF4Matrix(
        codes=(first | second << 4).reshape(shape), scale=jnp.squeeze(scale, axis), axis=axis
    )


def _blocked(x: Array, axis: int, count: int) -> Array:
    """`[..., n, *out]` as `[..., count, n / count, *out]`; `axis`, from the end, is then inside."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], count, x.shape[at] // count, *x.shape[at + 1 :])


def _level(code: Array, dtype: Any) -> Array:
    return jnp.asarray(NF4_LEVELS, dtype).at[code].get(mode="promise_in_bounds")


def _nonzero(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, 1.0)


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without mesh axes that do not divide the shape's axes."""
    entries = []
    for size, entry in zip(shape, (*sharding.spec, *[None] * len(shape)), strict=False):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        ways = math.prod(sharding.mesh.shape[n] for n in names)
        entries.append(entry if size % ways == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
