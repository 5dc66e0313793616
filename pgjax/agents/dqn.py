"""Deep Q-learning from a replay buffer, with a target network.

Sources: Mnih et al. 2013, arXiv 1312.5602, and 2015 (target network); double Q-learning: van
Hasselt et al. 2015, arXiv 1509.06461. The default numbers are CleanRL's for CartPole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, values
from pgjax.agents import off_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network
from pgjax.agents.off_policy import Learner
from pgjax.agents.q_networks import q_network
from pgjax.envs.core import Environment
from pgjax.sampling.epsilon_greedy import epsilon_greedy
from pgjax.types import Transition


def dqn(
    env: Environment,
    network: Network | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    error: Callable[[Array, Array], Float[Array, " B"]] = values.value_error,
    double: bool = False,
    num_envs: int = 1,
    num_steps: int = 10,
    gradient_steps: int = 1,
    batch_size: int = 128,
    capacity: int = 10_000,
    start_steps: int = 10_000,
    discount: float = 0.99,
    target_period: int = 50,
    epsilon: tuple[float, float] = (1.0, 0.05),
    explore_over: int = 25_000,
    learning_rate: float = 2.5e-4,
) -> Agent:
    """DQN: y = r + γ(1 - terminated) max_a Q'(s', a), Q' a copy of Q that is renewed now and then.

    Args:
      env: the world, with discrete actions; observations must be vectors where `network` is None.
      network: `(params, observation) -> [..., A]`; None: `q_network(env)`.
      optimizer: None: Adam.
      error: `(Q(s, a), y) -> per sample`. Mnih et al. take `values.huber_error`; with it and these
        numbers the values of CartPole grew beyond all bounds in 60,000 steps, since the few ends of
        episodes, whose errors are large, then count no more than their neighbours.
      double: let Q choose the action that Q' judges.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`; by default a gradient step every ten environment steps.
      discount: γ in [0, 1].
      target_period: gradient steps from one copy to the next.
      epsilon: of exploration, at first and at last.
      explore_over: environment steps over which it falls, linearly.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: `loss`, `value` (mean Q of the actions sampled), `epsilon`, and of the
      episodes that ended `return`, `length` (means, NaN where none did) and `episodes`.

    Raises:
      ValueError: a number out of range, actions that are not discrete, observations that are not
        vectors and no `network`.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("target_period", target_period, 1)
    _checks.in_range("explore_over", explore_over, 1)
    for end in epsilon:
        _checks.in_range("epsilon", end, 0.0, 1.0)
    net = q_network(env) if network is None else network
    descent = optax.adam(learning_rate) if optimizer is None else optimizer
    exploration = optax.linear_schedule(*epsilon, explore_over)
    per_update = num_envs * num_steps

    def new(key: PRNGKeyArray) -> Learner:
        q = net.init(key)
        return Learner({"q": q}, {"q": q}, {"q": descent.init(q)}, jnp.int32(0))

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        action_values = net.apply(learner.params["q"], observation)
        return epsilon_greedy(key, action_values, epsilon=exploration(updates * per_update))

    def targets_of(learner: Learner, batch: Transition) -> Float[Array, " B"]:
        later = net.apply(learner.targets["q"], batch.next_observation)
        if double:
            chosen = net.apply(learner.params["q"], batch.next_observation)
            following = values.double_greedy_values(chosen, later)
        else:
            following = values.greedy_values(later)
        return values.one_step_targets(
            batch.reward, following, off_policy.discounts(batch, discount)
        )

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        del key
        target = targets_of(learner, batch)

        def loss_of(q: Any) -> tuple[Array, Array]:
            value = values.taken_values(net.apply(q, batch.observation), batch.action)
            return error(value, target).mean(), value.mean()

        q, opt_state = learner.params["q"], learner.opt_state["q"]
        (loss, value), grads = jax.value_and_grad(loss_of, has_aux=True)(q)
        q, opt_state = off_policy.descend(descent, grads, opt_state, q)
        taken = learner.taken + 1
        copied = optax.periodic_update(q, learner.targets["q"], taken, target_period)
        return Learner({"q": q}, {"q": copied}, {"q": opt_state}, taken), {
            "loss": loss,
            "value": value,
        }

    inner = off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=lambda learner, observation: jnp.argmax(
            net.apply(learner.params["q"], observation), axis=-1
        ),
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
    )

    def update(state: off_policy.State) -> tuple[off_policy.State, Metrics]:
        now = jnp.asarray(exploration(state.updates * per_update), jnp.float32)
        state, metrics = inner.update(state)
        return state, metrics | {"epsilon": now}

    return inner._replace(update=update)
