"""A matrix in packed codes of a few bits, as a leaf of a decoder's parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pgjax.models.quantization import Int8Matrix
from pgjax.quantize import core
from pgjax.quantize.obq import QuantResult


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedMatrix(Int8Matrix):
    """A matrix as `scale · (code - zero)`, rows of codes packed without a gap.

    Integers times scales like its parent, in whose place a decoder takes it: one layer at a time
    is multiplied out, in the backward pass again.

    Attributes:
      values: packed codes, `[*lead, out, bytes]`.
      scale: `[*lead, out, groups]`, in the dtype it is stored in.
      zero: packed zero points, `[*lead, out, bytes]`.
      g_idx: `[*lead, in]`, each column's group; None where groups are of neighbours.
      bits: static.
      ins, outs: static, the matrix's input and output axes.
    """

    values: UInt8[Array, "*packed"]
    scale: Float[Array, "*groups"]
    zero: UInt8[Array, "*packed_groups"]
    g_idx: Int[Array, "*columns"] | None = None
    bits: int = dataclasses.field(metadata={"static": True})
    ins: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return (*self.values.shape[:-2], *self.ins, *self.outs)

    @property
    def dtype(self) -> Any:
        """Of the dense matrix by default: float32."""
        return jnp.dtype(jnp.float32)

    def dense(self, dtype: Any = None) -> Array:
        """The matrix, multiplied out in float32 and cast."""
        return _dense(self).astype(dtype or self.dtype)


@jax.jit
def _dense(matrix: PackedMatrix) -> Array:
    columns, groups = math.prod(matrix.ins), matrix.scale.shape[-1]
    codes = core.unpack(matrix.values, bits=matrix.bits, count=columns).astype(jnp.float32)
    zero = core.unpack(matrix.zero, bits=matrix.bits, count=groups).astype(jnp.float32)
    scale = matrix.scale.astype(jnp.float32)
    if matrix.g_idx is None:
        scale, zero = core.spread(scale, columns), core.spread(zero, columns)
    else:
        index = matrix.g_idx[..., None, :].astype(jnp.int32)
        index = jnp.broadcast_to(index, codes.shape)
        scale, zero = (jnp.take_along_axis(part, index, axis=-1) for part in (scale, zero))
    rows = scale * (codes - zero)  # [*lead, out, in]
    return jnp.swapaxes(rows, -1, -2).reshape(matrix.shape)


def packed(
    result: QuantResult,
    *,
    bits: int,
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    scale_dtype: Any = jnp.bfloat16,
    act_order: bool = False,
) -> PackedMatrix:
    """A quantised layer `[out, in]` as the decoder's matrix `[*in, *out]`.

    Args:
      result: of one layer.
      bits: those of its codes.
      ins, outs: the axes that rows and columns are made of.
      scale_dtype: of the stored scales; the one the layer was quantised with, or the matrix is
        not `result.q`.
      act_order: whether groups are not of neighbours, so that each column's has to be kept.

    Raises:
      ValueError: axes that do not make up the layer's shape.
    """
    if result.codes.shape != (math.prod(outs), math.prod(ins)):
        raise ValueError(
            f"ins, outs: expected axes of {result.codes.shape[::-1]} in all, got {ins} and {outs}"
        )
    return PackedMatrix(
        values=core.pack(result.codes, bits=bits),
        scale=result.scale.astype(scale_dtype),
        zero=core.pack(result.zero.astype(jnp.uint8), bits=bits),
        g_idx=result.g_idx.astype(jnp.uint16) if act_order else None,
        bits=bits,
        ins=ins,
        outs=outs,
    )
