"""Learning corrections of a base policy: an environment with the base inside, and networks for it.

```
guided = agents.with_base_policy(env, plan, horizon=8)
agent = agents.ppo(guided, agents.residual_actor_critic(guided), bootstrap_truncated=False)
```

Source: ResiP, Ankile et al. 2024, arXiv 2407.16677.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.agents.networks import ActorCritic, vector_size
from pgjax.envs.core import Box, Environment, Step
from pgjax.models import mlp
from pgjax.policies import distributions, residual


class Guided(NamedTuple):
    """A state, what the base has planned from there on, and its action of now."""

    state: Any
    chunk: residual.Chunk
    base_action: Float[Array, " A"]


def with_base_policy(
    env: Environment, plan: residual.Plan, *, horizon: int, scale: float = 0.1, clip: float = 3.0
) -> Environment:
    """The environment of a base policy's corrections: its actions are δ, of which a = a_base + α δ.

    Observations are `residual_observation`s, the base's action at the end, f32 `[O + A]`. The base
    plans anew at the start of each episode and after each H steps. It is part of the world: what it
    computes with has no gradient, and its parameters are those that `plan` has been given
    (`functools.partial(plan, params)`).

    Args:
      env: with normalised vectors as observations and actions.
      plan: the base, `(key, observation [O]) -> actions [H, A]`.
      horizon: H ≥ 1.
      scale: α ≥ 0.
      clip: of the observations.

    Raises:
      ValueError: observations or actions that are not vectors, a number out of range, a plan of
        another shape.
    """
    observations = vector_size(env)
    kind = env.action
    if not isinstance(kind, Box) or len(kind.shape) != 1:
        raise ValueError(f"env.action: expected a vector, got {kind}")
    size = kind.shape[0]
    _checks.in_range("scale", scale, 0.0)
    _checks.in_range("clip", clip, 0.0, low_open=True)
    empty = residual.chunk_init(horizon=horizon, size=size)

    def seen(guided: Guided, observation: Array) -> Array:
        return residual.residual_observation(observation, guided.base_action, clip=clip)

    def reset(key: PRNGKeyArray) -> tuple[Guided, Array]:
        own, base = jax.random.split(key)
        state, observation = env.reset(own)
        action, chunk = residual.chunk_step(base, empty, plan, observation)
        guided = Guided(state, chunk, action)
        return guided, seen(guided, observation)

    def step(key: PRNGKeyArray, guided: Guided, correction: Array) -> Step:
        own, base = jax.random.split(key)
        executed = residual.residual_action(guided.base_action, correction, scale=scale)
        found = env.step(own, guided.state, executed)
        action, chunk = residual.chunk_step(base, guided.chunk, plan, found.observation)
        guided = Guided(found.state, chunk, action)
        return found._replace(state=guided, observation=seen(guided, found.observation))

    return dataclasses.replace(
        env, reset=reset, step=step, observation=Box((observations + size,)), action=Box((size,))
    )


def residual_actor_critic(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
    log_std: float = -1.0,
) -> ActorCritic:
    """Networks that begin as the base policy: the mean's last layer is 0, without a bias.

    The log standard deviation stays as it is. The critic's last layer has a gain of .25 and a bias
    of .25, about what a sparse reward of 1 comes to.

    Args:
      env: with vectors, such as `with_base_policy` makes.
      hidden: sizes of the hidden layers of each.
      activation: behind each of them.
      log_std: of the corrections, not learnt.

    Raises:
      ValueError: observations or actions that are not vectors.

    Departs from the authors' code in the hidden layers, which are orthogonal as all of this
    library's, and Kaiming's there.
    """
    observations = vector_size(env)
    kind = env.action
    if not isinstance(kind, Box) or len(kind.shape) != 1:
        raise ValueError(f"env.action: expected a vector, got {kind}")
    size = kind.shape[0]

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        actor_key, critic_key = jax.random.split(key)
        layers = mlp.init(actor_key, (observations, *hidden, size))[:-1]
        critic = mlp.init(critic_key, (observations, *hidden, 1), last_gain=0.25)
        critic[-1]["bias"] = jnp.full_like(critic[-1]["bias"], 0.25)
        head = jnp.zeros((hidden[-1] if hidden else observations, size))
        return {"actor": {"layers": layers, "head": head}, "critic": critic}

    def actor(params: Any, observation: Array) -> tuple[Array, Array]:
        own = params["actor"]
        head = {"kernel": own["head"], "bias": jnp.zeros(size)}
        mean = mlp.apply([*own["layers"], head], observation, activation=activation)
        return mean, jnp.full_like(mean, log_std)

    def critic(params: Any, observation: Array) -> Array:
        return mlp.apply(params["critic"], observation, activation=activation)[..., 0]

    return ActorCritic(init, actor, critic, distributions.gaussian())
