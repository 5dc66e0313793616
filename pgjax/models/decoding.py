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

# Matrices of each block: those that read the same rows, so that one product does for them, and
# how many leading axes are contracted.
_PRODUCTS = {
    "attention": ((("query", "key", "value"), 1), (("output",), 2)),
    "mlp": ((("gate", "up"), 1), (("down",), 1)),
    "moe": ((("shared_gate_proj", "shared_up"), 1), (("shared_down",), 1)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transposed:
    """Matrices for products with few rows, `[out, in]`, one below the other.

    Attributes:
      matrix: all output axes of all of them as one, then all input axes as one.
      updates: (a, b) of `linear.LowRank` for each, as they are there; None: none.
      out_shapes: the output axes of each.
      scalings: of the updates.
    """

    matrix: Float[Array, "out in"]
    updates: tuple[tuple[Array, Array] | None, ...]
    out_shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    scalings: tuple[float, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Within:
    """Stands in the place of a matrix that is part of the `Transposed` of one before it."""


def transposed(*weights: linear.Weight, in_axes: int) -> Transposed:
    """The same matrices, stored for `project`; quantised ones are dequantised.

    Args:
      weights: with equal input axes.
      in_axes: how many of the leading ones they are.
    """
    matrices, updates, shapes, scalings = [], [], [], []
    for weight in weights:
        base, update, scaling = weight, None, 0.0
        if isinstance(weight, linear.LowRank):
            base, update, scaling = weight.base, (weight.a, weight.b), weight.scaling
        matrix = linear.dense(base)
        ins, out_shape = matrix.shape[:in_axes], matrix.shape[in_axes:]
        matrices.append(matrix.reshape(math.prod(ins), math.prod(out_shape)).T)
        updates.append(update)
        shapes.append(out_shape)
        scalings.append(scaling)
    return Transposed(
        matrix=jnp.concatenate(matrices) if len(matrices) > 1 else matrices[0],
        updates=tuple(updates),
        out_shapes=tuple(shapes),
        scalings=tuple(scalings),
    )


def project(
    x: Float[Array, "*batch_in"],
    *weights: linear.Weight | Transposed | Within,
    in_axes: int = 1,
) -> list[Float[Array, "*batch_out"]]:
    """`linear.project` with each weight, stored either way; in one product where they are one."""
    first = weights[0]
    if not isinstance(first, Transposed):
        return [linear.project(x, weight, in_axes=in_axes) for weight in weights]
    assert len(weights) == len(first.out_shapes)
    batch = x.shape[: x.ndim - in_axes]
    joint = few_rows(x.reshape(math.prod(batch), -1), first.matrix).astype(x.dtype)
    results, start = [], 0
    for shape, update, scaling in zip(first.out_shapes, first.updates, first.scalings, strict=True):
        end = start + math.prod(shape)
        out = joint[:, start:end].reshape(*batch, *shape)
        if update is not None:
            narrow = jnp.tensordot(x, update[0].astype(x.dtype), axes=in_axes)
            wide = jnp.tensordot(narrow, update[1].astype(x.dtype), axes=1)
            out += wide * jnp.asarray(scaling, x.dtype)
        results.append(out)
        start = end
    return results


def few_rows(x: Float[Array, "*batch in"], matrix: Float[Array, "out in"]) -> Array:
    """`x · matrixᵀ`, float32, as the product of the matrix with the rows' transpose."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(
        matrix.astype(x.dtype),
        rows,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    # Without the barrier XLA folds the transpose into the product, as rows · matrixᵀ, and that is
    # the slow one.
    out = jax.lax.optimization_barrier(out)
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
        for block, products in _PRODUCTS.items():
            if block not in tree:
                continue
            changed = dict(tree[block])
            for names, in_axes in products:
                present = [name for name in names if name in changed]
                if present:
                    weights = [changed[name] for name in present]
                    changed.update({name: Within() for name in present})
                    changed[present[0]] = transposed(*weights, in_axes=in_axes)
            tree = {**tree, block: changed}
        return tree

    return {**params, "layers": tuple(layer(index) for index in range(num_layers))}
