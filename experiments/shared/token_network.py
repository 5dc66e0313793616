"""A small transformer as the policy of a problem of tokens that can be enumerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import pgjax as pg

Logits = Callable[[Any, Int[Array, "B T"]], Float[Array, "B T A"]]


def make_decoder(
    *, num_prompts: int, num_actions: int, horizon: int, width: int
) -> pg.models.FunctionalDecoder:
    """Two layers of two heads; every prompt is a token of its own, behind the actions."""
    return pg.models.FunctionalDecoder(
        pg.models.DecoderConfig(
            vocab_size=num_actions + num_prompts,
            hidden_size=width,
            num_layers=2,
            num_heads=2,
            mlp_size=2 * width,
            gated=False,
            activation="relu",
            rope_theta=100.0,
            max_length=1 + horizon,
            init_stddev=None,
        )
    )


def logits_of(decoder: pg.models.FunctionalDecoder, num_actions: int) -> Logits:
    """`logits` of a `diagnostics.TokenProblem`: each token's at its own place."""

    def logits(params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T A"]:
        hidden = decoder.apply(params, tokens.at[:, 0].add(num_actions))
        found = decoder.logits(params, hidden)[..., :num_actions]
        return jnp.pad(found[:, :-1], ((0, 0), (1, 0), (0, 0)))

    return logits


def fitted(
    logits: Logits,
    params: Any,
    wanted: Callable[[Int[Array, "B T"]], Float[Array, "B T A"]],
    rows_of: Callable[[PRNGKeyArray], Int[Array, "B T"]],
    key: PRNGKeyArray,
    *,
    steps: int,
) -> Any:
    """Parameters after Adam on the cross-entropy to the softmax of `wanted`.

    Args:
      logits: of the network.
      params: before.
      wanted: logits of the distribution to learn, at every token but the first.
      rows_of: a batch of rows, drawn anew at each step.
      key: of the rows.
      steps: over which the rate falls from .01 to 0.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(params: Any, rows: Array) -> Array:
        found = jax.nn.log_softmax(logits(params, rows))
        return -(jax.nn.softmax(wanted(rows)) * found)[:, 1:].sum(-1).mean()

    def step(state: Any, key: Array) -> tuple[Any, None]:
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, rows_of(key)), moments)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]
