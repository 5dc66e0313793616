"""The networks agents start from, small and replaceable: any `init`/`apply` pair will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
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


class Network(NamedTuple):
    """A function with parameters.

    Attributes:
      init: `key -> params`.
      apply: `(params, observation [..., O], ...) -> f32`, or a pytree of it.
    """

    init: Callable[[PRNGKeyArray], Any]
    apply: Callable[..., Any]


def value_network(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """The value of an observation, `(params, observation [..., O]) -> [...]`.

    Raises:
      ValueError: observations that are not vectors.
    """
    sizes = (vector_size(env), *hidden, 1)
    return Network(
        init=lambda key: mlp.init(key, sizes),
        apply=lambda params, observation: mlp.apply(params, observation, activation=activation)[
            ..., 0
        ],
    )


def critics(
    env: Environment,
    *,
    num: int = 2,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """Several values of an action, `(params, observation [..., O], action [..., D]) -> [num, ...]`.

    Parameters are stacked in front; each network has its own start.

    Raises:
      ValueError: observations that are not vectors, actions outside [-1, 1], a `num` below 1.
    """
    _checks.in_range("num", num, 1)
    sizes = (vector_size(env) + unit_actions(env), *hidden, 1)

    def apply(params: Any, observation: Array, action: Array) -> Array:
        both = jnp.concatenate([observation, action], axis=-1)
        return jax.vmap(lambda one: mlp.apply(one, both, activation=activation)[..., 0])(params)

    return Network(
        init=lambda key: jax.vmap(lambda key: mlp.init(key, sizes))(jax.random.split(key, num)),
        apply=apply,
    )


def deterministic_policy(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """An action in [-1, 1], `(params, observation [..., O]) -> [..., D]`: a tangent at the end.

    Raises:
      ValueError: observations that are not vectors, actions outside [-1, 1].
    """
    sizes = (vector_size(env), *hidden, unit_actions(env))
    return Network(
        init=lambda key: mlp.init(key, sizes, last_gain=0.01),
        apply=lambda params, observation: jnp.tanh(
            mlp.apply(params, observation, activation=activation)
        ),
    )


def squashed_gaussian_policy(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
    log_std_range: tuple[float, float] = (-20.0, 2.0),
) -> Network:
    """Parameters of `policies.tanh_gaussian`: mean and log standard deviation, both `[..., D]`.

    Both depend on the observation; the latter is cut off at the ends of its range.

    Raises:
      ValueError: observations that are not vectors, actions outside [-1, 1].

    Source: SAC, Haarnoja et al. 2018, arXiv 1801.01290.
    """
    size = unit_actions(env)
    sizes = (vector_size(env), *hidden, 2 * size)

    def apply(params: Any, observation: Array) -> tuple[Array, Array]:
        found = mlp.apply(params, observation, activation=activation)
        return found[..., :size], jnp.clip(found[..., size:], *log_std_range)

    return Network(init=lambda key: mlp.init(key, sizes, last_gain=0.01), apply=apply)


def bounded_mean_policy(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
    log_std_range: tuple[float, float] = (-5.0, 2.0),
) -> Network:
    """Parameters of `policies.gaussian` whose mean, not whose samples, is kept in (-1, 1).

    The log standard deviation does not depend on the observation, starts at 0 and is cut off at
    the ends of its range.

    Raises:
      ValueError: observations that are not vectors, actions outside [-1, 1].

    Source: IQL, Kostrikov et al. 2021, arXiv 2110.06169.
    """
    size = unit_actions(env)
    sizes = (vector_size(env), *hidden, size)

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        return {"mlp": mlp.init(key, sizes, last_gain=0.01), "log_std": jnp.zeros(size)}

    def apply(params: Any, observation: Array) -> tuple[Array, Array]:
        mean = jnp.tanh(mlp.apply(params["mlp"], observation, activation=activation))
        log_std = jnp.clip(params["log_std"], *log_std_range)
        return mean, jnp.broadcast_to(log_std, mean.shape)

    return Network(init, apply)


def num_actions(env: Environment) -> int:
    """How many actions there are; raises ValueError where they are not discrete."""
    if not isinstance(env.action, Discrete):
        raise ValueError(f"env.action: expected Discrete actions, got {env.action}")
    return env.action.num


def unit_actions(env: Environment) -> int:
    """Entries of an action; raises ValueError where they are not vectors in [-1, 1]."""
    kind = env.action
    if (
        isinstance(kind, Discrete)
        or len(kind.shape) != 1
        or not (np.all(np.asarray(kind.low) == -1.0) and np.all(np.asarray(kind.high) == 1.0))
    ):
        raise ValueError(
            f"env.action: expected a vector in [-1, 1], got {kind}; see envs.with_scaled_actions"
        )
    return kind.shape[0]
