"""One gradient from those of several tasks: SAM-GS, PCGrad, CAGrad.

Task gradients are a tree like the shared parameters whose leaves have a leading axis of K tasks.
Tasks may be prompt categories, or terms of a loss: policy, value, KL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks, _paths
from pgjax.optim import matrix, per_sample

RULES = ("mean", "any")
REDUCTIONS = ("sum", "mean")


class SamGsState(NamedTuple):
    """How many updates there were, each task's momentum, and the averaged `(1 - ψ)²`."""

    step: Int[Array, ""]
    momentum: Any
    dissimilarity: Float[Array, ""]


def task_gradients(
    losses_fn: Callable[[Any, Any], Float[Array, " K"]], params: Any, batch: Any
) -> Any:
    """Each task's gradient, from one forward pass: a tree like `params` with leaves `[K, ...]`.

    Args:
      losses_fn: (params, batch) to the vector of K losses.

    Raises:
      ValueError: something else than a vector of losses.
    """
    _checks.rank("losses_fn", jax.eval_shape(losses_fn, params, batch), 1)
    return jax.jacrev(losses_fn)(params, batch)


def magnitude_similarity(task_grads: Any) -> Float[Array, "K K"]:
    """`ψ_ij = 2 ‖g_i‖ ‖g_j‖ / (‖g_i‖² + ‖g_j‖²)` in [0, 1]; 0 where either gradient is 0.

    Args:
      task_grads: leaves `[K, ...]`.

    Raises:
      ValueError: leaves of different K, or none.

    Source: Yu et al. (PCGrad), 2020, arXiv 2001.06782, where it is a diagnostic.
    """
    return _similarity(_norms(_flat(task_grads)[0]))


def samgs_init(task_grads: Any) -> SamGsState:
    """State for `samgs`: zeros like these task gradients, of which only the shapes count."""
    per_sample.num_rows("task_grads", task_grads)
    return SamGsState(
        jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, task_grads), jnp.zeros(())
    )


def samgs(
    state: SamGsState,
    task_grads: Any,
    *,
    gamma: Any = 0.7,
    b1: float = 0.9,
    b2: float = 0.99,
    rule: str = "mean",
    factor: float = 1.0,
    clip: float | None = 1.0,
) -> tuple[Any, SamGsState]:
    """Task gradients of one norm if their norms differ much, else each modulated by its momentum.

        ψ < γ:  Σ_i g_i / ‖g_i‖ · mean_j ‖g_j‖
        else:   Σ_i g_i |m̂_i| / √v̂,   m_i ← b1 m_i + (1 - b1) g_i,
                                       v ← b2 v + (1 - b2) (1 - ψ)² + 1e-8

    with m̂, v̂ free of their start at 0, and ψ the mean of `magnitude_similarity` over pairs. Both
    averages are updated in either case.

    Args:
      state: from `samgs_init`, or the last call.
      task_grads: leaves `[K, ...]`, finite.
      gamma: γ, at least 0; 0 never gives one norm, above 1 always does. The paper has 0.7 for
        vision, 0.9 for reinforcement learning. May be traced.
      b1, b2: in [0, 1).
      rule: static. `mean`: compares the mean of ψ_ij; `any`: the least of them.
      factor: what the sum is multiplied by, at least 0: the released vision code takes K, the
        one for reinforcement learning 1.
      clip: largest global norm of the result, above 0; None for no limit. Tasks of equal norms
        have √v̂ near 1e-3 for b2 = 0.99, which would make steps a thousand times longer.

    Returns:
      a tree like one task's gradient, and the next state.

    Raises:
      ValueError: options out of range, leaves of different K, and, outside of transformations,
        gradients that are not finite.

    Source: Gradient Similarity Surgery (SAM-GS), 2025, arXiv 2506.06130. One task has ψ = 1, and a
    gradient of 0 stays 0 when norms are made equal; the released code gives NaN.
    """
    _checks.in_range("gamma", gamma, 0)
    _checks.in_range("b1", b1, 0, 1, high_open=True)
    _checks.in_range("b2", b2, 0, 1, high_open=True)
    _checks.one_of("rule", rule, RULES)
    _checks.in_range("factor", factor, 0)
    if clip is not None:
        _checks.in_range("clip", clip, 0, low_open=True)
    rows, unravel = _flat(task_grads)
    shapes = jax.tree.map(jnp.shape, state.momentum)
    if shapes != jax.tree.map(jnp.shape, task_grads):
        raise ValueError(
            f"task_grads: expected the shapes of the state, {shapes}, "
            f"got {jax.tree.map(jnp.shape, task_grads)}"
        )
    norms = _norms(rows)
    psi = _pair_summary(_similarity(norms), jnp.mean)
    count = optax.safe_increment(state.step)
    momentum = b1 * _flat(state.momentum)[0] + (1 - b1) * rows
    spread = b2 * state.dissimilarity + (1 - b2) * jnp.square(1 - psi) + 1e-8
    t = count.astype(jnp.float32)
    debiased, variance = momentum / (1 - b1**t), spread / (1 - b2**t)
    unit = matrix.row_normalize(rows, eps=_tiny(rows))
    equalised = unit.sum(0) * norms.mean()
    modulated = jnp.sum(rows * jnp.abs(debiased), axis=0) / jnp.sqrt(variance)
    compared = psi if rule == "mean" else _pair_summary(_similarity(norms), jnp.min)
    found = factor * jnp.where(compared < gamma, equalised, modulated)
    if clip is not None:
        found = found / jnp.maximum(jnp.linalg.norm(found) / clip, 1.0)
    kept = _like(task_grads, momentum)
    return unravel(found), SamGsState(count, kept, spread.astype(state.dissimilarity.dtype))


def pcgrad(key: PRNGKeyArray, task_grads: Any, *, reduction: str = "sum") -> Any:
    """Task gradients without what conflicts with others: each is projected off those it opposes.

    For each task i, over the others j in random order: where `<g_i, g_j> < 0`, with g_j as it came,
    `g_i ← g_i - <g_i, g_j> / ‖g_j‖² g_j`.

    Args:
      key: of the orders, one for each task.
      task_grads: leaves `[K, ...]`, finite.
      reduction: of the projected gradients, `sum` or `mean`, static.

    Returns:
      a tree like one task's gradient.

    Raises:
      ValueError: an unknown reduction, leaves of different K, and, outside of transformations,
        gradients that are not finite.

    Source: Yu et al., Gradient surgery for multi-task learning, 2020, arXiv 2001.06782.
    """
    _checks.one_of("reduction", reduction, REDUCTIONS)
    rows, unravel = _flat(task_grads)
    count = rows.shape[0]
    squares = jnp.sum(jnp.square(rows), axis=1)

    def projected(task: Array, key: PRNGKeyArray) -> Array:
        def visit(g: Array, j: Array) -> tuple[Array, None]:
            along = jnp.dot(g, rows[j], precision="highest")
            opposed = (along < 0) & (j != task) & (squares[j] > 0)
            share = jnp.where(opposed, along / jnp.where(squares[j] > 0, squares[j], 1.0), 0.0)
            return g - share * rows[j], None

        return jax.lax.scan(visit, rows[task], jax.random.permutation(key, count))[0]

    found = jax.vmap(projected)(jnp.arange(count), jax.random.split(key, count))
    return unravel(found.sum(0) if reduction == "sum" else found.mean(0))


def cagrad(task_grads: Any, *, alpha: Any = 0.4, iters: int = 50, rescale: bool = True) -> Any:
    """The mean gradient, bent towards the task that gains least from it, within a ball around it.

        w = argmin over the simplex of  wᵀ A 1/K + c √(wᵀ A w),   A = G Gᵀ, c = α ‖mean g‖
        g = (mean_i g_i + c g_w / ‖g_w‖) / (1 + α²),   g_w = Σ_i w_i g_i

    Args:
      task_grads: leaves `[K, ...]`, finite.
      alpha: radius of the ball over the norm of the mean, at least 0; 0 gives the mean. May be
        traced.
      iters: projected gradient steps for w, each with the best of 24 step sizes, static.
      rescale: divides by 1 + α², static.

    Returns:
      a tree like one task's gradient.

    Raises:
      ValueError: α below 0, fewer than 1 step, leaves of different K, and, outside of
        transformations, gradients that are not finite.

    Source: Liu et al., Conflict-averse gradient descent, 2021, arXiv 2110.14048. A is divided by
    its mean diagonal first, so that the constant 1e-8 below the roots has no units.
    """
    _checks.in_range("alpha", alpha, 0)
    _checks.in_range("iters", iters, 1)
    rows, unravel = _flat(task_grads)
    count = rows.shape[0]
    size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(rows), axis=1)))
    unit = rows / jnp.where(size > 0, size, 1.0)
    gram = jnp.matmul(unit, unit.T, precision="highest")
    even = jnp.full(count, 1 / count, rows.dtype)
    radius = alpha * jnp.sqrt(jnp.mean(gram) + 1e-8)

    def objective(w: Array) -> Array:
        square = jnp.maximum(w @ gram @ w, 0.0)
        return w @ gram @ even + radius * jnp.sqrt(square + 1e-8)

    sizes = 2.0 ** jnp.arange(6.0, -18.0, -1.0, dtype=rows.dtype)

    def descend(w: Array, _: None) -> tuple[Array, None]:
        slope = jax.grad(objective)(w)
        tried = jax.vmap(optax.projections.projection_simplex)(w - sizes[:, None] * slope)
        tried = jnp.concatenate([w[None], tried])
        return tried[jnp.argmin(jax.vmap(objective)(tried))], None

    w, _ = jax.lax.scan(descend, even, length=iters)
    towards = w @ unit
    found = size * (unit.mean(0) + radius * towards / (jnp.linalg.norm(towards) + 1e-8))
    return unravel(found / (1 + alpha**2) if rescale else found)


def _flat(task_grads: Any) -> tuple[Float[Array, "K P"], Callable[[Array], Any]]:
    """Rows in float32 or wider, and the way back for one of them."""
    count = per_sample.num_rows("task_grads", task_grads)
    leaves = _paths.named_leaves(task_grads)
    _checks.floating(**leaves)
    for path, leaf in leaves.items():
        if _looked_at(leaf) and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError(f"task_grads: expected finite gradients, got others in {path}")
    wide = jnp.promote_types(jnp.result_type(*leaves.values()), jnp.float32)
    rows = [jnp.asarray(x, wide).reshape(count, -1) for x in leaves.values()]
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], task_grads))
    dtype = jnp.result_type(*leaves.values())
    return jnp.concatenate(rows, axis=1), lambda row: unravel(row.astype(dtype))


def _looked_at(leaf: Any) -> bool:
    # Arrays spread over processes cannot be.
    return _checks.is_concrete(leaf) and getattr(leaf, "is_fully_addressable", True)


def _like(task_grads: Any, rows: Float[Array, "K P"]) -> Any:
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], task_grads))
    dtype = jnp.result_type(*jax.tree.leaves(task_grads))
    return jax.vmap(unravel)(rows.astype(dtype))


def _norms(rows: Float[Array, "K P"]) -> Float[Array, " K"]:
    return jnp.linalg.norm(rows, axis=1)


def _similarity(norms: Float[Array, " K"]) -> Float[Array, "K K"]:
    # By the ratio of the norms, whose squares might leave float32's range.
    large = jnp.maximum(norms[:, None], norms)
    ratio = jnp.minimum(norms[:, None], norms) / jnp.where(large > 0, large, 1.0)
    return 2 * ratio / (1 + jnp.square(ratio))


def _pair_summary(similarity: Float[Array, "K K"], reduce: Callable[[Array], Array]) -> Array:
    rows, columns = jnp.triu_indices(similarity.shape[0], k=1)
    return reduce(similarity[rows, columns]) if rows.size else jnp.ones((), similarity.dtype)


def _tiny(rows: Array) -> float:
    return float(jnp.finfo(rows.dtype).tiny)
