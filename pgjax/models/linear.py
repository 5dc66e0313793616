"""Products with weights that may be arrays, low-rank updates of frozen ones, or quantised."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax.models.grouped import grouped_matmul
from pgjax.models.quantization import QuantizedMatrix

Weight = Any  # an array, a LowRank or a quantised matrix
"""What stands for a matrix in a tree of parameters."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """The matrix `base + scaling · a·b`, of which only `a` and `b` have gradients.

    Attributes:
      base: an array `[*lead, *in, *out]` or a quantised one; `lead` holds layers and experts.
      a: `[*lead, *in, r]`.
      b: `[*lead, r, *out]`.
      scaling: static.

    Source: Hu et al., "LoRA", 2021, arXiv:2106.09685.
    """

    base: Weight
    a: Float[Array, "*lead_in r"]
    b: Float[Array, "*lead_r_out"]
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Of the matrix."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the base."""
        return self.base.dtype

    @property
    def lead(self) -> int:
        """Leading axes that `a`, `b` and the matrix share: `|lead| + |in| + |out|` is the rank."""
        return self.a.ndim + self.b.ndim - 2 - self.ndim

    def dense(self, dtype: Any = None) -> Array:
        """The matrix, added up in float32 or wider, then cast to `dtype` (default: the base's)."""
        dtype = self.dtype if dtype is None else dtype
        wide = jnp.promote_types(jnp.result_type(self.a, self.b), jnp.float32)
        base = jax.lax.stop_gradient(dense(self.base, wide))
        lead, ins = self.lead, self.a.ndim - 1 - self.lead
        batch = tuple(range(lead))
        product = jax.lax.dot_general(
            self.a.astype(wide),
            self.b.astype(wide),
            dimension_numbers=(((lead + ins,), (lead,)), (batch, batch)),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (base + self.scaling * product).astype(dtype)


def dense(weight: Weight, dtype: Any = None) -> Array:
    """The matrix that a weight stands for, materialised.

    Args:
      weight: an array, a `LowRank` or a quantised matrix.
      dtype: of the result; default: the weight's own.

    Returns:
      an array of the weight's shape.

    Raises:
      ValueError: something that stands for no matrix.
    """
    if isinstance(weight, LowRank | QuantizedMatrix):
        return weight.dense(dtype)
    if not isinstance(weight, jax.Array | np.ndarray):
        raise ValueError(
            f"weight: expected an array, a LowRank or a quantised matrix, got {weight!r}"
        )
    return jnp.asarray(weight, dtype)


def project(
    x: Float[Array, "*batch_in"], weight: Weight, *, in_axes: int = 1
) -> Float[Array, "*batch_out"]:
    """`x · W`, contracting the last `in_axes` axes of x with the first of the weight.

    A `LowRank` weight gives `x·base + scaling · (x·a)·b`, and the base no gradient. The backward
    pass keeps the base as it is stored: a quantised one is dequantised again, not kept dense.

    Args:
      x: `[..., *in]`; the product is in its dtype, to which the weight is cast.
      weight: `[*in, *out]`: an array, a `LowRank` or a quantised matrix.
      in_axes: at least 1, below the weight's rank.

    Returns:
      `[..., *out]`.

    Raises:
      ValueError: `in_axes` out of range, or shapes that do not fit.
    """
    shape = tuple(weight.shape)
    if not 0 < in_axes < len(shape):
        raise ValueError(
            f"in_axes: expected 1 to {len(shape) - 1} for shape {shape}, got {in_axes}"
        )
    if x.ndim < in_axes or x.shape[x.ndim - in_axes :] != shape[:in_axes]:
        raise ValueError(
            f"weight: expected first axes {x.shape[max(x.ndim - in_axes, 0) :]} like the last of "
            f"x, got shape {shape} for in_axes={in_axes}"
        )
    if isinstance(weight, LowRank):
        narrow = _contract(x, weight.a.astype(x.dtype), in_axes)
        update = _contract(narrow, weight.b.astype(x.dtype), 1)
        return _frozen_product(x, weight.base, in_axes) + update * _scalar(weight.scaling, x)
    if isinstance(weight, jax.Array | np.ndarray):
        return _contract(x, jnp.asarray(weight, x.dtype), in_axes)
    return _frozen_product(x, weight, in_axes)


def ragged_project(
    x: Float[Array, "N in"], weight: Weight, group_sizes: Int[Array, " E"]
) -> Float[Array, "N out"]:
    """`x[n] · W[e]` where rows are sorted by expert e and `group_sizes[e]` of them are e's.

    Args:
      x: rows, those of expert 0 first; the product is in its dtype.
      weight: `[E, in, out]`: an array, a `LowRank` (a `[E, in, r]`, b `[E, r, out]`), or quantised.
      group_sizes: rows of each expert; rows beyond their sum give 0.

    Returns:
      `[N, out]`.

    Raises:
      ValueError: shapes that do not fit.
    """
    shape = tuple(weight.shape)
    if x.ndim != 2 or len(shape) != 3 or x.shape[1] != shape[1]:
        raise ValueError(
            f"weight: expected shape [E, in, out] with in = x's last axis, got {shape} for x of "
            f"shape {x.shape}"
        )
    if group_sizes.shape != shape[:1]:
        raise ValueError(f"group_sizes: expected shape {shape[:1]}, got {group_sizes.shape}")
    if isinstance(weight, LowRank):
        narrow = grouped_matmul(x, weight.a.astype(x.dtype), group_sizes)
        update = grouped_matmul(narrow, weight.b.astype(x.dtype), group_sizes)
        product = _frozen_ragged_product(x, weight.base, group_sizes)
        return product + update * _scalar(weight.scaling, x)
    if isinstance(weight, jax.Array | np.ndarray):
        return grouped_matmul(x, jnp.asarray(weight, x.dtype), group_sizes)
    return _frozen_ragged_product(x, weight, group_sizes)


def _contract(x: Array, weight: Array, in_axes: int) -> Array:
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return jnp.tensordot(x, weight, axes=in_axes)
    # As a product of two matrices: between several axes of rows and the gradient of the weight XLA
    # puts transposes on CPUs that cost as much as the product. Devices may each hold a part of
    # several of these axes, which then cannot be one.
    batch, out = x.shape[: x.ndim - in_axes], weight.shape[in_axes:]
    rows = x.reshape(math.prod(batch), -1)
    return (rows @ weight.reshape(rows.shape[1], -1)).reshape(*batch, *out)


# Rematerialised, so that a scan over layers keeps for its backward pass the arrays it was given
# and not every layer's dense (or cast) matrix.
def _frozen_product(x: Array, weight: Weight, in_axes: int) -> Array:
    def product(x: Array, weight: Weight) -> Array:
        return _contract(x, dense(jax.lax.stop_gradient(weight), x.dtype), in_axes)

    return jax.checkpoint(product, prevent_cse=False)(x, weight)


def _frozen_ragged_product(x: Array, weight: Weight, group_sizes: Array) -> Array:
    def product(x: Array, weight: Weight, group_sizes: Array) -> Array:
        matrix = dense(jax.lax.stop_gradient(weight), x.dtype)
        return grouped_matmul(x, matrix, group_sizes)

    return jax.checkpoint(product, prevent_cse=False)(x, weight, group_sizes)


def _scalar(value: float, like: Array) -> Array:
    return jnp.asarray(value, like.dtype)
