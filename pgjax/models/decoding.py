"""Parameters laid out for steps over a few tokens on CPUs.

A step of generation multiplies a handful of rows with every matrix, so it runs at the speed at
which matrices are read. On CPUs XLA reads a matrix stored `[out, in]` two to seven times faster
than one stored `[in, out]`, and copies a layer out of its stack before it multiplies. So a loop
over many steps first copies the parameters once: layer by layer, transposed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax.models import linear

# Leading axes that are contracted, of each matrix that `linear.project` is called on.
_IN_AXES = {
    "attention": {"query": 1, "key": 1, "value": 1, "output": 2},
    "mlp": {"gate": 1, "up": 1, "down": 1},
    "moe": {"shared_gate_proj": 1, "shared_up": 1, "shared_down": 1},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transposed:
    """A matrix for products with few rows, `[out, in]`, and a low-rank update of it if any.

    Attributes:
      matrix: all output axes as one, then all input axes as one.
      a, b: of `linear.LowRank`, as they are there; None: no update.
      out_shape: the output axes.
      scaling: of the update.
    """

    matrix: Float[Array, "out in"]
    a: Array | None
    b: Array | None
    out_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})


def transposed(weight: linear.Weight, *, in_axes: int) -> Transposed:
    """The same matrix, stored for `project`; a quantised one is dequantised."""
    base, a, b, scaling = weight, None, None, 0.0
    if isinstance(weight, linear.LowRank):
        base, a, b, scaling = weight.base, weight.a, weight.b, weight.scaling
    matrix = linear.dense(base)
    out_shape = matrix.shape[in_axes:]
    flat = matrix.reshape(math.prod(matrix.shape[:in_axes]), math.prod(out_shape))
    return Transposed(matrix=flat.T, a=a, b=b, out_shape=out_shape, scaling=scaling)


def project(
    x: Float[Array, "*batch_in"], weight: linear.Weight | Transposed, *, in_axes: int = 1
) -> Float[Array, "*batch_out"]:
    """`linear.project`, for weights stored either way."""
    if not isinstance(weight, Transposed):
        return linear.project(x, weight, in_axes=in_axes)
    batch = x.shape[: x.ndim - in_axes]
    out = few_rows(x.reshape(math.prod(batch), -1), weight.matrix)
    out = out.reshape(*batch, *weight.out_shape).astype(x.dtype)
    if weight.a is not None and weight.b is not None:
        narrow = jnp.tensordot(x, weight.a.astype(x.dtype), axes=in_axes)
        update = jnp.tensordot(narrow, weight.b.astype(x.dtype), axes=1)
        out += update * jnp.asarray(weight.scaling, x.dtype)
    return out


def few_rows(x: Float[Array, "*batch in"], matrix: Float[Array, "out in"]) -> Array:
    """`x · matrixᵀ`, float32, as the product of the matrix with the rows' transpose."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(
        matrix.astype(x.dtype),
        rows,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return out.T.reshape(*x.shape[:-1], matrix.shape[0])


def unstacked(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Parameters whose "layers" are a tuple with one tree per layer, matrices transposed.

    Args:
      params: of a decoder.
      num_layers: L.

    Returns:
      what `FunctionalDecoder.decode_step` and `extend` take as well; everything else is shared.
    """

    def layer(index: int) -> dict[str, Any]:
        tree = jax.tree.map(lambda x: x[index], params["layers"])
        for block, names in _IN_AXES.items():
            if block in tree:
                changed = {
                    name: transposed(tree[block][name], in_axes=axes)
                    for name, axes in names.items()
                    if name in tree[block]
                }
                tree = {**tree, block: {**tree[block], **changed}}
        return tree

    return {**params, "layers": tuple(layer(index) for index in range(num_layers))}
