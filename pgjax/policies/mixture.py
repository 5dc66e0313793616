"""Mixtures of Gaussians as policies, and their experts one by one.

Parameters are a triple: logits f32 `[..., K]` of the weights w = softmax(logits), means and log
standard deviations f32 `[..., K, D]` of the K experts, before a tangent where there is one.

Source: PMOE, Ren et al. 2021, arXiv 2104.09122.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.policies.distributions import (
    Distribution,
    gaussian,
    sample_tanh_gaussian,
    tanh_gaussian,
)


class Mixture(NamedTuple):
    """Weights and experts.

    Attributes:
      logits: of the weights, f32 `[..., K]`.
      mean: of each expert, f32 `[..., K, D]`.
      log_std: of each expert, f32 `[..., K, D]`.
    """

    logits: Float[Array, "*B K"]
    mean: Float[Array, "*B K D"]
    log_std: Float[Array, "*B K D"]


def gaussian_mixture() -> Distribution:
    """Vectors f32 `[..., D]`: p(a) = Σ_k w_k Π_d N(a_d; μ_kd, σ_kd), by a `Mixture`.

    Its mode is the mean of the expert with the largest weight, the first of equals. Entropy and
    divergence have no closed form. Raises ValueError on parameters whose shapes do not fit.
    """
    return _mixture(gaussian(), lambda key, experts: gaussian().sample(key, experts))


def tanh_gaussian_mixture() -> Distribution:
    """`gaussian_mixture` behind a hyperbolic tangent: vectors in [-1, 1].

    As the tangent is one for all experts, p(a) = Σ_k w_k p_k(a) with `tanh_gaussian`'s p_k; actions
    are cut off at ±(1 - 1e-6) for it.
    """
    return _mixture(tanh_gaussian(), lambda key, experts: sample_tanh_gaussian(key, experts)[0])


def _mixture(expert: Distribution, draw: Any) -> Distribution:
    def sample(key: PRNGKeyArray, parameters: Mixture) -> Float[Array, "*B D"]:
        check(parameters)
        actions = draw(key, (parameters.mean, parameters.log_std))
        return take(actions, route(routing_key(key), parameters.logits))

    def log_prob(parameters: Mixture, action: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        check(parameters)
        each = expert.log_prob((parameters.mean, parameters.log_std), action[..., None, :])
        return jax.nn.logsumexp(jax.nn.log_softmax(parameters.logits) + each, axis=-1)

    def mode(parameters: Mixture) -> Float[Array, "*B D"]:
        check(parameters)
        best = jnp.argmax(parameters.logits, axis=-1)
        return take(expert.mode((parameters.mean, parameters.log_std)), best)

    return Distribution(sample, log_prob, None, mode)


def sample_experts(
    key: PRNGKeyArray, parameters: Mixture
) -> tuple[Float[Array, "*B K D"], Float[Array, "*B K"]]:
    """An action of each expert and its log-prob under that expert alone, both differentiable.

    Of `tanh_gaussian`s, by reparametrisation; with K = 1 what `sample_tanh_gaussian` gives for the
    same key.

    Raises:
      ValueError: parameters whose shapes do not fit.
    """
    check(parameters)
    return sample_tanh_gaussian(key, (parameters.mean, parameters.log_std))


def route(key: PRNGKeyArray, logits: Float[Array, "*B K"]) -> Int[Array, "*B"]:
    """The expert to act, k ~ softmax(logits), int32 `[...]`."""
    return jax.random.categorical(key, logits).astype(jnp.int32)


def routing_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """The key of the choice, where `key` itself is that of the experts' noise."""
    return jax.random.fold_in(key, 1)


def take(values: Float[Array, "*B K ..."], expert: Int[Array, "*B"]) -> Array:
    """What belongs to one expert of each sample, `[..., K, D] -> [..., D]`, `[..., K] -> [...]`."""
    at = expert[..., None] if values.ndim == expert.ndim + 1 else expert[..., None, None]
    return jnp.squeeze(jnp.take_along_axis(values, at, axis=expert.ndim), axis=expert.ndim)


def check(parameters: Mixture) -> None:
    """Raises ValueError where logits, means and deviations are not of the same experts."""
    logits, mean, log_std = parameters
    _checks.same_shape(mean=mean, log_std=log_std)
    if mean.ndim < 2 or logits.shape != mean.shape[:-1] or mean.shape[-2] < 1:
        raise ValueError(
            f"logits: expected one for each expert, [..., K], of means [..., K, D] with K at least "
            f"1; got {logits.shape} and {mean.shape}"
        )
