"""Averages of policy gradients whose bias is removed: implicit transport, and Hessian products.

An average `d ← (1 - η) d + η g` lags behind the moving parameters. N-PG-IGT takes g further along
the last step, so that the lag cancels to first order; HARPG adds what the gradient changed by, an
unbiased `B v` with `E[B v] = ∇²J (θ_t - θ_(t-1))`, so that it cancels altogether. Everything is
linear in g and `B v`: for Optax's descent pass both with the sign of -J.

    rates = igt_schedules(0.3)
    average = scale_by_igt(rates.eta)
    optimizer = optax.chain(
        average, normalize_global(), optax.scale_by_learning_rate(rates.learning_rate)
    )
    point = igt_point(state[0], params, rates.eta)         # sample and differentiate here
    updates, state = optimizer.update(gradient_at(point), state, params)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.optim import points
from pgjax.optim.schedules import Schedule


class GradientAverageState(NamedTuple):
    """How many updates there were, the average d, and the parameters one update ago."""

    step: Int[Array, ""]
    average: Any
    previous: Any


def scale_by_igt(eta: Schedule | float) -> optax.GradientTransformationExtraArgs:
    """Average of gradients taken at `igt_point`: `d_t = (1 - η_t) d_(t-1) + η_t g(θ~_t)`.

    It starts at the first gradient. Where the objective is quadratic and gradients are exact, d_t
    is the gradient at θ_t. `update`'s `params` are the present ones, θ_t, not the point.

    Args:
      eta: in (0, 1], or a schedule of the count; η_0 is 1 whatever it says. Use the same for
        `igt_point`.

    Raises:
      ValueError: η outside (0, 1]; on update, no `params`, or another tree than at `init`.

    Source: N-PG-IGT, Fatkhullin et al., 2023, arXiv 2302.01734. Their code extrapolates with the
    last step's η; one η serves both places here, as in the paper.
    """
    _check_eta(eta)

    def update(
        updates: Any, state: GradientAverageState, params: Any = None, **others: Any
    ) -> tuple[Any, GradientAverageState]:
        del others
        _check_params(params, state)
        return _averaged(updates, state, params, None, _weight(eta, state.step))

    return optax.GradientTransformationExtraArgs(_init, update)


def igt_point(state: GradientAverageState, params: Any, eta: Schedule | float) -> Any:
    """Where the next gradient belongs: `θ~_t = θ_t + ((1 - η_t) / η_t) (θ_t - θ_(t-1))`.

    Args:
      state: of `scale_by_igt`.
      params: θ_t.
      eta: what `scale_by_igt` got.

    Returns:
      A pytree like `params`; `params` itself before the first update, and for η = 1.

    Raises:
      ValueError: η outside (0, 1], another tree than at `init`.
    """
    _check_eta(eta)
    weight = _weight(eta, state.step)
    return points.lookahead(params, state.previous, (1 - weight) / weight)


def scale_by_harpg(eta: Schedule | float) -> optax.GradientTransformationExtraArgs:
    """Average that follows the parameters: `d_t = (1 - η_t) (d_(t-1) + B v) + η_t g(θ_t)`.

    It starts at the first gradient. `update(g, state, params, hvp=B v)`, with `B v` an unbiased
    estimate of the Hessian times the last step, at the point and for the v that `harpg_point`
    gives. Zeros make it plain momentum.

    Args:
      eta: in (0, 1], or a schedule of the count; η_0 is 1 whatever it says.

    Raises:
      ValueError: η outside (0, 1]; on update, no `params`, another tree than at `init`, `hvp`
        missing or of another tree than the gradients.

    Source: HARPG, Fatkhullin et al., 2023, arXiv 2302.01734.
    """
    _check_eta(eta)

    def update(
        updates: Any,
        state: GradientAverageState,
        params: Any = None,
        *,
        hvp: Any = None,
        **others: Any,
    ) -> tuple[Any, GradientAverageState]:
        del others
        _check_params(params, state)
        if hvp is None:
            raise ValueError("hvp: expected a Hessian-vector product as a keyword of update")
        points.same_tree("hvp", hvp, "updates", updates)
        return _averaged(updates, state, params, hvp, _weight(eta, state.step))

    return optax.GradientTransformationExtraArgs(_init, update)


def harpg_point(state: GradientAverageState, params: Any, share: Any) -> tuple[Any, Any]:
    """Where the Hessian belongs, and the step to multiply it by: `q θ_t + (1 - q) θ_(t-1)`, v.

    For q uniform in (0, 1), `E_q[∇²J v] = ∇J(θ_t) - ∇J(θ_(t-1))` with `v = θ_t - θ_(t-1)`.

    Args:
      state: of `scale_by_harpg`.
      params: θ_t.
      share: q in [0, 1]; may be traced.

    Returns:
      Point and step, pytrees like `params`; the step is 0 before the first update.

    Raises:
      ValueError: q outside [0, 1], another tree than at `init`.
    """
    point = points.segment_point(state.previous, params, share)
    return point, jax.tree.map(lambda now, before: now - before, params, state.previous)


def normalize_global(eps: float = 0.0) -> optax.GradientTransformation:
    """Updates over the one norm of the whole tree: `u / (‖u‖ + eps)`; zeros stay zeros.

    Norms are float32 or wider, and exact also where squares would under- or overflow.

    Args:
      eps: at least 0; 0 gives updates of norm 1 whatever their size.

    Raises:
      ValueError: eps below 0.
    """
    _checks.in_range("eps", eps, 0)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        del params
        wide = jax.tree.map(widened, updates)
        sizes = [jnp.max(jnp.abs(u), initial=0.0) for u in jax.tree.leaves(wide)]
        largest = jnp.max(jnp.stack(sizes)) if sizes else jnp.zeros(())
        unit = jnp.where(largest == 0, 1.0, largest)
        scaled = jax.tree.map(lambda u: u / unit, wide)
        norm = jnp.asarray(optax.tree.norm(scaled))
        divisor = jnp.where(largest == 0, 1.0, norm + eps / unit)
        return jax.tree.map(lambda s, u: (s / divisor).astype(u.dtype), scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def trajectory_hvp(
    logp_traj_fn: Callable[[Any], Float[Array, "*B H"]],
    return_weights: Float[Array, "*B H"],
    params: Any,
    v: Any,
) -> Any:
    """Unbiased `∇²J v` from trajectories: `B v = ∇<g, v> + g <∇ log p(τ), v>`, averaged over them.

    With `g(τ) = Σ_h w_h ∇ log π(a_h | s_h)` the estimate of ∇J and `log p(τ) = Σ_h log π(a_h|s_h)`.
    One forward and one reverse pass; memory is that of a gradient.

    Args:
      logp_traj_fn: params to log-probabilities of the chosen actions `[..., H]`, 0 where nothing
        was chosen; batch axes in front hold trajectories sampled at `params`.
      return_weights: `[..., H]`, what each step's score is multiplied by in g (discounted reward
        to go, less a baseline); held constant. For a language model the whole sequence is one
        trajectory.
      params, v: pytrees of one structure, and of equal shapes and dtypes.

    Returns:
      A pytree like `params`.

    Raises:
      ValueError: trees that differ, log-probabilities and weights of different shapes.

    Source: Fatkhullin et al., 2023, arXiv 2302.01734.
    """
    points.same_tree("v", v, "params", params)

    def surrogate(theta: Any) -> Array:
        logp, along = jax.jvp(logp_traj_fn, (theta,), (v,))
        _checks.same_shape(logp_traj_fn=logp, return_weights=return_weights)
        weights = jax.lax.stop_gradient(return_weights)
        whole = jax.lax.stop_gradient(jnp.sum(along, axis=-1))
        gradient = jnp.sum(weights * logp, axis=-1)
        return jnp.mean(jnp.sum(weights * along, axis=-1) + whole * gradient)

    return jax.grad(surrogate)(params)


def _init(params: Any) -> GradientAverageState:
    average = jax.tree.map(jnp.zeros_like, params)
    previous = jax.tree.map(jnp.array, params)
    return GradientAverageState(jnp.zeros((), jnp.int32), average, previous)


def _averaged(
    updates: Any, state: GradientAverageState, params: Any, shift: Any, weight: Array
) -> tuple[Any, GradientAverageState]:
    """The new average and state; `shift` is added to the old average first."""
    points.same_tree("updates", updates, "params", params)
    before = jax.tree.map(widened, state.average)
    if shift is not None:
        before = jax.tree.map(lambda d, s: d + widened(s), before, shift)
    moved = jax.tree.map(lambda d, g: (1 - weight) * d + weight * widened(g), before, updates)
    average = jax.tree.map(lambda m, d: m.astype(d.dtype), moved, state.average)
    out = jax.tree.map(lambda m, g: m.astype(jnp.result_type(g)), moved, updates)
    previous = jax.tree.map(lambda p, d: jnp.asarray(p, d.dtype), params, state.previous)
    return out, GradientAverageState(optax.safe_increment(state.step), average, previous)


def _weight(eta: Schedule | float, count: Array) -> Array:
    """η of this count: 1 at first, so that the average starts at the first gradient."""
    value = eta(count) if callable(eta) else eta
    return jnp.where(count == 0, 1.0, jnp.asarray(value))


def _check_eta(eta: Schedule | float) -> None:
    # A schedule is looked at where it starts: it usually falls from there.
    value = eta(jnp.zeros((), jnp.int32)) if callable(eta) else eta
    _checks.in_range("eta", value, 0, 1, low_open=True)


def _check_params(params: Any, state: GradientAverageState) -> None:
    if params is None:
        raise ValueError("params: expected the present parameters in update, got None")
    points.same_tree("params", params, "the state's previous", state.previous)
