"""Sampling that corrects itself: act so that what is remembered looks like the policy's own data.

Drawn independently, a finite batch has some actions too often and others too seldom. A behaviour
policy that starts from the target policy, and takes gradient steps that make the recorded actions
less likely, fills the gaps with what it draws next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks, aggregate, surrogates
from pgjax.sampling.shuffle import random_order

LogProb = Callable[[Any, Any], Float[Array, " N"]]


class Refit(NamedTuple):
    """A behaviour policy, and how it was found.

    Attributes:
      params: of the behaviour policy.
      opt_state: of the optimizer, for the next time.
      kl: mean of ρ - 1 - log ρ over the last minibatch looked at, f32 scalar.
      steps: gradient steps taken before the limit was met, int32 scalar.
    """

    params: Any
    opt_state: Any
    kl: Float[Array, ""]
    steps: Int[Array, ""]


def props_loss(
    behavior_logprobs: Float[Array, " N"],
    target_logprobs: Float[Array, " N"],
    *,
    clip: float = 0.3,
    mask: Bool[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """mean max(ρ, clip(ρ, 1 ± ε)), ρ = π_φ(a|s) / π_θ(a|s), over remembered actions.

    It is PPO's clipped loss with every advantage -1: descent makes what is remembered less likely
    under φ, down to 1 - ε of its probability under θ.

    Args:
      behavior_logprobs: of π_φ, `[N]`, differentiable.
      target_logprobs: of the present π_θ at the same actions, `[N]`; detached here. Those recorded
        when the actions were drawn are of an older policy and do not belong here.
      clip: ε in (0, 1].
      mask: rows that count, bool `[N]`.

    Returns:
      f32 scalar; 0 with gradient 0 where no row counts.

    Raises:
      ValueError: unequal shapes, wrong dtypes, ε out of range, log-probs that are not finite at
        rows that count (where they can be looked at).

    Source: PROPS, Corrado and Hanna 2023, arXiv 2311.08290.
    """
    _checks.rank("behavior_logprobs", behavior_logprobs, 1)
    _checks.floating(behavior_logprobs=behavior_logprobs, target_logprobs=target_logprobs)
    _checks.same_shape(
        behavior_logprobs=behavior_logprobs, target_logprobs=target_logprobs, mask=mask
    )
    _checks.boolean(mask=mask)
    _checks.in_range("clip", clip, 0.0, 1.0, low_open=True)
    ratio = _ratio(behavior_logprobs, target_logprobs, mask)
    loss = surrogates.clipped(ratio, -jnp.ones_like(ratio), low=clip, high=clip)
    return _mean(loss, mask)


def props_refit(
    key: PRNGKeyArray,
    log_prob: LogProb,
    params: Any,
    batch: Any,
    opt_state: Any,
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int = 16,
    num_minibatches: int = 4,
    clip: float = 0.3,
    max_kl: float = 0.01,
    mask: Bool[Array, " N"] | None = None,
    divergence: LogProb | None = None,
    coefficient: float = 0.0,
) -> Refit:
    """The behaviour policy for what is remembered now: φ ← θ, then descent on `props_loss`.

    L(φ) = props_loss + λ mean KL(π_θ ‖ π_φ), by passes over minibatches, until the mean of
    ρ - 1 - log ρ over a minibatch is δ or more; from there on no step is taken.

    Args:
      key: of the minibatches.
      log_prob: `(params, batch) -> f32 [N]`, of the actions in it. It is asked for π_θ's as well,
        so that no stale log-prob can get in.
      params: θ.
      batch: what is remembered, leaves `[N, ...]`.
      opt_state: from `optimizer.init(params)`, or the refit before.
      optimizer: of φ.
      num_epochs: passes over the batch, ≥ 1.
      num_minibatches: steps a pass; divides N.
      clip: ε in (0, 1].
      max_kl: δ ≥ 0; 0 leaves φ = θ.
      mask: rows that hold something, bool `[N]`. Minibatches without any take no step.
      divergence: `(params, batch) -> f32 [N]`, KL(π_θ ‖ π_φ) in each row's state, in nats; None
        where λ = 0.
      coefficient: λ ≥ 0.

    Returns:
      `Refit`. Where a number is not finite no step is taken from there on.

    Raises:
      ValueError: a count below 1 or that does not divide, a number out of range, a positive λ
        without `divergence`, a mask of another shape.

    Source: PROPS, Corrado and Hanna 2023, arXiv 2311.08290; default numbers of the authors' code
    for discrete actions, whose λ is 0.
    """
    _checks.in_range("num_epochs", num_epochs, 1)
    _checks.in_range("num_minibatches", num_minibatches, 1)
    _checks.in_range("clip", clip, 0.0, 1.0, low_open=True)
    _checks.in_range("max_kl", max_kl, 0.0)
    _checks.in_range("coefficient", coefficient, 0.0)
    if divergence is None and coefficient > 0:
        raise ValueError(f"divergence: expected a function for coefficient {coefficient}, got None")
    size = _rows(batch, mask)
    if size % num_minibatches:
        raise ValueError(f"num_minibatches: expected a divisor of {size}, got {num_minibatches}")
    target = jax.lax.stop_gradient(log_prob(params, batch))

    def loss_of(phi: Any, part: Any) -> tuple[Array, Array]:
        own, fixed, kept = part
        found = log_prob(phi, own)
        loss = props_loss(found, fixed, clip=clip, mask=kept)
        if divergence is not None:
            loss = loss + coefficient * _mean(divergence(phi, own), kept)
        return loss, _moved(jax.lax.stop_gradient(found), fixed, kept)

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        phi, state, _, steps, going = carry
        kept = None if mask is None else mask[rows]
        part = (jax.tree.map(lambda x: x[rows], batch), target[rows], kept)
        (_, kl), grads = jax.value_and_grad(loss_of, has_aux=True)(phi, part)
        # Rounding can make a mean of 0 negative, and NaN must stop as well.
        going = going & (jnp.maximum(kl, 0.0) < max_kl) & jnp.isfinite(optax.tree.norm(grads))
        taken = going if kept is None else going & jnp.any(kept)
        updates, new_state = optimizer.update(grads, state, phi)
        new = optax.apply_updates(phi, updates), new_state
        phi, state = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, (phi, state))
        return (phi, state, kl, steps + taken, going), None

    orders = jax.vmap(lambda key: random_order(key, size))(jax.random.split(key, num_epochs))
    parts = orders.reshape(num_epochs * num_minibatches, size // num_minibatches)
    start = (params, opt_state, jnp.zeros_like(target, shape=()), jnp.int32(0), jnp.bool_(True))
    (phi, state, kl, steps, _), _ = jax.lax.scan(step, start, parts)
    return Refit(phi, state, kl, steps)


def ros_refit(
    log_prob: LogProb,
    params: Any,
    batch: Any,
    *,
    step_size: float,
    mask: Bool[Array, " N"] | None = None,
) -> Any:
    """One step away from what is remembered: φ = θ - α ∇_θ mean log π_θ(a|s).

    The first step of PROPS, without clip, minibatches and limit.

    Args:
      log_prob, params, batch, mask: of `props_refit`.
      step_size: α > 0.

    Returns:
      the parameters φ; θ where no row counts.

    Raises:
      ValueError: α not above 0, a mask of another shape.

    Source: robust on-policy sampling (ROS), Zhong et al. 2022, arXiv 2111.14552.
    """
    _checks.in_range("step_size", step_size, 0.0, low_open=True)
    _rows(batch, mask)
    grads = jax.grad(lambda theta: _mean(log_prob(theta, batch), mask))(params)
    return jax.tree.map(lambda x, slope: x - step_size * slope, params, grads)


def _ratio(
    behavior_logprobs: Array, target_logprobs: Array, mask: Array | None
) -> Float[Array, " N"]:
    given = behavior_logprobs, target_logprobs
    if mask is not None:
        given = tuple(jnp.where(mask, x, 0.0) for x in given)  # type: ignore[assignment]
    if _checks.is_concrete(*given) and not all(np.isfinite(x).all() for x in given):
        raise ValueError("behavior_logprobs, target_logprobs: expected finite numbers")
    return surrogates.importance_ratio(*given)


def _moved(found: Array, target: Array, mask: Array | None) -> Float[Array, ""]:
    """mean ρ - 1 - log ρ, an estimate of KL(π_θ ‖ π_φ)."""
    return _mean(surrogates.importance_ratio(found, target) - 1.0 - (found - target), mask)


def _mean(x: Array, mask: Array | None) -> Float[Array, ""]:
    return jnp.mean(x) if mask is None else aggregate.masked_mean(x, mask)


def _rows(batch: Any, mask: Array | None) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or not all(np.shape(x) and len(x) == len(leaves[0]) for x in leaves):
        shapes = [np.shape(x) for x in leaves]
        raise ValueError(f"batch: expected leaves [N, ...] of one length, got {shapes}")
    size = len(leaves[0])
    _checks.boolean(mask=mask)
    if mask is not None and np.shape(mask) != (size,):
        raise ValueError(f"mask: expected shape {(size,)}, got {np.shape(mask)}")
    return size
