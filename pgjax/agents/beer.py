"""DDPG whose critic's features may be as alike from step to step as the Bellman equation allows.

Source: He et al. 2024 (BEER), arXiv 2404.12754.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, values
from pgjax.agents.agent import Agent
from pgjax.agents.ddpg import ddpg
from pgjax.agents.networks import Network, critics, deterministic_policy
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.models import mlp
from pgjax.types import Transition


class LinearHeadCritic(NamedTuple):
    """Q(s, a) = φ(s, a)ᵀw + c, and its parts.

    Attributes:
      init: `key -> params`.
      apply: `(params, observation, action) -> Q [1, ...]`.
      features: `(params, observation, action) -> φ [..., D]`.
      weight: `params -> w [D]`.
    """

    init: Callable[[PRNGKeyArray], Any]
    apply: Callable[[Any, Any, Any], Array]
    features: Callable[[Any, Any, Any], Float[Array, "*B D"]]
    weight: Callable[[Any], Float[Array, " D"]]


def linear_head_critic(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> LinearHeadCritic:
    """One critic of `critics`, parameters and all, that also shows its last hidden layer.

    Raises:
      ValueError: no hidden layer, observations that are not vectors, actions outside [-1, 1].
    """
    if not hidden:
        raise ValueError("hidden: expected at least one layer, got none")
    judge = critics(env, num=1, hidden=hidden, activation=activation)

    def features(params: Any, observation: Array, action: Array) -> Array:
        below = jax.tree.map(lambda x: x[0], params[:-1])
        both = jnp.concatenate([observation, action], axis=-1)
        return activation(mlp.apply(below, both, activation=activation))

    return LinearHeadCritic(
        init=judge.init,
        apply=judge.apply,
        features=features,
        weight=lambda params: params[-1]["kernel"][0, :, 0],
    )


def beer(
    env: Environment,
    policy: Network | None = None,
    critic: LinearHeadCritic | None = None,
    *,
    beta: float = 1e-3,
    discount: float = 0.99,
    mask_terminated: bool = False,
    **options: Any,
) -> Agent:
    """DDPG with L_Q = mean[(Q(s, a) - y)² + β max(0, cos(φ, φ̄') - U)] / 2.

    φ̄' = φ̄(s', μ̄(s')) by the averaged copies; U is `values.beer_bound` with φ' = φ(s', μ(s')) by
    the networks that learn, and ‖φ̄'‖ in the denominator. Half of the authors' loss, as DDPG's is
    here: Adam's steps are the same.

    Args:
      env: the world, with actions in [-1, 1]; observations must be vectors where a network is
        None.
      policy: `(params, observation) -> action`; None: `deterministic_policy(env)`.
      critic: with a linear head; None: `linear_head_critic(env)`.
      beta: β ≥ 0; the number 0 is DDPG, to the bit.
      discount: γ in (0, 1].
      mask_terminated: no penalty where an episode terminates, as there is no next value there and
        the bound says nothing; the authors' code has it everywhere.
      **options: as in `ddpg`.

    Returns:
      the agent, with DDPG's metrics.

    Raises:
      ValueError: as `ddpg`; β below 0, γ not above 0, a critic that shows no features.

    Source: He et al. 2024 (BEER), arXiv 2404.12754.
    """
    _checks.in_range("beta", beta, 0.0)
    _checks.in_range("discount", discount, 0.0, 1.0, low_open=True)
    actor = deterministic_policy(env) if policy is None else policy
    judge = linear_head_critic(env) if critic is None else critic
    if not (hasattr(judge, "features") and hasattr(judge, "weight")):
        raise ValueError(
            f"critic: expected a LinearHeadCritic, got a {type(judge).__name__}; "
            "see linear_head_critic"
        )

    def penalty(params: Any, learner: Learner, batch: Transition) -> Array:
        def following(networks: dict[str, Any]) -> Array:
            action = actor.apply(networks["actor"], batch.next_observation)
            return judge.features(networks["critic"], batch.next_observation, action)

        own = judge.features(params, batch.observation, batch.action)
        averaged = following(learner.targets)
        bound = values.beer_bound(
            own,
            following(learner.params),
            batch.reward,
            head_square_norm=jnp.sum(jnp.square(judge.weight(params))),
            discount=discount,
            scale_features=averaged,
        )
        found = values.beer_penalty(own, averaged, bound)
        if mask_terminated:
            found = jnp.where(batch.terminated, 0.0, found)
        return 0.5 * beta * found.mean()

    # Zero times a penalty would be added in vain, and in another order of rounding.
    plain = isinstance(beta, int | float) and beta == 0
    return ddpg(
        env,
        actor,
        Network(judge.init, judge.apply),
        discount=discount,
        critic_penalty=None if plain else penalty,
        **options,
    )
