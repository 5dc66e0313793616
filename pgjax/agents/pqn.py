"""Q-learning on many environments at once, without replay buffer and target network.

Source: Gallici et al. 2024, "Simplifying Deep Temporal Difference Learning", arXiv 2407.04811; the
default numbers are its code's for CartPole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, values
from pgjax.agents import off_policy, on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, num_actions
from pgjax.agents.q_networks import layer_norm_q_network
from pgjax.envs.core import Environment
from pgjax.sampling.environments import Decision, unroll_environments
from pgjax.sampling.epsilon_greedy import epsilon_greedy
from pgjax.types import Transition


def pqn(
    env: Environment,
    network: Network | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    num_envs: int = 32,
    num_steps: int = 64,
    num_epochs: int = 4,
    num_minibatches: int = 16,
    discount: float = 0.99,
    lambda_: float = 0.95,
    epsilon: tuple[float, float] = (1.0, 0.2),
    explore_over: int = 100_000,
    bootstrap_truncated: bool = True,
    learning_rate: float = 1e-4,
    anneal_over: int | None = None,
    max_gradient_norm: float = 10.0,
) -> Agent:
    """PQN: squared errors to Q(λ) targets, on minibatches of a fresh batch.

    L = mean (Q(s, a) - G)² / 2, G = `values.q_lambda_targets` by the network that collected the
    batch, fixed over its epochs. Normalised layers take the target network's place. With λ = 0 and
    one step, epoch and minibatch it is one-step Q-learning online.

    Args:
      env: the world, with discrete actions; observations must be vectors where `network` is None.
      network: `(params, observation) -> [..., A]`; None: `layer_norm_q_network(env)`.
      optimizer: None: RAdam behind a clip of the gradient's norm.
      num_envs: N.
      num_steps: T of each environment in a batch.
      num_epochs: passes over a batch.
      num_minibatches: optimizer steps a pass; divides N T.
      discount: γ in [0, 1].
      lambda_: in [0, 1].
      epsilon: of exploration, at first and at last.
      explore_over: environment steps over which it falls, linearly and from update to update.
      bootstrap_truncated: where an episode was cut off, count on the value of its last observation;
        costs one more pass of the network over the batch. False takes time limits for ends, as the
        authors' code does.
      learning_rate: of the default optimizer.
      anneal_over: updates over which it falls to 0, linearly and from update to update; None: it
        does not.
      max_gradient_norm: of the default optimizer.

    Returns:
      the agent. Metrics: `loss`, `value` (mean Q of the actions taken), `epsilon`,
      `explained_variance` (of the targets, before the update), and of the episodes that ended
      `return`, `length` (means, NaN where none did) and `episodes`.

    Raises:
      ValueError: a number out of range, a count that does not divide, actions that are not
        discrete, observations that are not vectors and no `network`.
    """
    for name, count in {
        "num_envs": num_envs,
        "num_steps": num_steps,
        "num_epochs": num_epochs,
        "num_minibatches": num_minibatches,
        "explore_over": explore_over,
    }.items():
        _checks.in_range(name, count, 1)
    for name, share in {
        "discount": discount,
        "lambda_": lambda_,
        "epsilon": epsilon[0],
        "epsilon at last": epsilon[1],
    }.items():
        _checks.in_range(name, share, 0.0, 1.0)
    num_actions(env)
    size = num_envs * num_steps
    if size % num_minibatches:
        raise ValueError(
            f"num_minibatches: expected a divisor of {num_envs} x {num_steps} steps, "
            f"got {num_minibatches}"
        )
    net = layer_norm_q_network(env) if network is None else network
    if optimizer is None:
        rate = on_policy.annealed(learning_rate, anneal_over, num_epochs * num_minibatches)
        optimizer = optax.chain(optax.clip_by_global_norm(max_gradient_norm), optax.radam(rate))
    descent = optimizer
    exploration = optax.linear_schedule(*epsilon, explore_over)

    def init(key: PRNGKeyArray) -> on_policy.State:
        return on_policy.initial(env, net, descent.init, key, num_envs=num_envs)

    def targets_of(
        params: Any, seen: Transition, chosen: Array, last_observation: Any
    ) -> Float[Array, "T N"]:
        truncated = None
        if bootstrap_truncated:
            following = net.apply(params, seen.next_observation)
            ended, truncated = seen.terminated, seen.truncated.T
        else:  # a next step of another episode is hidden by a discount of 0
            last = net.apply(params, last_observation)
            following = jnp.concatenate([chosen[1:], last[None]])
            ended = seen.terminated | seen.truncated
        return values.q_lambda_targets(
            seen.reward.T,
            following.swapaxes(0, 1),
            discount * (1.0 - ended.T),
            lambda_=lambda_,
            truncated=truncated,
        ).T

    def loss_of(params: Any, part: tuple[Any, Array, Array]) -> tuple[Array, Metrics]:
        observation, action, target = part
        value = values.taken_values(net.apply(params, observation), action)
        loss = values.value_error(value, target).mean()
        return loss, {"loss": loss, "value": value.mean()}

    def update(state: on_policy.State) -> tuple[on_policy.State, Metrics]:
        key, act_key, epoch_key = jax.random.split(state.key, 3)
        now = jnp.asarray(exploration(state.updates * size), jnp.float32)

        def act(key: PRNGKeyArray, observation: Any) -> Decision:
            # All action values go along in place of the state's one: targets are made of them.
            found = net.apply(state.params, observation)
            return Decision(epsilon_greedy(key, found, epsilon=now), value=found)

        running, seen, episodes = unroll_environments(
            env, act, state.running, act_key, num_steps=num_steps
        )
        assert seen.value is not None
        target = targets_of(state.params, seen, seen.value, running.observation)
        explained = on_policy.explained_variance(
            values.taken_values(seen.value, seen.action), target
        )
        batch = jax.tree.map(
            lambda x: x.reshape(size, *x.shape[2:]), (seen.observation, seen.action, target)
        )

        def minibatch(carry: Any, rows: Array) -> tuple[Any, Metrics]:
            params, opt_state = carry
            part = jax.tree.map(lambda x: x[rows], batch)
            grads, metrics = jax.grad(loss_of, has_aux=True)(params, part)
            return off_policy.descend(descent, grads, opt_state, params), metrics

        parts = on_policy.minibatches(
            epoch_key, size, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        (params, opt_state), stacked = jax.lax.scan(
            minibatch, (state.params, state.opt_state), parts
        )
        metrics = {name: x.mean() for name, x in stacked.items()}
        metrics |= {"epsilon": now, "explained_variance": explained}
        state = on_policy.State(params, opt_state, running, key, state.updates + 1)
        return state, metrics | on_policy.finished(episodes)

    def act(state: on_policy.State, key: PRNGKeyArray, observation: Any) -> Array:
        del key
        return jnp.argmax(net.apply(state.params, observation), axis=-1)

    return Agent(init, update, act, size)
