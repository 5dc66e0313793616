"""The networks agents start from, small and replaceable: any `init`/`apply` pair will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax.envs.core import Box, Discrete, Environment
from pgjax.models import mlp
from pgjax.policies import distributions


class ActorCritic(NamedTuple):
    """A policy and a value function.

    Attributes:
      init: `key -> params`, a dict with `actor` and `critic`.
      actor: `(params, observation [..., O]) -> parameters of the distribution`.
      critic: `(params, observation [..., O]) -> values f32 [...]`.
      distribution: of the actions.
    """

    init: Callable[[PRNGKeyArray], Any]
    actor: Callable[[Any, Any], Any]
    critic: Callable[[Any, Any], Float[Array, "*B"]]
    distribution: distributions.Distribution


def actor_critic(
    env: Environment,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Any], Any] = jnp.tanh,
    initial_log_std: float = 0.0,
) -> ActorCritic:
    """Separate networks for actor and critic, categorical or Gaussian by the environment's actions.

    A Gaussian's log standard deviation does not depend on the observation. The heads start with
    gains .01 (actor) and 1 (critic), the hidden layers with √2.

    Args:
      env: whose observations and actions it is for; observations must be vectors, see
        `envs.with_flat_observations`.
      hidden: sizes of the hidden layers.
      activation: behind each of them.
      initial_log_std: of Gaussian actions.

    Raises:
      ValueError: observations that are not vectors.
    """
    size = vector_size(env)
    kind = env.action
    outputs = kind.num if isinstance(kind, Discrete) else int(np.prod(kind.shape))

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        actor_key, critic_key = jax.random.split(key)
        actor = {"mlp": mlp.init(actor_key, (size, *hidden, outputs), last_gain=0.01)}
        if isinstance(kind, Box):
            actor["log_std"] = jnp.full(outputs, initial_log_std)  # type: ignore[assignment]
        return {"actor": actor, "critic": mlp.init(critic_key, (size, *hidden, 1))}

    def actor(params: Any, observation: Array) -> Any:
        found = mlp.apply(params["actor"]["mlp"], observation, activation=activation)
        if isinstance(kind, Discrete):
            return found
        return found, jnp.broadcast_to(params["actor"]["log_std"], found.shape)

    def critic(params: Any, observation: Array) -> Array:
        return mlp.apply(params["critic"], observation, activation=activation)[..., 0]

    family = distributions.categorical if isinstance(kind, Discrete) else distributions.gaussian
    return ActorCritic(init, actor, critic, family())


def vector_size(env: Environment) -> int:
    """Entries of an observation; raises ValueError where it is not a vector."""
    kind = env.observation
    if isinstance(kind, Discrete) or len(kind.shape) != 1:
        raise ValueError(
            f"env.observation: expected a vector, got {kind}; see envs.with_flat_observations"
        )
    return kind.shape[0]
