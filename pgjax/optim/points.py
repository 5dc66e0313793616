"""Where to evaluate the next gradient, and products with a Hessian, for methods that need both.

A transformation `update(gradients, state)` cannot ask for a gradient elsewhere. These functions
say where; the caller evaluates there and hands the result to `update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import safe_sqrt, widened


def lookahead(params: Any, previous: Any, weight: Any) -> Any:
    """The point further along the last step: `params + weight (params - previous)`.

    Args:
      params, previous: pytrees of one structure and of equal shapes.
      weight: scalar; 0 gives `params`. May be traced.

    Returns:
      A pytree like `params`, in its dtypes; the arithmetic is float32 or wider.

    Raises:
      ValueError: trees that differ in structure or shapes.
    """
    same_tree("previous", previous, "params", params)

    def point(x: Array, before: Array) -> Array:
        now = widened(x)
        return (now + weight * (now - widened(before))).astype(jnp.result_type(x))

    return jax.tree.map(point, params, previous)


def segment_point(start: Any, end: Any, share: Any) -> Any:
    """A point of the segment: `(1 - share) start + share end`.

    Args:
      start, end: pytrees of one structure and of equal shapes.
      share: scalar in [0, 1]; may be traced.

    Returns:
      A pytree like `end`, in its dtypes; the arithmetic is float32 or wider.

    Raises:
      ValueError: trees that differ in structure or shapes, a share outside [0, 1].
    """
    _checks.in_range("share", share, 0, 1)
    same_tree("start", start, "end", end)

    def point(a: Array, b: Array) -> Array:
        return ((1 - share) * widened(a) + share * widened(b)).astype(jnp.result_type(b))

    return jax.tree.map(point, start, end)


def sam_point(params: Any, gradients: Any, *, rho: Any, eps: float = 1e-12) -> Any:
    """The point uphill that SAM evaluates at: `θ + ρ g / (‖g‖ + eps)`, one norm of the whole tree.

    Args:
      params, gradients: pytrees of one structure and of equal shapes.
      rho: at least 0; may be traced.
      eps: above 0, so that a zero gradient gives `params`.

    Returns:
      A pytree like `params`, in its dtypes; the norm is float32 or wider.

    Raises:
      ValueError: trees that differ, ρ below 0, eps not above 0.

    Source: Foret et al., Sharpness-aware minimization, 2021, arXiv 2010.01412.
    """
    _checks.in_range("rho", rho, 0)
    _checks.in_range("eps", eps, 0, low_open=True)
    same_tree("gradients", gradients, "params", params)
    wide = jax.tree.map(widened, gradients)
    scale = rho / (_norm(wide) + eps)

    def point(x: Array, g: Array) -> Array:
        return (widened(x) + scale * g).astype(jnp.result_type(x))

    return jax.tree.map(point, params, wide)


def asam_point(params: Any, gradients: Any, *, rho: Any, eps: float = 1e-12) -> Any:
    """SAM's point with steps in proportion to the parameters: `θ + ρ θ² g / (‖θ g‖ + eps)`.

    Args:
      params, gradients: pytrees of one structure and of equal shapes.
      rho: at least 0; may be traced.
      eps: above 0, so that a zero gradient gives `params`.

    Returns:
      A pytree like `params`, in its dtypes; the norm is float32 or wider.

    Raises:
      ValueError: trees that differ, ρ below 0, eps not above 0.

    Source: Kwon et al., ASAM, 2021, arXiv 2102.11600, without their offset η of |θ|.
    """
    _checks.in_range("rho", rho, 0)
    _checks.in_range("eps", eps, 0, low_open=True)
    same_tree("gradients", gradients, "params", params)
    scaled = jax.tree.map(lambda x, g: widened(x) * widened(g), params, gradients)
    scale = rho / (_norm(scaled) + eps)

    def point(x: Array, s: Array) -> Array:
        return (widened(x) + scale * widened(x) * s).astype(jnp.result_type(x))

    return jax.tree.map(point, params, scaled)


def hvp(f: Callable[[Any], Array], params: Any, v: Any) -> Any:
    """The Hessian of a scalar function times v, forward over reverse: `∇² f(params) v`.

    Args:
      f: params to a scalar.
      params, v: pytrees of one structure, and of equal shapes and dtypes.

    Returns:
      A pytree like `params`. Memory is that of two gradients; no matrix is formed.

    Raises:
      ValueError: trees that differ in structure or shapes.
    """
    same_tree("v", v, "params", params)
    return jax.jvp(jax.grad(f), (params,), (v,))[1]


def score_hvp(
    logp_fn: Callable[[Any], Float[Array, "*N"]],
    weight: Float[Array, "*N"],
    params: Any,
    v: Any,
) -> Any:
    """Samples' Hessian of an expectation times v: `Σ_i w_i (∇² ℓ_i v + ∇ℓ_i <∇ℓ_i, v>)`.

    With ℓ the log-probability of x_i ~ p(.|θ) and w_i the value of x_i over the number of samples,
    its expectation is `∇²_θ E[value] v`. With probabilities times values as weights and all x in
    the sum, it is that exactly.

    Args:
      logp_fn: params to log-probabilities `[N]`, or to a scalar.
      weight: `[N]`, or anything that broadcasts against it; held constant.
      params, v: pytrees of one structure, and of equal shapes and dtypes.

    Returns:
      A pytree like `params`: one forward and one reverse pass.

    Raises:
      ValueError: trees that differ in structure or shapes.
    """
    same_tree("v", v, "params", params)

    def surrogate(theta: Any) -> Array:
        logp, along = jax.jvp(logp_fn, (theta,), (v,))
        product = along + jax.lax.stop_gradient(along) * logp
        return jnp.sum(jax.lax.stop_gradient(weight) * product)

    return jax.grad(surrogate)(params)


def same_tree(name: str, tree: Any, like_name: str, like: Any) -> None:
    """Raises ValueError unless both trees have one structure and equal shapes."""
    got: Any = jax.tree.structure(tree)
    want: Any = jax.tree.structure(like)
    if got != want:
        raise ValueError(f"{name}: expected a tree like {like_name}, {want}, got {got}")
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"{name}: expected leaves of the shapes of {like_name}, "
                f"got {jnp.shape(a)} for {jnp.shape(b)}"
            )


def _norm(tree: Any) -> Array:
    """The global norm, whose gradient at 0 is 0, not NaN."""
    square = jnp.asarray(optax.tree.norm(tree, squared=True))
    return safe_sqrt(square)
