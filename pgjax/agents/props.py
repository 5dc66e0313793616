"""PPO whose data are gathered by a behaviour policy that corrects the sampling error of its memory.

Source: PROPS, Corrado and Hanna 2023, arXiv 2311.08290; its authors' code for the numbers of the
behaviour policy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PRNGKeyArray

from pgjax import _checks
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import ActorCritic, actor_critic
from pgjax.agents.ppo import Batch, clipped_loss
from pgjax.envs.core import Environment
from pgjax.sampling.environments import Running, unroll_environments
from pgjax.sampling.props import props_refit
from pgjax.types import Transition


class State(NamedTuple):
    """Of the agent; `memory` holds b batches `[b, T, N, ...]`, `filled` which steps of them.

    `params` is θ; the behaviour policy is made anew from it, only its optimizer remembers.
    """

    params: Any
    opt_state: Any
    behavior_opt_state: Any
    running: Running
    memory: Transition
    filled: Bool[Array, "b T"]
    key: PRNGKeyArray
    updates: Array


class _Memory(NamedTuple):
    """What minibatches are taken of, `[b T N, ...]`; `kept` is false in rows not yet filled."""

    batch: Batch
    kept: Bool[Array, " R"]


def props(
    env: Environment,
    network: ActorCritic | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    behavior_optimizer: optax.GradientTransformation | None = None,
    memory: int = 2,
    refit_every: int = 16,
    refit_epochs: int = 16,
    refit_minibatches: int = 4,
    refit_clip: float = 0.3,
    max_kl: float = 0.01,
    num_envs: int = 4,
    num_steps: int = 128,
    num_epochs: int = 4,
    num_minibatches: int = 4,
    discount: float = 0.99,
    lambda_: float = 0.95,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    value_coefficient: float = 0.5,
    entropy_coefficient: float = 0.01,
    normalize_advantages: bool = True,
    learning_rate: float = 2.5e-4,
    max_gradient_norm: float = 0.5,
) -> Agent:
    """PROPS: `ppo` on the last b batches as if on-policy, gathered so that they nearly are.

    In each update the batch is collected in parts of m steps. Before each part a behaviour policy
    φ is refitted from θ by `sampling.props_refit`, on the b - 1 batches before and what there is of
    this one; φ acts. Then log-probs, values and advantages of all b batches are computed under
    the present θ, and PPO's loss is descended on minibatches of them.

    Args:
      env, network, optimizer, num_envs, num_steps, num_epochs, num_minibatches, discount, lambda_,
        clip, value_clip, value_coefficient, entropy_coefficient, normalize_advantages,
        learning_rate, max_gradient_norm: of `ppo`; minibatches are taken of all b batches.
      behavior_optimizer: of φ; None: Adam with rate 1e-3 behind a clip of the norm at .5.
      memory: b ≥ 1 batches.
      refit_every: m steps of each environment; divides `num_steps`.
      refit_epochs, refit_minibatches, refit_clip, max_kl: of `sampling.props_refit`; a `max_kl` of
        0 leaves φ = θ: PPO that keeps old data without correction.

    Returns:
      the agent. Metrics: those of `ppo`, and `behavior_kl` (means over the refits of the last
      ρ - 1 - log ρ), `refit_steps` (gradient steps of a refit). Returns are those of φ.

    Raises:
      ValueError: a number out of range, a count that does not divide, observations that are not
        vectors and no `network`.

    Departs from the authors' code: it collects with one environment and refits after each m steps,
    also right before θ changes; here φ always starts from the present θ. No early stop of PPO. With
    b = 1 and m = T the memory is empty when φ is fitted, and it is `ppo` itself.
    """
    counts = {
        "memory": memory,
        "refit_every": refit_every,
        "num_envs": num_envs,
        "num_steps": num_steps,
        "num_epochs": num_epochs,
        "num_minibatches": num_minibatches,
        "refit_minibatches": refit_minibatches,
    }
    for name, count in counts.items():
        _checks.in_range(name, count, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("clip", clip, 0.0, low_open=True)
    _checks.in_range("refit_clip", refit_clip, 0.0, 1.0, low_open=True)
    _checks.in_range("max_kl", max_kl, 0.0)
    if num_steps % refit_every:
        raise ValueError(f"refit_every: expected a divisor of {num_steps} steps, got {refit_every}")
    size = memory * num_steps * num_envs
    for name in ("num_minibatches", "refit_minibatches"):
        if size % counts[name]:
            raise ValueError(
                f"{name}: expected a divisor of {memory} x {num_steps} x {num_envs} steps, "
                f"got {counts[name]}"
            )
    net = actor_critic(env) if network is None else network
    if optimizer is None:
        optimizer = optax.chain(
            optax.clip_by_global_norm(max_gradient_norm), optax.adam(learning_rate, eps=1e-5)
        )
    if behavior_optimizer is None:
        behavior_optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3, eps=1e-5))
    descent, behavior_descent = optimizer, behavior_optimizer

    def log_prob_of(params: Any, batch: tuple[Any, Any]) -> Array:
        observation, action = batch
        return net.distribution.log_prob(net.actor(params, observation), action)

    def flat(x: Array) -> Array:
        return x.reshape(size, *x.shape[3:])

    def init(key: PRNGKeyArray) -> State:
        begun = on_policy.initial(env, net, descent.init, key, num_envs=num_envs)
        act = on_policy.decide(net, begun.params)
        one = jax.eval_shape(
            lambda: unroll_environments(env, act, begun.running, begun.key, num_steps=num_steps)[1]
        )
        empty = jax.tree.map(lambda x: jnp.zeros((memory, *x.shape), x.dtype), one)
        return State(
            begun.params,
            begun.opt_state,
            behavior_descent.init(begun.params),
            begun.running,
            empty,
            jnp.zeros((memory, num_steps), bool),
            begun.key,
            begun.updates,
        )

    def collect(state: State, key: PRNGKeyArray) -> tuple[State, Any, Metrics]:
        slot = state.updates % memory
        state = state._replace(filled=state.filled.at[slot].set(False))

        def part(state: State, given: tuple[Array, Array]) -> tuple[State, Any]:
            begin, key = given
            fit_key, act_key = jax.random.split(key)
            kept = jnp.broadcast_to(state.filled[..., None], (memory, num_steps, num_envs))
            found = props_refit(
                fit_key,
                log_prob_of,
                state.params,
                jax.tree.map(flat, (state.memory.observation, state.memory.action)),
                state.behavior_opt_state,
                optimizer=behavior_descent,
                num_epochs=refit_epochs,
                num_minibatches=refit_minibatches,
                clip=refit_clip,
                max_kl=max_kl,
                mask=flat(kept),
            )
            running, seen, episodes = unroll_environments(
                env,
                on_policy.decide(net, found.params),
                state.running,
                act_key,
                num_steps=refit_every,
            )

            def put(all_: Array, new: Array) -> Array:
                at: list[Any] = [slot, begin, *[0] * (all_.ndim - 2)]
                return jax.lax.dynamic_update_slice(all_, new[None], at)

            state = state._replace(
                behavior_opt_state=found.opt_state,
                running=running,
                memory=jax.tree.map(put, state.memory, seen),
                filled=put(state.filled, jnp.ones(refit_every, bool)),
            )
            steps = found.steps.astype(jnp.float32)
            return state, (episodes, {"behavior_kl": found.kl, "refit_steps": steps})

        parts = num_steps // refit_every
        begins = refit_every * jnp.arange(parts)
        state, (episodes, fits) = jax.lax.scan(part, state, (begins, jax.random.split(key, parts)))
        episodes = jax.tree.map(lambda x: x.reshape(num_steps, num_envs), episodes)
        return state, episodes, {name: x.mean() for name, x in fits.items()}

    def judged(state: State) -> _Memory:
        """All of the memory, seen with the present policy and values."""
        seen = state.memory.replace(value=net.critic(state.params, state.memory.observation))
        advantage, target = jax.vmap(
            lambda one: on_policy.estimate(
                net,
                state.params,
                one,
                None,
                discount=discount,
                lambda_=lambda_,
                bootstrap_truncated=True,
            )
        )(seen)
        log_prob = log_prob_of(state.params, (seen.observation, seen.action))
        assert seen.value is not None
        kept = jnp.broadcast_to(state.filled[..., None], seen.reward.shape)
        batch = Batch(seen.observation, seen.action, log_prob, seen.value, advantage, target)
        return jax.tree.map(flat, _Memory(batch, kept))

    def loss_of(params: Any, given: _Memory) -> tuple[Array, Metrics]:
        return clipped_loss(
            net,
            params,
            given.batch,
            clip=clip,
            value_clip=value_clip,
            value_coefficient=value_coefficient,
            entropy_coefficient=entropy_coefficient,
            normalize_advantages=normalize_advantages,
            where=given.kept,
        )

    def update(state: State) -> tuple[State, Metrics]:
        key, act_key, epoch_key = jax.random.split(state.key, 3)
        state, episodes, fits = collect(state, act_key)
        remembered = judged(state)

        def minibatch(carry: Any, rows: Array) -> tuple[Any, Metrics]:
            params, opt_state = carry
            part = jax.tree.map(lambda x: x[rows], remembered)
            grads, metrics = jax.grad(loss_of, has_aux=True)(params, part)
            updates, new_state = descent.update(grads, opt_state, params)
            new = optax.apply_updates(params, updates), new_state
            # Before the memory is full, a minibatch can be empty.
            known = jnp.any(part.kept)
            return jax.tree.map(lambda a, b: jnp.where(known, a, b), new, carry), metrics

        parts = on_policy.minibatches(
            epoch_key, size, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        (params, opt_state), stacked = jax.lax.scan(
            minibatch, (state.params, state.opt_state), parts
        )
        metrics = {name: x.mean() for name, x in stacked.items()} | fits
        found = (
            jnp.where(remembered.kept, x, 0.0)
            for x in (remembered.batch.value, remembered.batch.target)
        )
        metrics["explained_variance"] = on_policy.explained_variance(*found)
        state = state._replace(
            params=params, opt_state=opt_state, key=key, updates=state.updates + 1
        )
        return state, metrics | on_policy.finished(episodes)

    def act(state: State, key: PRNGKeyArray, observation: Any) -> Any:
        del key
        return net.distribution.mode(net.actor(state.params, observation))

    return Agent(init, update, act, num_envs * num_steps)
