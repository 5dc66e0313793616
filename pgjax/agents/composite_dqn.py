"""Deep Q-learning of actions made of parts.

Source: QWeb, Gur et al. 2018, "Learning to Navigate the Web", arXiv 1812.09195; its numbers are not
known, the defaults are a guess.
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
from pgjax.agents.networks import Network, num_actions
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.policies import composite
from pgjax.sampling.epsilon_greedy import epsilon_greedy
from pgjax.types import Transition

Masks = Callable[[Any], tuple[Array | None, Array | None]]


def composite_dqn(
    env: Environment,
    network: Network,
    *,
    num_arguments: int,
    masks: Masks = lambda observation: (None, None),
    optimizer: optax.GradientTransformation | None = None,
    error: Callable[[Any, Any], Array] = values.huber_error,
    num_envs: int = 8,
    num_steps: int = 1,
    gradient_steps: int = 1,
    batch_size: int = 64,
    capacity: int = 20_000,
    start_steps: int = 1_000,
    discount: float = 0.99,
    target_period: int = 100,
    epsilon: tuple[float, float] = (1.0, 0.05),
    explore_over: int = 25_000,
    learning_rate: float = 1e-3,
) -> Agent:
    """DQN with y = r + γ(1 - terminated) max Q'(s', element) for every part of the action.

    Args:
      env: the world, whose actions are `policies.composite_index`.
      network: `(params, observation) -> policies.CompositeValues`.
      num_arguments: F of its actions.
      masks: `observation -> (elements [..., L], arguments [..., F])`, true where there is one.
      optimizer: None: Adam.
      error: of each part, `values.composite_error`.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`.
      discount: γ in [0, 1].
      target_period: gradient steps from one copy to the next.
      epsilon: of exploration, at first and at last; it draws one of all combinations.
      explore_over: environment steps over which it falls, linearly.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: `loss`, and of the episodes that ended `return`, `length` (means, NaN
      where none did) and `episodes`.

    Raises:
      ValueError: a number out of range, actions that are not discrete.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("target_period", target_period, 1)
    _checks.in_range("explore_over", explore_over, 1)
    _checks.in_range("num_arguments", num_arguments, 1)
    for end in epsilon:
        _checks.in_range("epsilon", end, 0.0, 1.0)
    total = num_actions(env)
    if total % (1 + num_arguments):
        raise ValueError(
            f"num_arguments: expected 1 less than a divisor of {total} actions, got {num_arguments}"
        )
    descent = optax.adam(learning_rate) if optimizer is None else optimizer
    exploration = optax.linear_schedule(*epsilon, explore_over)
    per_update = num_envs * num_steps

    def new(key: PRNGKeyArray) -> Learner:
        q = network.init(key)
        return Learner({"q": q}, {"q": q}, {"q": descent.init(q)}, jnp.int32(0))

    def greedy(learner: Learner, observation: Any) -> Array:
        elements, arguments = masks(observation)
        action = composite.composite_argmax(
            network.apply(learner.params["q"], observation),
            element_mask=elements,
            argument_mask=arguments,
        )
        return composite.composite_index(action, num_arguments=num_arguments)

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        best = jax.nn.one_hot(greedy(learner, observation), total)
        return epsilon_greedy(key, best, epsilon=exploration(updates * per_update))

    def target_of(learner: Learner, batch: Transition) -> Float[Array, " B"]:
        elements, _ = masks(batch.next_observation)
        later = network.apply(learner.targets["q"], batch.next_observation)
        return values.one_step_targets(
            batch.reward,
            composite.composite_greedy_value(later, element_mask=elements),
            off_policy.discounts(batch, discount),
        )

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        del key
        target = target_of(learner, batch)
        action = composite.composite_action(batch.action, num_arguments=num_arguments)

        def loss_of(q: Any) -> Array:
            found = network.apply(q, batch.observation)
            return values.composite_error(found, action, target, error=error).mean()

        q, opt_state = learner.params["q"], learner.opt_state["q"]
        loss, grads = jax.value_and_grad(loss_of)(q)
        q, opt_state = off_policy.descend(descent, grads, opt_state, q)
        taken = learner.taken + 1
        copied = optax.periodic_update(q, learner.targets["q"], taken, target_period)
        return Learner({"q": q}, {"q": copied}, {"q": opt_state}, taken), {"loss": loss}

    return off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=greedy,
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
    )
