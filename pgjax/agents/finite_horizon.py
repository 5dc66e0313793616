"""Episodes of H steps with a policy and a critic for each: networks, play, fitting the critics.

All parameters have H in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import returns, values
from pgjax.agents.networks import actor_critic, vector_size
from pgjax.agents.off_policy import descend
from pgjax.envs.core import Discrete, Environment
from pgjax.models import mlp
from pgjax.policies.distributions import Distribution
from pgjax.sampling.environments import Decision, start_environments, unroll_environments
from pgjax.types import Transition


class ActorQ(NamedTuple):
    """A policy and a critic of its actions, at one step.

    Attributes:
      init: `key -> params`, a dict with `actor` and `critic`.
      actor: `(params, observation [..., O]) -> parameters of the distribution`.
      q: `(params, observation [..., O], action [..., A]) -> values f32 [...]`.
      distribution: of the actions, with a closed-form `kl`.
    """

    init: Callable[[PRNGKeyArray], Any]
    actor: Callable[[Any, Any], Any]
    q: Callable[[Any, Any, Any], Float[Array, "*B"]]
    distribution: Distribution


def actor_q(
    env: Environment, *, hidden: Sequence[int] = (16, 16), critic_hidden: Sequence[int] = (64, 64)
) -> ActorQ:
    """The policy of `actor_critic`, and a perceptron on observation and action, all with tangents.

    Raises:
      ValueError: observations that are not vectors.
    """
    base, kind = actor_critic(env, hidden=hidden), env.action
    discrete = isinstance(kind, Discrete)
    entries = kind.num if isinstance(kind, Discrete) else int(np.prod(kind.shape))
    sizes = (vector_size(env) + entries, *critic_hidden, 1)

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        actor_key, critic_key = jax.random.split(key)
        return {"actor": base.init(actor_key)["actor"], "critic": mlp.init(critic_key, sizes)}

    def q(params: Any, observation: Array, action: Array) -> Array:
        code = jax.nn.one_hot(action, entries) if discrete else action
        return mlp.apply(params["critic"], jnp.concatenate([observation, code], axis=-1))[..., 0]

    return ActorQ(init, base.actor, q, base.distribution)


def play(
    env: Environment, net: ActorQ, params: Any, key: PRNGKeyArray, *, num_episodes: int
) -> Transition:
    """Whole episodes by the policies of all steps, `[H, num_episodes, ...]`."""
    start_key, key = jax.random.split(key)
    horizon = jax.tree.leaves(params)[0].shape[0]

    def one(running: Any, now: tuple[Any, PRNGKeyArray]) -> tuple[Any, Transition]:
        own, key = now

        def act(key: PRNGKeyArray, observation: Any) -> Decision:
            return Decision(net.distribution.sample(key, net.actor(own, observation)))

        running, seen, _ = unroll_environments(env, act, running, key, num_steps=1)
        return running, jax.tree.map(lambda x: x[0], seen)

    running = start_environments(env, start_key, num_episodes)
    return jax.lax.scan(one, running, (params, jax.random.split(key, horizon)))[1]


def fit_critics(
    net: ActorQ,
    params: Any,
    key: PRNGKeyArray,
    online: Transition,
    offline: Transition,
    *,
    weight: float = 1.0,
    discount: float = 1.0,
    num_steps: int = 30,
    learning_rate: float = 3e-4,
) -> tuple[Any, Float[Array, " H"]]:
    """Critics of the present policies, from the last step to the first.

    At each step `values.hybrid_critic_loss` on returns to go of `online` and on
    r + γ f_{h+1}(s', a'), a' ~ π_{h+1}(·|s'), of `offline`, one a' each, with the f_{h+1} just
    fitted; full-batch Adam, started anew.

    Args:
      net: of one step.
      params: leaves `[H, ...]`; the critics go on from what they are.
      key: of the actions a'.
      online: whole episodes, `[H, N, ...]`; N = 0 for none.
      offline: transitions of each step, `[H, M, ...]`; M = 0 for none.
      weight: λ ≥ 0.
      discount: γ in [0, 1].
      num_steps: of Adam, ≥ 1.
      learning_rate: > 0.

    Returns:
      the parameters; the last loss at each step.
    """
    adam = optax.adam(learning_rate)
    gains = returns.discounted(online.reward.T, discount * (1.0 - online.terminated.T)).T

    def fit(following: Any, now: Any) -> tuple[Any, Any]:
        own, key, met, gain, recorded = now
        later = net.distribution.sample(key, net.actor(following, recorded.next_observation))
        target = values.one_step_targets(
            recorded.reward,
            net.q(following, recorded.next_observation, later),
            discount * (1.0 - recorded.terminated),
        )

        def loss_of(critic: Any) -> Array:
            given = {**own, "critic": critic}
            return values.hybrid_critic_loss(
                net.q(given, met.observation, met.action),
                gain,
                net.q(given, recorded.observation, recorded.action),
                target,
                weight=weight,
            )

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            critic, state = carry
            loss, grads = jax.value_and_grad(loss_of)(critic)
            return descend(adam, grads, state, critic), loss

        begun = own["critic"], adam.init(own["critic"])
        (critic, _), losses = jax.lax.scan(step, begun, None, length=num_steps)
        own = {**own, "critic": critic}
        return own, (own, losses[-1])

    last = jax.tree.map(lambda x: x[-1], params)  # behind the last step nothing is asked for
    keys = jax.random.split(key, gains.shape[0])
    return jax.lax.scan(fit, last, (params, keys, online, gains, offline), reverse=True)[1]
