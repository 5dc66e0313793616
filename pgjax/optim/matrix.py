"""What matrix optimizers share: which axes make a matrix, and a few functions of stacks of them.

A leaf in canonical form is `[b, m, n]`: b matrices with m outputs and n inputs each, so that a row
is always an output: a neuron, an expert, a word of the vocabulary. Flax keeps a projection as
(inputs, outputs) and an embedding as (words, features); `MatrixSpec` says which is which.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks, _paths
from pgjax._arrays import safe_sqrt, widened

SHAPE_FACTORS = ("none", "keller", "spectral", "moonshot")


class Axes(NamedTuple):
    """A leaf's axes sorted into a matrix's, after axes with blocks were split in two.

    Attributes:
      shape: of the leaf with these axes split, blocks first.
      batch, out, into: axes of that shape.
      source: the leaf's own axis of each.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    out: tuple[int, ...]
    into: tuple[int, ...]
    source: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """The axes of a leaf that make a matrix; axes not named are batch axes.

    Attributes:
      out_axes: axes of the matrix's rows, in order; several are flattened into one.
      in_axes: axes of its columns. Negative axes count from the end.
      blocks: (axis, count) pairs: that axis holds so many equal blocks, each of which is a matrix
        of its own (heads, or query, key and value in one projection).
    """

    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...] = ()

    def resolved(self, shape: Sequence[int], name: str) -> Axes:
        """The axes for a leaf of this shape; ValueError, naming the leaf, where they do not fit."""
        rank = len(shape)

        def axis_of(side: str, axis: int) -> int:
            if not -rank <= axis < rank:
                raise ValueError(
                    f"{name}: {side} has axis {axis}, but the leaf has shape {tuple(shape)}"
                )
            return axis % rank

        sides = {"out_axes": self.out_axes, "in_axes": self.in_axes}
        for side, axes in sides.items():
            if not axes:
                raise ValueError(f"{name}: {side} of its MatrixSpec names no axis")
        out, into = ([axis_of(side, a) for a in axes] for side, axes in sides.items())
        if len({*out, *into}) != len(out) + len(into):
            raise ValueError(
                f"{name}: out_axes {self.out_axes} and in_axes {self.in_axes} overlap "
                f"in a leaf of shape {tuple(shape)}"
            )
        counts = {axis_of("blocks", axis): count for axis, count in self.blocks}
        sizes: list[int] = []
        source: list[int] = []
        place: dict[int, int] = {}
        batch: list[int] = []
        for axis, size in enumerate(shape):
            count = counts.get(axis)
            if count is not None:
                if count < 1 or size % count:
                    raise ValueError(
                        f"{name}: {count} blocks do not divide axis {axis} of shape {tuple(shape)}"
                    )
                batch.append(len(sizes))
                sizes.append(count)
                source.append(axis)
                size //= count
            place[axis] = len(sizes)
            if axis not in {*out, *into}:
                batch.append(len(sizes))
            sizes.append(size)
            source.append(axis)
        return Axes(
            tuple(sizes),
            tuple(batch),
            tuple(place[axis] for axis in out),
            tuple(place[axis] for axis in into),
            tuple(source),
        )


Specs = Callable[[Any], Any] | Mapping[str, MatrixSpec] | Any
"""`MatrixSpec`s of a tree: a tree like the parameters, specs by joined path ("layers/mlp/up"), or a
function from the tree to either."""

DENSE = MatrixSpec(out_axes=(-1,), in_axes=(-2,))
"""Flax's projections: inputs, then outputs, behind any batch axes."""


def check_matrix(name: str, leaf: Any) -> None:
    """Raises ValueError unless the leaf is a floating array of rank 2 or more."""
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: a matrix transform needs a floating leaf, got {dtype}")
    if jnp.ndim(leaf) < 2:
        raise ValueError(
            f"{name}: a matrix transform needs a leaf of rank 2 or more, got shape "
            f"{jnp.shape(leaf)}; route it to another optimizer"
        )


def to_canonical(x: Array, spec: MatrixSpec, *, name: str = "x") -> Float[Array, "b m n"]:
    """The leaf as `[b, m, n]`: b matrices of m outputs and n inputs.

    Raises:
      ValueError: axes that the leaf lacks, or that overlap; blocks that do not divide.
    """
    axes = spec.resolved(x.shape, name)
    sides = (axes.batch, axes.out, axes.into)
    size = [math.prod(axes.shape[axis] for axis in side) for side in sides]
    return jnp.transpose(x.reshape(axes.shape), sum(sides, ())).reshape(size)


def from_canonical(
    y: Float[Array, "b m n"], spec: MatrixSpec, shape: Sequence[int], *, name: str = "y"
) -> Array:
    """The inverse of `to_canonical` for a leaf of this shape."""
    axes = spec.resolved(shape, name)
    order = (*axes.batch, *axes.out, *axes.into)
    back = tuple(order.index(axis) for axis in range(len(order)))
    return jnp.transpose(y.reshape([axes.shape[axis] for axis in order]), back).reshape(shape)


def inner(x: Float[Array, "*b m n"], u: Float[Array, "*b m n"]) -> Float[Array, "*b"]:
    """`<X, U>` of each matrix: the sum over the last two axes only, in float32 or wider."""
    _checks.same_shape(x=x, u=u)
    return jnp.sum(widened(x) * widened(u), axis=(-2, -1))


def dual_scale(
    x: Float[Array, "*b m n"], u: Float[Array, "*b m n"], *, alpha: float, eps: float = 1e-8
) -> Float[Array, "*b"]:
    """`max(<X, U>, eps)^alpha`, the power of the dual norm; exactly 1 where alpha is 0.

    For the polar factor U of X, `<X, U>` is the nuclear norm. A zero matrix has scale `eps^alpha`.

    Raises:
      ValueError: a negative alpha, eps not above 0.
    """
    _checks.in_range("alpha", alpha, 0)
    _checks.in_range("eps", eps, 0, low_open=True)
    value = inner(x, u)
    if isinstance(alpha, int | float) and alpha == 0:
        return jnp.ones_like(value)
    return jnp.maximum(value, eps) ** alpha


def frobenius_norm(x: Float[Array, "*b m n"]) -> Float[Array, "*b 1 1"]:
    """`‖X‖_F` of each matrix in float32 or wider; its gradient at 0 is 0, not NaN."""
    return safe_sqrt(jnp.sum(jnp.square(widened(x)), axis=(-2, -1), keepdims=True))


def row_normalize(x: Float[Array, "*b m n"], *, eps: float = 1e-8) -> Float[Array, "*b m n"]:
    """Each row over its length: `x_i / (‖x_i‖ + eps)`, norms in float32; zero rows stay zero."""
    _checks.in_range("eps", eps, 0, low_open=True)
    rows = widened(x)
    norm = safe_sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))
    return (rows / (norm + eps)).astype(x.dtype)


def center_rows(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Each row less the mean row, which a softmax over the rows' outputs cannot see."""
    rows = widened(x)
    return (rows - jnp.mean(rows, axis=-2, keepdims=True)).astype(x.dtype)


def shape_factor(m: int, n: int, kind: str) -> float:
    """A matrix's step in units of its shape (m outputs, n inputs).

    `none`: 1. `keller`: √max(1, m/n). `spectral`: √(m/n). `moonshot`: 0.2 √max(m, n), at which the
    root mean square of an exact polar factor's entries is 0.2, as AdamW's typically is.

    Raises:
      ValueError: another kind, sides below 1.
    """
    _checks.one_of("kind", kind, SHAPE_FACTORS)
    if m < 1 or n < 1:
        raise ValueError(f"shape_factor: expected sides of at least 1, got m={m}, n={n}")
    return {
        "none": 1.0,
        "keller": math.sqrt(max(1.0, m / n)),
        "spectral": math.sqrt(m / n),
        "moonshot": 0.2 * math.sqrt(max(m, n)),
    }[kind]


def nonfinite_leaves(tree: Any) -> list[str]:
    """Paths of the leaves that hold a NaN or an infinity; for concrete trees, outside `jit`."""
    named = _paths.named_leaves(tree)
    whole = jax.device_get({path: jnp.all(jnp.isfinite(leaf)) for path, leaf in named.items()})
    return [path for path, finite in whole.items() if not finite]


def map_named(function: Callable[..., tuple[Any, ...]], count: int, tree: Any, *rest: Any) -> list:
    """`count` trees like `tree`, of the results of `function(path, leaf, ...)`; `rest` like it."""
    structure: Any = jax.tree.structure(tree)
    leaves = [structure.flatten_up_to(other) for other in (tree, *rest)]
    paths = _paths.named_leaves(tree)
    results = [function(path, *each) for path, *each in zip(paths, *leaves, strict=True)]
    return [structure.unflatten([result[k] for result in results]) for k in range(count)]


def canonical_shape(name: str, leaf: Any, spec: MatrixSpec) -> tuple[int, int, int]:
    """(b, m, n) of a leaf's matrices."""
    axes = spec.resolved(jnp.shape(leaf), name)
    b, m, n = (
        math.prod(axes.shape[axis] for axis in side) for side in (axes.batch, axes.out, axes.into)
    )
    return b, m, n
