"""Experts chosen for tokens by sparse transport: no expert takes more than its capacity."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.optim.transport import sparse_plan


def transport_router(
    logits: Float[Array, "T E"],
    *,
    capacity_factor: float = 1.0,
    gamma: float = 1.0,
    learning_rate: float = 1e-2,
    iterations: int = 20,
) -> Float[Array, "T E"]:
    """Combination weights: `softmax(logits)` where the transport plan sends a token, 0 elsewhere.

    The plan moves T tokens of mass 1 to E experts of mass T / E at cost `-softmax(logits)`, and
    each expert's column has at most `capacity = ceil(capacity_factor T / E)` tokens, rounded up to
    a multiple of 4. With enough iterations every token is sent somewhere; 20, as published, come
    near. The plan is a choice: derivatives go through the softmax alone.

    Args:
      logits: of a router, floating; tokens of all sequences together.
      capacity_factor: static, above 0. Capacity below T / E cannot serve every token.
      gamma: of the plan's quadratic regularisation; smaller ones choose fewer experts a token.
      learning_rate: of Adam on the tokens' potentials.
      iterations: static.

    Returns:
      float32; rows do not sum to 1, as softmax weights of chosen experts do not.

    Raises:
      ValueError: logits of another rank or an integer dtype, options out of range.

    Source: Liu, Puigcerver and Blondel, 2023, arXiv 2209.15466.
    """
    _checks.floating(logits=logits)
    if jnp.ndim(logits) != 2:
        raise ValueError(f"logits: expected [tokens, experts], got shape {jnp.shape(logits)}")
    _checks.in_range("capacity_factor", capacity_factor, 0, low_open=True)
    _checks.in_range("iterations", iterations, 1)
    tokens, experts = logits.shape
    capacity = 4 * math.ceil(math.ceil(capacity_factor * tokens / experts) / 4)
    weights = jax.nn.softmax(logits.astype(jnp.float32))
    plan, _ = sparse_plan(
        -jax.lax.stop_gradient(weights),
        jnp.ones(tokens),
        jnp.full(experts, tokens / experts),
        k=min(capacity, tokens),
        gamma=gamma,
        solver=optax.adam(learning_rate),
        tol=1e-6,
        max_iters=iterations,
    )
    return jnp.where(jax.lax.stop_gradient(plan) > 0, weights, 0.0)
