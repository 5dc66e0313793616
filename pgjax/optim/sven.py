"""Singular value descent (Sven): a batch is a system of equations, a step its least solution.

B residuals `R(θ)` are to vanish at once. With their Jacobian `M = U S Vᵀ` (`[B, P]`), the step
solves the linearised system by a pseudo-inverse of rank k:

    θ ← θ - η V_k diag(1/s) U_kᵀ R,    s_i > rtol s_0 and s_i > 1e-10 for those that are kept.

Where equations outnumber parameters this is Gauss-Newton, where parameters do, the minimum-norm
solution. The direction is a tree like the parameters: it may go through any Optax transform, such
as `optax.scale_by_rms`, in place of a gradient. Far from a solution small singular values make
steps very long; `optax.clip_by_global_norm` limits them, which the paper does not.

Source: Sven, 2026, arXiv 2604.01279.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pgjax import _checks, _paths
from pgjax.optim import per_sample, points
from pgjax.optim.pseudo_inverse import PinvInfo, cut, pieces_of, pinv_direction, rank_of, times

ResidualFn = Callable[[Any, Any], Array]


def sven_direction(
    residual_fn: ResidualFn,
    params: Any,
    batch: Any,
    *,
    k: int | None = None,
    rtol: float = 1e-3,
    method: str = "gram",
    key: PRNGKeyArray | None = None,
    power_steps: int = 2,
    where: Any = None,
    column_scale: Any = None,
    max_bytes: int = 2**31,
) -> tuple[Any, PinvInfo]:
    """`pinv_direction` of a batch: a tree like the parameters, in the place of a gradient.

    Args:
      residual_fn: (params, example) to a residual, or a vector of them, each a row of its own.
        Signed residuals give Gauss-Newton; `loss_residual` makes residuals of any loss.
      params: tree of floating arrays, P numbers in all.
      batch: tree of arrays with a leading axis of B examples.
      k, rtol, method, key, power_steps: of `pinv_direction`; B counts residuals.
      where: bool, tree like the parameters: which of them may move; see `parameter_subset`.
      column_scale: positive, tree like the parameters: steps are shortest in `‖scale · step‖`
        instead of their own norm, such as the root of averaged squared gradients.
      max_bytes: largest Jacobian (B · P numbers) that may be made.

    Returns:
      the direction, in the parameters' dtypes, and a `PinvInfo`.

    Raises:
      ValueError: as `pinv_direction`; a Jacobian above the limit; leaves without a common leading
        axis.

    The paper divides the Jacobian's columns by a scale; here the step is divided too, so that it
    still solves the system.
    """
    residuals, jac, unravel = _linearised(residual_fn, params, batch, max_bytes)
    if _checks.is_concrete(residuals) and not np.all(np.isfinite(residuals)):
        raise ValueError("residual_fn: expected finite residuals (a root of a negative loss?)")
    scale = jnp.ones(jac.shape[1], jac.dtype)
    if column_scale is not None:
        scale = 1 / _like(params, column_scale, "column_scale").astype(jac.dtype)
    if where is not None:
        scale = jnp.where(_like(params, where, "where").astype(bool), scale, 0)
    given = where is not None or column_scale is not None
    direction, info = pinv_direction(
        jac * scale if given else jac,
        residuals,
        k=k,
        rtol=rtol,
        method=method,
        key=key,
        power_steps=power_steps,
    )
    return unravel(direction * scale if given else direction), info


def sven_step(
    residual_fn: ResidualFn, params: Any, batch: Any, *, learning_rate: Any = 0.1, **options: Any
) -> tuple[Any, PinvInfo]:
    """`θ - η` times `sven_direction`, which takes the options; returns the new parameters.

    Args:
      learning_rate: η, at least 0; with signed residuals of a linear model, 1 solves them. May be
        traced.
    """
    _checks.in_range("learning_rate", learning_rate, 0)
    direction, info = sven_direction(residual_fn, params, batch, **options)
    moved = jax.tree.map(lambda p, d: (p - learning_rate * d).astype(p.dtype), params, direction)
    return moved, info


def sven_greedy_step(
    residual_fn: ResidualFn,
    params: Any,
    batch: Any,
    *,
    objective: Callable[[Float[Array, " B"]], Array] = lambda r: jnp.mean(jnp.square(r)),
    learning_rate: Any = 0.1,
    k: int | None = None,
    rtol: float = 1e-3,
    max_bytes: int = 2**31,
) -> tuple[Any, PinvInfo]:
    """Sven with as many singular values as help: adds them in order until the loss rises.

    Args:
      objective: of the residuals, what should fall; the default is their mean square.
      residual_fn, params, batch, learning_rate, k, rtol, max_bytes: of `sven_direction` and
        `sven_step`; at most k values are tried, each of which evaluates the batch once.

    Returns:
      the new parameters (the old ones where already the first value does not help), and a
      `PinvInfo` whose rank is the number of values that were kept.
    """
    _checks.in_range("learning_rate", learning_rate, 0)
    residuals, jac, unravel = _linearised(residual_fn, params, batch, max_bytes)
    rank = rank_of(k, *jac.shape)
    pieces = pieces_of(jac, residuals, rank, "gram", None, 0)
    weights, info = cut(pieces, residuals, rtol)
    start, _ = ravel_pytree(params)

    def loss(flat: Array) -> Array:
        return objective(_residuals(residual_fn, unravel(flat), batch))

    def goes_on(state: tuple[Array, Array, Array, Array]) -> Array:
        index, _, _, better = state
        return better & (index < info.rank)

    def add(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        index, flat, value, _ = state
        piece = times(weights[index] * pieces.mix[index], pieces.rows)
        tried = (flat - learning_rate * piece).astype(flat.dtype)
        found = loss(tried)
        better = found <= value
        return (
            index + better,
            jnp.where(better, tried, flat),
            jnp.where(better, found, value),
            better,
        )

    first = (jnp.int32(0), start, loss(start), jnp.bool_(True))
    used, flat, _, _ = jax.lax.while_loop(goes_on, add, first)
    return unravel(flat), info._replace(rank=used)


def loss_residual(
    loss_fn: Callable[[Any, Any], Array], *, kappa: float = 2.0, mean: bool = False
) -> ResidualFn:
    """Residuals `l^(κ/2)` of a loss at least 0: the loss itself for κ = 2, its root for κ = 1.

    For a squared loss, κ = 2 goes half of a Gauss-Newton step. A root has no derivative where the
    loss is 0: there the row is 0. A negative loss with κ other than 2 is NaN, and outside of
    transformations an error.

    Args:
      loss_fn: (params, example) to a scalar.
      kappa: above 0, static.
      mean: the example is a micro-batch (see `micro_batches`), whose losses are averaged first.

    Raises:
      ValueError: κ not above 0.
    """
    _checks.in_range("kappa", kappa, 0, low_open=True)

    def residual(params: Any, example: Any) -> Array:
        if mean:
            loss = jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, example))
        else:
            loss = jnp.asarray(loss_fn(params, example))
        if jnp.ndim(loss):
            raise ValueError(f"loss_fn: expected a scalar per example, got shape {loss.shape}")
        if kappa == 2.0:
            return loss
        if _checks.is_concrete(loss) and float(loss) < 0:
            raise ValueError(f"loss_fn: with kappa {kappa} expected losses >= 0, got {loss}")
        zero = loss == 0
        return jnp.where(zero, 0.0, jnp.where(zero, 1.0, loss) ** (kappa / 2))

    return residual


def micro_batches(batch: Any, size: int) -> Any:
    """The batch with leading axes `[B / size, size]`: fewer rows, each a mean of `size` losses.

    Raises:
      ValueError: a size below 1, or that does not divide B; leaves of unequal lengths.
    """
    _checks.in_range("size", size, 1)
    count = per_sample.num_rows("batch", batch)
    if count % size:
        raise ValueError(f"size: expected a divisor of the batch's {count} examples, got {size}")
    return jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), batch)


def parameter_subset(
    key: PRNGKeyArray, params: Any, fraction: float, *, whole: bool = False
) -> Any:
    """A random bool tree like the parameters, true with this chance: `where` of `sven_direction`.

    Args:
      fraction: in (0, 1].
      whole: chooses tensors instead of single numbers.
    """
    _checks.in_range("fraction", fraction, 0, 1, low_open=True)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def drawn(key: PRNGKeyArray, leaf: Array) -> Bool[Array, ...]:
        shape = () if whole else jnp.shape(leaf)
        return jnp.broadcast_to(jax.random.bernoulli(key, fraction, shape), jnp.shape(leaf))

    return jax.tree.unflatten(tree, [drawn(k, x) for k, x in zip(keys, leaves, strict=True)])


def _residuals(residual_fn: ResidualFn, params: Any, batch: Any) -> Array:
    return jax.vmap(residual_fn, in_axes=(None, 0))(params, batch).reshape(-1)


def _linearised(
    residual_fn: ResidualFn, params: Any, batch: Any, max_bytes: int
) -> tuple[Array, Array, Callable[[Array], Any]]:
    count = per_sample.num_rows("batch", batch)
    _checks.floating(**_paths.named_leaves(params))
    flat, unravel = ravel_pytree(params)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    shape = jax.eval_shape(residual_fn, params, one)
    rows = count * math.prod(shape.shape)
    wide = jnp.promote_types(jnp.promote_types(flat.dtype, shape.dtype), jnp.float32)
    needed = rows * flat.size * wide.itemsize
    if needed > max_bytes:
        raise ValueError(
            f"max_bytes: the Jacobian of {rows} residuals by {flat.size} parameters needs "
            f"{needed} bytes, above {max_bytes}; average micro-batches or raise the limit"
        )

    def both(flat: Array, example: Any) -> tuple[Array, Array]:
        found = residual_fn(unravel(flat), example).reshape(-1)
        return found, found

    each = jax.vmap(jax.jacrev(both, has_aux=True), in_axes=(None, 0))
    jac, residuals = each(flat, batch)
    return residuals.reshape(rows).astype(wide), jac.reshape(rows, -1).astype(wide), unravel


def _like(params: Any, tree: Any, name: str) -> Array:
    points.same_tree(name, tree, "params", params)
    return ravel_pytree(tree)[0]
