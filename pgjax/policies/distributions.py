"""The distributions that agents act by: functions of a pytree of parameters, batched in front.

An agent sees a `Distribution` and whatever parameters its network gives, so mixtures, residual
policies and structured actions take part in any agent without a change to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

_LOG_ROOT_2PI = 0.5 * float(np.log(2 * np.pi))


class Distribution(NamedTuple):
    """A family of distributions.

    Attributes:
      sample: `(key, parameters) -> action`.
      log_prob: `(parameters, action) -> f32 [...]`, in nats.
      entropy: `parameters -> f32 [...]`, in nats; None where it has no closed form.
      mode: `parameters -> action`, what to do where no exploration is wanted.
      kl: `(p, q) -> f32 [...]`, the divergence KL(p ‖ q) in nats; None where it has no closed form.
    """

    sample: Callable[[PRNGKeyArray, Any], Any]
    log_prob: Callable[[Any, Any], Float[Array, "*B"]]
    entropy: Callable[[Any], Float[Array, "*B"]] | None
    mode: Callable[[Any], Any]
    kl: Callable[[Any, Any], Float[Array, "*B"]] | None = None


def categorical() -> Distribution:
    """Integers int32 `[...]` by logits `[..., A]`; a logit of -inf rules an action out."""

    def log_prob(logits: Float[Array, "*B A"], action: Int[Array, "*B"]) -> Float[Array, "*B"]:
        every = jax.nn.log_softmax(_float(logits))
        return jnp.take_along_axis(every, action[..., None], axis=-1)[..., 0]

    def entropy(logits: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        every = jax.nn.log_softmax(_float(logits))
        # exp(-inf) · -inf is not a number, its limit is 0; so is that of its gradient.
        finite = jnp.where(jnp.isneginf(every), 0.0, every)
        return -jnp.sum(jnp.exp(every) * finite, axis=-1)

    def kl(p: Float[Array, "*B A"], q: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        log_p, log_q = jax.nn.log_softmax(_float(p)), jax.nn.log_softmax(_float(q))
        never = jnp.isneginf(log_p)  # 0 log 0 = 0
        return jnp.sum(jnp.exp(log_p) * jnp.where(never, 0.0, log_p - log_q), axis=-1)

    return Distribution(
        sample=lambda key, logits: jax.random.categorical(key, _float(logits)).astype(jnp.int32),
        log_prob=log_prob,
        entropy=entropy,
        mode=lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        kl=kl,
    )


def gaussian() -> Distribution:
    """Vectors f32 `[..., D]` with independent entries, by means and log standard deviations."""

    def sample(key: PRNGKeyArray, parameters: tuple[Array, Array]) -> Float[Array, "*B D"]:
        mean, log_std = parameters
        return _float(mean) + jnp.exp(log_std) * jax.random.normal(key, mean.shape)

    return Distribution(
        sample=sample,
        log_prob=lambda parameters, action: _normal_log_prob(parameters, action),
        entropy=_normal_entropy,
        mode=lambda parameters: parameters[0],
        kl=_normal_kl,
    )


def tanh_gaussian() -> Distribution:
    """Vectors f32 `[..., D]` in [-1, 1]: the hyperbolic tangent of a Gaussian.

    log p(a) = Σ_d log N(u_d; μ_d, σ_d) - 2 (log 2 - u_d - softplus(-2 u_d)), a = tanh(u). The
    log-prob of an action takes u back from it, and so is exact only as far as a is from ±1 (to
    1e-6, where it is cut off); `sample_with_log_prob` knows u.

    Source: SAC, Haarnoja et al. 2018, arXiv 1801.01290.
    """

    def log_prob(parameters: tuple[Array, Array], action: Array) -> Float[Array, "*B"]:
        bound = 1.0 - 1e-6
        before = jnp.arctanh(jnp.clip(_float(action), -bound, bound))
        return _normal_log_prob(parameters, before) - _tanh_log_slope(before)

    return Distribution(
        sample=lambda key, parameters: sample_tanh_gaussian(key, parameters)[0],
        log_prob=log_prob,
        entropy=None,
        mode=lambda parameters: jnp.tanh(parameters[0]),
        kl=_normal_kl,  # a one-to-one map of both leaves it as it is
    )


def sample_tanh_gaussian(
    key: PRNGKeyArray, parameters: tuple[Float[Array, "*B D"], Float[Array, "*B D"]]
) -> tuple[Float[Array, "*B D"], Float[Array, "*B"]]:
    """A sample and its log-prob, both differentiable in mean and log standard deviation.

    Args:
      key: of the noise.
      parameters: mean and log standard deviation before the tangent, `[..., D]`.

    Returns:
      the action in (-1, 1), `[..., D]`; its log-prob, `[...]`.
    """
    mean, log_std = parameters
    noise = jax.random.normal(key, mean.shape)
    before = _float(mean) + jnp.exp(log_std) * noise
    normal = -jnp.sum(0.5 * jnp.square(noise) + log_std + _LOG_ROOT_2PI, axis=-1)
    return jnp.tanh(before), normal - _tanh_log_slope(before)


def _tanh_log_slope(before: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Σ_d log(1 - tanh(u_d)²), without cancellation."""
    return jnp.sum(2.0 * (jnp.log(2.0) - before - jax.nn.softplus(-2.0 * before)), axis=-1)


def _normal_log_prob(parameters: tuple[Array, Array], value: Array) -> Float[Array, "*B"]:
    mean, log_std = (_float(x) for x in parameters)
    away = (value - mean) * jnp.exp(-log_std)
    return -jnp.sum(0.5 * jnp.square(away) + log_std + _LOG_ROOT_2PI, axis=-1)


def _normal_entropy(parameters: tuple[Array, Array]) -> Float[Array, "*B"]:
    mean, log_std = parameters
    every = jnp.broadcast_to(_float(log_std), mean.shape)
    return jnp.sum(every + 0.5 + _LOG_ROOT_2PI, axis=-1)


def _normal_kl(p: tuple[Array, Array], q: tuple[Array, Array]) -> Float[Array, "*B"]:
    (mean, log_std), (other, other_log_std) = jax.tree.map(_float, (p, q))
    ratio = jnp.exp(2.0 * (log_std - other_log_std))
    away = jnp.square((mean - other) * jnp.exp(-other_log_std))
    return jnp.sum(0.5 * (ratio + away - 1.0) - (log_std - other_log_std), axis=-1)


def _float(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
