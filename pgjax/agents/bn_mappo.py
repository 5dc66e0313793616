"""Agents that act in the order of a graph, which can be learnt, trained by PPO with one critic.

Source: BN-MAPPO, Chen and Zhang 2023, arXiv 2306.01920, and its code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, advantages, surrogates
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import vector_size
from pgjax.agents.ppo import Batch
from pgjax.envs.core import Box, Environment
from pgjax.models import dag, mlp
from pgjax.policies import bayes_net
from pgjax.sampling.environments import Decision, unroll_environments


class BayesNetCritic(NamedTuple):
    """A joint policy along a graph, and a value function; all see the whole observation.

    Attributes:
      init: `key -> params`.
      logits: `(params, observation [O], agent, parents' actions [n, A]) -> [A]`.
      sample_graph: `(params, key, observation [O]) -> Dag`, differentiable.
      mode_graph: `(params, observation [O]) -> Dag`, for evaluation.
      critic: `(params, observation [..., O]) -> values f32 [...]`.
      num_actions: A of each agent.
    """

    init: Callable[[PRNGKeyArray], Any]
    logits: Callable[[Any, Any, Any, Any], Float[Array, " A"]]
    sample_graph: Callable[[Any, PRNGKeyArray, Any], dag.Dag]
    mode_graph: Callable[[Any, Any], dag.Dag]
    critic: Callable[[Any, Any], Float[Array, "*B"]]
    num_actions: int


def fixed_graph_network(
    env: Environment,
    graph: Float[Array, "n n"],
    *,
    num_actions: int = 2,
    hidden: Sequence[int] = (64, 64),
) -> BayesNetCritic:
    """Perceptrons with tangents, one for each agent and one for the value; the graph stays.

    Args:
      env: with vectors as observations and actions `[n]`.
      graph: `[n, n]` without cycles; zeros for independent agents.
      num_actions: A of each agent.
      hidden: sizes of the hidden layers.

    Raises:
      ValueError: a cycle, a graph for another number of agents, observations that are no vectors.
    """
    found = dag.Dag(jnp.asarray(graph, jnp.float32), bayes_net.topological_order(graph))
    size, agents = vector_size(env), num_agents(env)
    if len(found.order) != agents:
        raise ValueError(f"graph: expected shape {(agents, agents)}, got {jnp.shape(graph)}")
    sizes = (size + agents * num_actions, *hidden, num_actions)

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        actor_key, critic_key = jax.random.split(key)
        keys = jax.random.split(actor_key, agents)
        return {
            "actor": jax.vmap(lambda key: mlp.init(key, sizes))(keys),
            "critic": mlp.init(critic_key, (size, *hidden, 1)),
        }

    def logits(params: Any, observation: Array, agent: Array, parents: Array) -> Array:
        own = jax.tree.map(lambda x: x[agent], params["actor"])
        return mlp.apply(own, jnp.concatenate([observation, parents.reshape(-1)]))

    return BayesNetCritic(
        init=init,
        logits=logits,
        sample_graph=lambda params, key, observation: found,
        mode_graph=lambda params, observation: found,
        critic=lambda params, observation: mlp.apply(params["critic"], observation)[..., 0],
        num_actions=num_actions,
    )


def learned_graph_network(
    env: Environment,
    *,
    num_actions: int = 2,
    hidden: Sequence[int] = (64, 64),
    temperature: float = 1.0,
    match: dag.Match = dag.best_matching,
) -> BayesNetCritic:
    """`fixed_graph_network` with a graph that a perceptron draws from each observation.

    Args:
      env, num_actions, hidden: of `fixed_graph_network`.
      temperature, match: of `models.dag.sample_dag`.

    Raises:
      ValueError: observations that are no vectors.
    """
    size, agents = vector_size(env), num_agents(env)
    base = fixed_graph_network(
        env, jnp.zeros((agents, agents)), num_actions=num_actions, hidden=hidden
    )

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        key, graph_key = jax.random.split(key)
        drawn = mlp.init(graph_key, (size, *hidden, 3 * agents**2), last_gain=0.01)
        return base.init(key) | {"graph": drawn}

    def logits_of(params: Any, observation: Array) -> tuple[Array, Array]:
        found = mlp.apply(params["graph"], observation).reshape(3, agents, agents)
        return jnp.moveaxis(found[:2], 0, -1), found[2]

    def sample(params: Any, key: PRNGKeyArray, observation: Array) -> dag.Dag:
        given = logits_of(params, observation)
        return dag.sample_dag(key, *given, temperature=temperature, match=match)

    def mode(params: Any, observation: Array) -> dag.Dag:
        return dag.mode_dag(*logits_of(params, observation), temperature=temperature, match=match)

    return base._replace(init=init, sample_graph=sample, mode_graph=mode)


def bn_mappo(
    env: Environment,
    network: BayesNetCritic,
    *,
    density_target: Callable[[Any], Any] | None = None,
    density_coefficient: float = 0.1,
    num_envs: int = 32,
    num_steps: int = 16,
    num_epochs: int = 5,
    num_minibatches: int = 1,
    discount: float = 0.99,
    lambda_: float = 0.95,
    clip: float = 0.2,
    value_coefficient: float = 1.0,
    entropy_coefficient: float = 0.01,
    learning_rate: float = 7e-4,
    max_gradient_norm: float = 10.0,
) -> Agent:
    """PPO with one ratio for each agent, of its action given its parents' actions.

    L = mean_{t,i}[-min(r_i A, clip(r_i, 1 ± ε) A)] + c_v L_v - c_e mean H_i + α |density - η|, A of
    the shared reward by GAE, normalised over the batch. Graphs are drawn anew for the loss, and get
    their gradient through the masks on the parents' actions.

    Args:
      env: with vectors as observations, actions `[n]` and one reward for all.
      network: `fixed_graph_network`, `learned_graph_network`, or another.
      density_target: `updates so far -> η`; None: no such term.
      density_coefficient: α ≥ 0.
      num_envs, num_steps, num_epochs, num_minibatches, discount, lambda_, clip, value_coefficient,
        entropy_coefficient, learning_rate, max_gradient_norm: of `ppo`.

    Returns:
      the agent; `act` gives each agent's most likely action in the order of the mode graph.
      Metrics: `loss`, `policy_loss`, `value_loss`, `entropy`, `density`, `return`, `length`,
      `episodes`.

    Raises:
      ValueError: a number out of range, a count that does not divide.

    Departs from the authors' code: the value error is squared, not Huber's, and values are not
    normalised.
    """
    counts = {"num_envs": num_envs, "num_steps": num_steps, "num_minibatches": num_minibatches}
    for name, count in counts.items():
        _checks.in_range(name, count, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("clip", clip, 0.0, low_open=True)
    _checks.in_range("density_coefficient", density_coefficient, 0.0)
    size = num_envs * num_steps
    if size % num_minibatches:
        raise ValueError(f"num_minibatches: expected a divisor of {size}, got {num_minibatches}")
    descent = optax.chain(
        optax.clip_by_global_norm(max_gradient_norm), optax.adam(learning_rate, eps=1e-5)
    )

    def init(key: PRNGKeyArray) -> on_policy.State:
        return on_policy.initial(env, network, descent.init, key, num_envs=num_envs)

    def act_in(params: Any, key: PRNGKeyArray, observation: Any) -> tuple[Array, Array]:
        graph_key, key = jax.random.split(key)
        found = network.sample_graph(params, graph_key, observation)
        logits = functools.partial(network.logits, params, observation)
        return bayes_net.bn_sample(key, logits, *found, num_actions=network.num_actions)

    def judged(params: Any, key: PRNGKeyArray, observation: Any, action: Array) -> Any:
        graph = network.sample_graph(params, key, observation).graph
        logits = functools.partial(network.logits, params, observation)
        every = bayes_net.bn_log_probs(logits, action, graph, num_actions=network.num_actions)
        log_prob = jnp.take_along_axis(every, action[:, None], axis=1)[:, 0]
        return log_prob, -jnp.sum(jnp.exp(every) * every, axis=-1), graph

    def loss_of(params: Any, part: Batch, key: PRNGKeyArray, updates: Array) -> Any:
        keys = jax.random.split(key, part.value.shape[0])
        log_prob, entropy, graphs = jax.vmap(lambda k, o, a: judged(params, k, o, a))(
            keys, part.observation, part.action
        )
        ratio = surrogates.importance_ratio(log_prob, part.log_prob)
        policy_loss = surrogates.clipped(ratio, part.advantage[:, None], low=clip, high=clip).mean()
        value = network.critic(params, part.observation)
        error = surrogates.clipped_value_error(value, part.target, part.value, width=clip).mean()
        loss = policy_loss + value_coefficient * error - entropy_coefficient * entropy.mean()
        if density_target is not None:
            loss = loss + dag.density_penalty(
                graphs, density_target(updates), coefficient=density_coefficient
            )
        return loss, {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": error,
            "entropy": entropy.mean(),
            "density": dag.density(graphs).mean(),
        }

    def update(state: on_policy.State) -> tuple[on_policy.State, Metrics]:
        key, act_key, epoch_key, graph_key = jax.random.split(state.key, 4)

        def act(key: PRNGKeyArray, observation: Any) -> Decision:
            action, log_prob = jax.vmap(lambda k, o: act_in(state.params, k, o))(
                jax.random.split(key, num_envs), observation
            )
            return Decision(action, log_prob, network.critic(state.params, observation))

        running, seen, episodes = unroll_environments(
            env, act, state.running, act_key, num_steps=num_steps
        )
        advantage, target = on_policy.estimate(
            network,  # type: ignore[arg-type]  # of which it takes the critic alone
            state.params,
            seen,
            running.observation,
            discount=discount,
            lambda_=lambda_,
            bootstrap_truncated=True,
        )
        assert seen.log_prob is not None and seen.value is not None
        batch = Batch(seen.observation, seen.action, seen.log_prob, seen.value, advantage, target)
        batch = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), batch)
        normal = advantages.batch_normalize(batch.advantage, ddof=0, epsilon=1e-5)
        batch = batch._replace(advantage=normal)

        def minibatch(carry: Any, given: tuple[Array, Array]) -> tuple[Any, Metrics]:
            params, opt_state = carry
            rows, key = given
            part = jax.tree.map(lambda x: x[rows], batch)
            grads, metrics = jax.grad(loss_of, has_aux=True)(params, part, key, state.updates)
            steps, opt_state = descent.update(grads, opt_state, params)
            return (optax.apply_updates(params, steps), opt_state), metrics

        parts = on_policy.minibatches(
            epoch_key, size, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        given = parts, jax.random.split(graph_key, len(parts))
        carry, stacked = jax.lax.scan(minibatch, (state.params, state.opt_state), given)
        metrics = {name: x.mean() for name, x in stacked.items()}
        state = on_policy.State(*carry, running, key, state.updates + 1)
        return state, metrics | on_policy.finished(episodes)

    def act(state: on_policy.State, key: PRNGKeyArray, observation: Any) -> Array:
        del key

        def one(observation: Any) -> Array:
            found = network.mode_graph(state.params, observation)
            logits = functools.partial(network.logits, state.params, observation)
            return bayes_net.bn_mode(logits, *found, num_actions=network.num_actions)

        return jax.vmap(one)(observation)

    return Agent(init, update, act, size)


def num_agents(env: Environment) -> int:
    """Entries of a joint action; raises ValueError where it is not a vector."""
    kind = env.action
    if not isinstance(kind, Box) or len(kind.shape) != 1:
        raise ValueError(f"env.action: expected a vector with an entry for each agent, got {kind}")
    return kind.shape[0]
