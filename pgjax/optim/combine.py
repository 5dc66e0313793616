"""One mechanism under the matrix optimizers: momentum → view → oracle → dual norm → shape.

    M = momentum(G),   W = view(M),   U = oracle(W),   s = max(<W, U>, eps)^alpha,
    update = c(m, n) · s · unview(U)

and, like any Optax transformation, it points uphill: `optax.scale_by_learning_rate` turns it.
Leaves with matrices of the same shape go through one batched call of the oracle, so that compile
time and kernel launches depend on the number of shapes, not of leaves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pgjax import _checks, _paths
from pgjax.optim.layout import UNKNOWN, Entry, Layout, distribute, merged
from pgjax.optim.matrix import (
    SHAPE_FACTORS,
    MatrixSpec,
    Specs,
    dual_scale,
    inner,
    shape_factor,
)
from pgjax.optim.oracles import Oracle, as_oracle
from pgjax.optim.roles import specs_by_path

ORDERS = ("momentum_first", "oracle_first")
View = Callable[[Array], Array]


class MatrixState(NamedTuple):
    """The state of the momentum."""

    momentum: Any


def matrix_transform(
    oracle: Oracle | View,
    *,
    alpha: float = 0.0,
    shape: str = "none",
    view: View | None = None,
    unview: View | None = None,
    momentum: optax.GradientTransformation | None = None,
    order: str = "momentum_first",
    specs: Specs | None = None,
    layout: Layout | None = None,
    couple: int = 1,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """A matrix optimizer from its parts; the formula is at the head of this file.

    Entries of a gradient that are NaN or infinite count as 0: one bad matrix must not poison the
    momentum. Find out which leaves had them by `nonfinite_leaves`, or skip the step by
    `optax.apply_if_finite`.

    Args:
      oracle: `[b, m, n]` to the same; an `Oracle`, or any function of a batch of matrices.
      alpha: power of the dual norm, static: 0 for steps of a set size (Muon), 1 for steepest
        descent (PolarGrad).
      shape: one of `SHAPE_FACTORS`.
      view: of `[b, m, n]` before the oracle, rows being outputs; None: as it is.
      unview: of the oracle's result, linear; None: as it is.
      momentum: `optim.momentum(...)`, or any transformation of the tree; None: none.
      order: "momentum_first" as above; "oracle_first": momentum of `unview(U)`, the scale being
        the present gradient's.
      specs: which axes make a matrix; see `matrix.Specs`. None: `default_specs`, by the
        leaf's name.
      layout: how the parameters lie on a mesh (`layout_of(params)`); None: one device, or let the
        compiler choose.
      couple: so many neighbouring matrices of a leaf (a layer's experts) share one scale, the power
        of their summed inner products.
      eps: the least dual norm.

    Raises:
      ValueError: at `init` and `update`, leaves without a spec, integer leaves, leaves of rank
        below 2, each by name; here, a negative alpha and unknown options.

    Source: Lau et al., PolarGrad, 2025, arXiv 2505.21799; Bernstein and Newhouse, Old optimizer,
    new norm, 2024, arXiv 2409.20325; Jordan et al., Muon, 2024.
    """
    _checks.one_of("shape", shape, SHAPE_FACTORS)
    _checks.one_of("order", order, ORDERS)
    _checks.in_range("alpha", alpha, 0)
    _checks.in_range("eps", eps, 0, low_open=True)
    if isinstance(couple, bool) or not isinstance(couple, int) or couple < 1:
        raise ValueError(f"couple: expected an integer of at least 1, got {couple!r}")
    momentum = optax.identity() if momentum is None else momentum
    parts = _Parts(as_oracle(oracle), alpha, shape, view, unview, couple, eps)

    def init(params: Any) -> MatrixState:
        specs_by_path(specs, params)
        return MatrixState(momentum.init(params))

    def update(updates: Any, state: MatrixState, params: Any = None) -> tuple[Any, MatrixState]:
        chosen = specs_by_path(specs, updates)
        updates = jax.tree.map(
            lambda g: jnp.where(jnp.isfinite(g), g, jnp.zeros((), g.dtype)), updates
        )
        if order == "momentum_first":
            moved, now = momentum.update(updates, state.momentum, params)
            steps, _ = _directions(moved, chosen, layout, parts, scaled=True)
            return steps, MatrixState(now)
        units, scales = _directions(updates, chosen, layout, parts, scaled=False)
        moved, now = momentum.update(units, state.momentum, params)
        return jax.tree.map(lambda u, s: (s * u).astype(u.dtype), moved, scales), MatrixState(now)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What becomes of a stack of matrices."""

    oracle: Oracle
    alpha: float
    shape: str
    view: View | None
    unview: View | None
    couple: int
    eps: float

    @property
    def transposes(self) -> bool:
        return self.oracle.transposes and self.view is None and self.unview is None

    def unit_and_scale(self, stack: Float[Array, "b m n"]) -> tuple[Array, Float[Array, b]]:
        seen = stack if self.view is None else self.view(stack)
        unit = self.oracle(seen)
        if self.couple == 1:
            scale = dual_scale(seen, unit, alpha=self.alpha, eps=self.eps)
        else:
            total = inner(seen, unit).reshape(-1, self.couple).sum(-1)
            scale = jnp.repeat(jnp.maximum(total, self.eps) ** self.alpha, self.couple)
        return unit if self.unview is None else self.unview(unit), scale

    def scaled(self, stack: Float[Array, "b m n"]) -> Float[Array, "b m n"]:
        unit, scale = self.unit_and_scale(stack)
        if self.alpha == 0:
            return unit
        return (scale[:, None, None] * unit).astype(stack.dtype)


class _Plan(NamedTuple):
    """How a leaf becomes a stack of matrices, and back.

    `order` sorts the axes of `split`, the leaf's shape with blocks apart, into the stack's, whose
    shape is `size`; `lying` are the mesh axes of the stack's three, None where the leaf's do not
    make any.
    """

    size: tuple[int, int, int]
    order: tuple[int, ...]
    split: tuple[int, ...]
    shape: tuple[int, ...]
    factor: float
    lying: tuple[Entry, Entry, Entry] | None

    def stack(self, leaves: Sequence[Array]) -> Float[Array, "kb m n"]:
        """Leaves of this plan, the matrices of each behind those of the one before."""
        x = leaves[0][None] if len(leaves) == 1 else jnp.stack(leaves)
        x = jnp.transpose(x.reshape(-1, *self.split), (0, *(1 + axis for axis in self.order)))
        return x.reshape(-1, *self.size[1:])

    def back(self, y: Array) -> list[Array]:
        """A stack of such leaves as themselves, or `[kb]` as one number for all of a matrix."""
        if y.ndim == 1:
            y = jnp.broadcast_to(y[:, None, None], (len(y), *self.size[1:]))
        moved = y.reshape(-1, *[self.split[axis] for axis in self.order])
        home = (0, *(1 + self.order.index(k) for k in range(len(self.order))))
        leaves = jnp.transpose(moved, home).reshape(-1, *self.shape)
        return [leaves[0]] if len(leaves) == 1 else _unstacked(leaves)


def _unstacked(stack: Float[Array, "k ..."]) -> list[Array]:
    """The rows of a stack, in one program of XLA for CPUs.

    That compiler makes a program for each constant place at which something is sliced, and these
    were most of compiling. Places that come out of a condition are none it knows; both branches
    give the same.
    """

    def known(stack: Array) -> list[Array]:
        return list(stack)

    def unknown(stack: Array) -> list[Array]:
        def places() -> list[Array]:
            return [jnp.int32(k) for k in range(len(stack))]

        found = jax.lax.cond(stack[(0,) * stack.ndim] == 0, places, places)
        return [jax.lax.dynamic_index_in_dim(stack, k, keepdims=False) for k in found]

    return jax.lax.platform_dependent(stack, cpu=unknown, default=known)


def _plan(path: str, leaf: Array, spec: MatrixSpec, layout: Layout | None, parts: _Parts) -> _Plan:
    split, batch, out, into, source = spec.resolved(leaf.shape, path)
    entries: list[Entry] = [None] * len(split)
    if layout is not None:
        given = layout.of(path, leaf.ndim)
        # Of an axis in two parts, the first is the one that is split over devices.
        entries = [
            given[axis] if k == source.index(axis) else None for k, axis in enumerate(source)
        ]
    if parts.couple == 1:  # split batch axes first, so that the flattened one is split
        batch = tuple(sorted(batch, key=lambda axis: entries[axis] is None))
    b, m, n = (math.prod(split[axis] for axis in axes) for axes in (batch, out, into))
    if b % parts.couple:
        raise ValueError(
            f"{path}: couple {parts.couple} does not divide its {b} matrices, shape {leaf.shape}"
        )
    sides = [merged([entries[a] for a in s], [split[a] for a in s]) for s in (batch, out, into)]
    # Short sides first where the oracle does not care; of squares, the split side, or the one that
    # comes first in memory.
    split_last = sides[1] is None and sides[2] is not None
    stored = sides[1] == sides[2] and out > into
    if parts.transposes and (m > n or (m == n and (split_last or stored))):
        out, into, sides = into, out, [sides[0], sides[2], sides[1]]
    rows, columns = (math.prod(split[axis] for axis in side) for side in (out, into))
    known = layout is not None and UNKNOWN not in sides
    return _Plan(
        (b, rows, columns),
        (*batch, *out, *into),
        split,
        leaf.shape,
        shape_factor(m, n, parts.shape),
        (sides[0], sides[1], sides[2]) if known else None,
    )


def _directions(
    tree: Any, specs: dict[str, MatrixSpec], layout: Layout | None, parts: _Parts, *, scaled: bool
) -> tuple[Any, Any]:
    """Each leaf's direction, with its scale on it (then the second is None), or beside it."""
    leaves = _paths.named_leaves(tree)
    plans = {path: _plan(path, leaf, specs[path], layout, parts) for path, leaf in leaves.items()}
    # Of each size of matrix, the leaves with one plan: they are stacked as they are, then turned.
    groups: dict[Any, dict[Any, list[str]]] = {}
    for path, plan in plans.items():
        # Stacks that are split along their matrices cannot be joined without moving them.
        alone = path if plan.lying is not None and plan.lying[0] is not None else None
        group = groups.setdefault((plan.size[1:], leaves[path].dtype, plan.lying, alone), {})
        group.setdefault(plan if layout is None else path, []).append(path)
    units: dict[str, Array] = {}
    scales: dict[str, Array] = {}
    function = parts.scaled if scaled else parts.unit_and_scale
    for group in groups.values():
        alike = list(group.values())
        stacks = [plans[paths[0]].stack([leaves[path] for path in paths]) for paths in alike]
        stack = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
        lying = plans[alike[0][0]].lying
        if layout is None or lying is None:
            results = function(stack)
        else:
            results = distribute(function, stack, layout.mesh, lying)
        ends = np.cumsum([len(piece) for piece in stacks])[:-1]
        unit: Any
        scale: Any
        unit, scale = (results, None) if scaled else results
        for paths, piece in zip(alike, jnp.split(unit, ends), strict=True):
            plan = plans[paths[0]]
            piece = piece if plan.factor == 1 else plan.factor * piece
            units.update(zip(paths, plan.back(piece), strict=True))
        if scale is not None:
            for paths, piece in zip(alike, jnp.split(scale, ends), strict=True):
                scales.update(zip(paths, plans[paths[0]].back(piece), strict=True))
    return _like(tree, units), None if scaled else _like(tree, scales)


def _like(tree: Any, leaves: dict[str, Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_paths.joined(path)], tree)
