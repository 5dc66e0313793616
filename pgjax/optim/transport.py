"""Optimal transport whose plan has at most k entries in a column: sparse, and smooth in its dual.

    min_T <T, C> + (γ/2) ‖T‖²   with T ≥ 0, T 1 = a, Tᵀ 1 = b, at most k non-zeros in each column

The constraint is not convex, but the semi-dual over the rows' potentials α is, and its columns'
maxima are projections onto the k-sparse simplex:

    max_α <α, a> - Σ_j b_j max_j(α),   x_j = α - C_:j,   p_j = proj_k(x_j / (γ b_j))
    max_j = <p_j, x_j> - (γ/2) b_j <p_j, p_j - 1>,       T_:j = b_j p_j

k = 1 has the value of transport without the quadratic term (up to the constant that makes a plan
with one entry a column cost nothing extra), k = m is quadratic transport.

Source: Sparsity-constrained optimal transport, 2023, arXiv 2209.15466.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks

MASS_TOLERANCE = 1e-6


class TransportInfo(NamedTuple):
    """Of a plan.

    Attributes:
      potentials: α `[m]`, of mean 0: a constant does not matter.
      value: of the semi-dual.
      row_error: largest `|T 1 - a|`; columns are right at any time.
      iterations: of the solver.
      converged: whether the row error is within the tolerance.
    """

    potentials: Float[Array, " m"]
    value: Float[Array, ""]
    row_error: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def project_simplex_topk(x: Float[Array, " m"], *, k: int) -> Float[Array, " m"]:
    """The nearest point of the simplex with at most k non-zeros: of the k largest entries.

    Args:
      x: finite; among equal entries the first ones are taken.
      k: at least 1, static; m or more is the projection onto the simplex.

    Returns:
      the point. Its derivative is that of the entries above 0: identity less their mean.

    Raises:
      ValueError: wrong rank or dtype, an empty x, k below 1.
    """
    _checks.rank("x", x, 1)
    _checks.floating(x=x)
    _checks.in_range("k", k, 1)
    if not jnp.size(x):
        raise ValueError("x: expected at least one entry, got none")
    values, places = jax.lax.top_k(x, min(k, jnp.size(x)))
    return jnp.zeros_like(x).at[places].set(optax.projections.projection_simplex(values))


def project_orthant_topk(x: Float[Array, " m"], *, k: int) -> Float[Array, " m"]:
    """The nearest non-negative point with at most k non-zeros: the k largest, if above 0.

    Columns of the plan of the dual form, with both marginals' potentials, are this of
    `(α + β_j - C_:j) / γ`.

    Args:
      x: finite.
      k: at least 1, static.

    Raises:
      ValueError: wrong rank or dtype, k below 1.
    """
    _checks.rank("x", x, 1)
    _checks.floating(x=x)
    _checks.in_range("k", k, 1)
    values, places = jax.lax.top_k(x, min(k, jnp.size(x)))
    return jnp.zeros_like(x).at[places].set(jax.nn.relu(values))


def semi_dual(
    potentials: Float[Array, " m"],
    cost: Float[Array, "m n"],
    a: Float[Array, " m"],
    b: Float[Array, " n"],
    *,
    k: int,
    gamma: Any = 1.0,
) -> Float[Array, ""]:
    """`<α, a> - Σ_j b_j max_j(α)`, concave in α; its gradient is `a - T 1`.

    Args:
      potentials: α.
      cost: C.
      a, b: marginals of rows and columns, at least 0, of one sum.
      k: at least 1, static.
      gamma: γ, above 0. May be traced.

    Raises:
      ValueError: wrong ranks or lengths, options out of range, and, outside of transformations, a
        NaN or infinite cost, negative marginals, or sums more than 1e-6 apart.
    """
    _check(cost, a, b, k, gamma)
    if jnp.shape(potentials) != jnp.shape(a):
        raise ValueError(
            f"potentials: expected shape {jnp.shape(a)} like a, got {jnp.shape(potentials)}"
        )
    alpha, wide_cost, rows, columns = _wide(potentials, cost, a, b)
    return _semi_dual(alpha, wide_cost, rows, columns, k, gamma)


def transport_plan(
    potentials: Float[Array, " m"],
    cost: Float[Array, "m n"],
    b: Float[Array, " n"],
    *,
    k: int,
    gamma: Any = 1.0,
) -> Float[Array, "m n"]:
    """`T_:j = b_j p_j`: columns sum to b whatever α is, rows to a only where α is best.

    Args:
      potentials, cost, b, k, gamma: of `semi_dual`.
    """
    alpha, wide_cost, mass = _wide(potentials, cost, b)
    best = jax.vmap(lambda x, weight: _best(k, x, weight), in_axes=(1, 0), out_axes=1)
    return mass * best(alpha[:, None] - wide_cost, gamma * mass)


def sparse_plan(
    cost: Float[Array, "m n"],
    a: Float[Array, " m"],
    b: Float[Array, " n"],
    *,
    k: int,
    gamma: Any = 1.0,
    solver: optax.GradientTransformation | None = None,
    tol: float = 1e-3,
    max_iters: int = 500,
) -> tuple[Float[Array, "m n"], TransportInfo]:
    """The plan, by ascent of the semi-dual from α = 0.

    Args:
      cost, a, b, k, gamma: of `semi_dual`. Experts as columns take at most k tokens each with
        `cost = -softmax(logits)`, a = 1 and b = T/E; the plan then says where tokens go, and the
        softmax how outputs are weighted.
      solver: of `-semi_dual`, static; None for `optax.lbfgs()`. A router takes `optax.adam(1e-2)`
        and 20 iterations.
      tol: row error at which to stop, above 0. In float32 not much below 1e-6 can be reached.
      max_iters: at least 1.

    Returns:
      plan and `TransportInfo`. Rows stay wrong and `converged` is false where no plan exists
      (`n k < m`, say), or where the dual is best at a tie between a column's entries, so that no
      plan attains its value; k a little above or below may do. The plan's derivatives are those
      of the best plan, by the implicit function theorem, for the non-zeros it has.

    Raises:
      ValueError: as `semi_dual`; tolerance or number of iterations out of range.
    """
    _check(cost, a, b, k, gamma)
    _checks.in_range("tol", tol, 0, low_open=True)
    _checks.in_range("max_iters", max_iters, 1)
    cost, a, b = _wide(cost, a, b)
    chosen = optax.with_extra_args_support(optax.lbfgs() if solver is None else solver)

    def loss(alpha: Array) -> Array:
        return -_semi_dual(alpha, cost, a, b, k, gamma)

    def row_error(slope: Array) -> Array:
        return jnp.max(jnp.abs(slope))

    def goes_on(state: Any) -> Array:
        _, _, _, slope, step = state
        return (step < max_iters) & (row_error(slope) > tol)

    def ascend(state: Any) -> Any:
        alpha, memory, value, slope, step = state
        update, memory = chosen.update(slope, memory, alpha, value=value, grad=slope, value_fn=loss)
        alpha = optax.apply_updates(alpha, update)
        return alpha, memory, *jax.value_and_grad(loss)(alpha), step + 1

    def solve(_: Any, start: Array) -> tuple[Array, tuple[Array, ...]]:
        first = (start, chosen.init(start), *jax.value_and_grad(loss)(start), jnp.int32(0))
        alpha, _, value, slope, steps = jax.lax.while_loop(goes_on, ascend, first)
        return alpha - jnp.mean(alpha), (value, row_error(slope), steps.astype(value.dtype))

    def tangent(slope_of: Any, change: Array) -> Array:
        # A constant in α changes nothing: of all solutions the shortest.
        return jnp.linalg.pinv(jax.jacfwd(slope_of)(jnp.zeros_like(change))) @ change

    alpha, (value, error, steps) = jax.lax.custom_root(
        jax.grad(loss), jnp.zeros_like(a), solve, tangent, has_aux=True
    )
    info = TransportInfo(alpha, -value, error, steps.astype(jnp.int32), error <= tol)
    return transport_plan(alpha, cost, b, k=k, gamma=gamma), info


def _wide(*arrays: Any) -> tuple[Array, ...]:
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _semi_dual(alpha: Array, cost: Array, a: Array, b: Array, k: int, gamma: Any) -> Array:
    most = jax.vmap(lambda x, weight: _most(k, x, weight), in_axes=(1, 0))
    return jnp.sum(alpha * a) - jnp.sum(b * most(alpha[:, None] - cost, gamma * b))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _most(k: int, x: Array, weight: Array) -> Array:
    """`max_p <p, x> - (weight / 2) <p, p - 1>` over the k-sparse simplex."""
    p = _best(k, x, weight)
    return jnp.sum(p * x) - 0.5 * weight * jnp.sum(p * (p - 1))


@_most.defjvp
def _most_jvp(k: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Danskin's theorem: at the best p the derivative is that for this p, held still.
    x, weight = primals
    p = _best(k, x, weight)
    slope = jnp.sum(p * tangents[0]) - 0.5 * tangents[1] * jnp.sum(p * (p - 1))
    return _most(k, x, weight), slope


def _best(k: int, x: Array, weight: Array) -> Array:
    """The best p; for a weight of 0 the best entry alone, as in the limit."""
    return project_simplex_topk(x / jnp.where(weight > 0, weight, 1e-6), k=k)


def _check(cost: Any, a: Any, b: Any, k: int, gamma: Any) -> None:
    _checks.rank("cost", cost, 2)
    _checks.floating(cost=cost, a=a, b=b)
    for name, marginal, axis in (("a", a, 0), ("b", b, 1)):
        if jnp.shape(marginal) != jnp.shape(cost)[axis : axis + 1]:
            raise ValueError(
                f"{name}: expected one for each {('row', 'column')[axis]} of cost, "
                f"{jnp.shape(cost)}, got shape {jnp.shape(marginal)}"
            )
    _checks.in_range("k", k, 1)
    _checks.in_range("gamma", gamma, 0, low_open=True)
    if not _checks.is_concrete(cost, a, b):
        return
    if not np.all(np.isfinite(cost)):
        raise ValueError("cost: expected finite numbers, got NaN or infinity")
    for name, marginal in (("a", a), ("b", b)):
        low = float(np.min(marginal, initial=np.inf))
        if not low >= 0:
            raise ValueError(f"{name}: expected masses of at least 0, got {low}")
    sums = [float(np.sum(np.asarray(x, np.float64))) for x in (a, b)]
    if not abs(sums[0] - sums[1]) <= MASS_TOLERANCE * max(1.0, sums[0]):
        raise ValueError(f"b: expected the same mass as a, {sums[0]}, got {sums[1]}")
