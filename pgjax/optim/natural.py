"""Steps along the natural gradient: conjugate gradients, and a trust region found by backtracking.

The Fisher matrix is never formed. Functions of the parameters say how far a policy moves; products
with the Hessian of that distance come from forward over reverse differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pgjax import _checks


def conjugate_gradient(
    product: Callable[[Any], Any], b: Any, *, num_steps: int = 10, tolerance: float = 1e-10
) -> Any:
    """x with A x = b, for a symmetric positive definite A that is known by its products.

    Stops moving, inside the fixed number of steps, where the residual's square is below the
    tolerance, where a direction has no positive curvature, and where a number is not finite: what
    was found until then is kept. b = 0 gives 0.

    Args:
      product: `x -> A x`, linear, on pytrees like `b`.
      b: pytree of floating arrays.
      num_steps: ≥ 1; as many as the dimension solve exactly.
      tolerance: of |b - A x|², ≥ 0.

    Raises:
      ValueError: a `num_steps` below 1, a negative tolerance.

    Source: Hestenes and Stiefel 1952.
    """
    _checks.in_range("num_steps", num_steps, 1)
    _checks.in_range("tolerance", tolerance, 0.0)

    def step(_: Int[Array, ""], carry: Any) -> Any:
        x, residual, direction, square, going = carry
        image = product(direction)
        curvature = optax.tree.vdot(direction, image)
        going = going & (square > tolerance) & (curvature > 0) & jnp.isfinite(curvature)
        length = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        new_x = optax.tree.add_scale(x, length, direction)
        new_residual = optax.tree.add_scale(residual, -length, image)
        new_square = optax.tree.vdot(new_residual, new_residual)
        going = going & jnp.isfinite(new_square)
        ratio = jnp.where(going, new_square / jnp.where(square > 0, square, 1.0), 0.0)
        new = (
            new_x,
            new_residual,
            optax.tree.add_scale(new_residual, ratio, direction),
            new_square,
        )
        old = (x, residual, direction, square)
        return (*jax.tree.map(lambda a, b: jnp.where(going, a, b), new, old), going)

    start = (optax.tree.zeros_like(b), b, b, optax.tree.vdot(b, b), jnp.bool_(True))
    return jax.lax.fori_loop(0, num_steps, step, start)[0]


def hessian_vector_product(
    distance: Callable[[Any], Float[Array, ""]], params: Any, vector: Any, *, damping: float = 0.0
) -> Any:
    """(∇² distance(params) + damping I) vector.

    With `distance` the mean KL divergence of the old policy to that of its argument, at the old
    parameters, ∇² is the Fisher matrix.
    """
    image = jax.jvp(jax.grad(distance), (params,), (vector,))[1]
    return optax.tree.add_scale(image, damping, vector)


class Step(NamedTuple):
    """A step in parameters, and how it was found.

    Attributes:
      update: what is added to the parameters.
      distance: of the new parameters, f32 scalar.
      improvement: of the objective, f32 scalar.
      accepted: false where the step is 0 because none was good enough.
    """

    update: Any
    distance: Float[Array, ""]
    improvement: Float[Array, ""]
    accepted: Array


def natural_direction(
    grads: Any,
    distance: Callable[[Any], Float[Array, ""]],
    params: Any,
    *,
    damping: float = 0.1,
    num_steps: int = 10,
) -> tuple[Any, Float[Array, ""]]:
    """x = (F + damping I)⁻¹ g, and x·(F + damping I) x, for F the Hessian of the distance.

    Args:
      grads: g, of what is to grow.
      distance: of a policy to the present one; 0 with zero slope at `params`.
      params: the present ones.
      damping: ≥ 0.
      num_steps: of conjugate gradients.

    Source: Kakade 2001, "A Natural Policy Gradient".
    """
    _checks.in_range("damping", damping, 0.0)

    def product(vector: Any) -> Any:
        return hessian_vector_product(distance, params, vector, damping=damping)

    direction = conjugate_gradient(product, grads, num_steps=num_steps)
    return direction, optax.tree.vdot(direction, product(direction))


def natural_step(
    grads: Any,
    distance: Callable[[Any], Float[Array, ""]],
    params: Any,
    *,
    radius: float = 0.01,
    damping: float = 0.1,
    num_steps: int = 10,
) -> Any:
    """√(2 δ / x·F x) x along the natural direction x: to second order, the distance becomes δ.

    Args:
      grads, distance, params, damping, num_steps: of `natural_direction`.
      radius: δ > 0.

    Returns:
      what is to be added to the parameters; 0 where the gradient is.
    """
    _checks.in_range("radius", radius, 0.0, low_open=True)
    direction, curvature = natural_direction(
        grads, distance, params, damping=damping, num_steps=num_steps
    )
    known = curvature > 0
    length = jnp.where(known, jnp.sqrt(2 * radius / jnp.where(known, curvature, 1.0)), 0.0)
    return optax.tree.scale(length, direction)


def trust_region_step(
    objective: Callable[[Any], Float[Array, ""]],
    distance: Callable[[Any], Float[Array, ""]],
    params: Any,
    *,
    radius: float = 0.01,
    damping: float = 0.1,
    num_steps: int = 10,
    backtracks: int = 10,
    shrink: float = 0.5,
    least_gain: float = 0.1,
) -> Step:
    """TRPO's step: the natural one, shortened until it improves and stays within the radius.

    Of the steps shrink^j, j = 0, 1, ..., the first is taken whose improvement is positive and at
    least `least_gain` of what the slope promises for it, and whose distance is at most the radius.

    Args:
      objective: to grow, differentiable at `params`.
      distance, params, radius, damping, num_steps: of `natural_step`.
      backtracks: steps tried, ≥ 1.
      shrink: in (0, 1).
      least_gain: ≥ 0.

    Source: Schulman et al. 2015, arXiv 1502.05477.
    """
    _checks.in_range("backtracks", backtracks, 1)
    _checks.in_range("shrink", shrink, 0.0, 1.0, low_open=True, high_open=True)
    before, grads = jax.value_and_grad(objective)(params)
    full = natural_step(
        grads, distance, params, radius=radius, damping=damping, num_steps=num_steps
    )
    slope = optax.tree.vdot(grads, full)

    def tried(index: Array) -> tuple[Any, Array, Array, Array]:
        scale = shrink ** index.astype(jnp.float32)
        update = optax.tree.scale(scale, full)
        there = optax.apply_updates(params, update)
        gain, away = objective(there) - before, distance(there)
        good = (gain > 0) & (gain >= least_gain * scale * slope) & (away <= radius)
        return update, away, gain, good

    def unsettled(carry: Any) -> Array:
        index, found = carry
        return ~found[3] & (index < backtracks)

    def again(carry: Any) -> Any:
        index, _ = carry
        return index + 1, tried(index)

    first = tried(jnp.int32(0))
    _, (update, away, gain, good) = jax.lax.while_loop(unsettled, again, (jnp.int32(1), first))
    update = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), update)
    zero = jnp.zeros_like(gain)
    return Step(update, jnp.where(good, away, zero), jnp.where(good, gain, zero), good)
