"""Does a bonus on contrastively learned features open a lock that chance does not?

A lock of six steps and four actions behind 30 observations, whose transitions have rank 3
(`envs.combination_lock`): one episode in 4096 of a uniform policy is paid. Each round plans in the
model recovered from the contrastive scores, with or without the bonus, and meets one episode for
each step of the horizon, which follows the plan but for that step, where the action is uniform; the
ε-greedy agent instead is uniform with probability ε at every step. Then the scores are trained on.
Ties are broken at random, anew each round.

Rewards are not given to the planner: it takes the mean of those met, and 0 for a state and action
never met. The paper's planner knows them; the last two rows do so too. There a model that knows
nothing predicts a mixture of everything for what it has not tried, the reward among it, so that the
planner is drawn to what is new without a bonus. All transitions of an episode are stored, not only
those of its uniform step.

Judged is the exact value of the greedy plan without bonus, in the learned model, after each round.
Exits 0 if with the bonus at least 8 of 10 runs reach 90% of the best value, and without, and with
ε-greedy, at most 3 of 10.

Source: Contrastive UCB, Qiu et al. 2022, arXiv 2207.14800.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import contrastive, uncertainty, values
from pgjax.envs import combination_lock

GOAL = 0.9
UCB, NO_BONUS, EPSILON = "Contrastive UCB", "no bonus", "ε-greedy"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    seeds: int = 10
    """Locks, each with a run of every method."""
    horizon: int = 6
    """Steps, and episodes of a round."""
    rounds: int = 250
    """Of planning, meeting episodes and training."""
    gradient_steps: int = 20
    """Of a round."""
    batch_size: int = 64
    """Transitions of each step of the horizon in a gradient step."""
    learning_rate: float = 0.1
    """Of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW: keeps logits from where they no longer learn."""
    size: int = 6
    """Of the features, D: twice the rank, since at the rank itself training gets stuck."""
    scale: float = 1.0
    """Of the bonus."""
    ridge: float = 1.0
    """Of the covariance of features."""
    epsilon: float = 0.2
    """Of the ε-greedy agent."""
    out: pathlib.Path = pathlib.Path("runs/contrastive_ucb_lock")
    """Directory for results."""
    quick: bool = False
    """Three locks of two steps, five rounds."""


class Method(NamedTuple):
    """How to explore: numbers, so that one compiled program serves all methods.

    Attributes:
      scale: of the bonus.
      epsilon: share of uniform actions; below 0 the one uniform action of each episode.
      rewards_known: plan with the true rewards.
    """

    scale: float = 0.0
    epsilon: float = -1.0
    rewards_known: bool = False


class Memory(NamedTuple):
    """Transitions met, by episode and step."""

    state: Int[Array, "E H"]
    action: Int[Array, "E H"]
    later: Int[Array, "E H"]


def log_phi(seen: Float[Array, "*B D"], moves: Float[Array, "*B D D"]) -> Float[Array, "*B D"]:
    """log φ_k = log Σ_z q_z m_zk: the observation's latent states, each moved by the action."""
    chances = jax.nn.log_softmax(seen)[..., None, :]
    return contrastive.low_rank_log_scores(chances, moves.swapaxes(-1, -2))


def met(
    mdp: combination_lock.FiniteMdp, policy: Array, uniform: Array, key: PRNGKeyArray
) -> tuple[Array, Array, Array, Array]:
    """One episode: states, actions, next states and rewards, `[H]` each.

    `policy` is the action of each step and state, `[H, S]`; where `uniform` `[H]` is true the
    action is drawn instead.
    """
    num_actions = mdp.rewards.shape[-1]
    start_key, key = jax.random.split(key)

    def one(state: Array, now: Any) -> tuple[Array, Any]:
        time, chosen, anyhow, key = now
        act_key, move_key = jax.random.split(key)
        drawn = jax.random.randint(act_key, (), 0, num_actions)
        action = jnp.where(anyhow, drawn, chosen[state])
        chances = mdp.transitions[time, state, action]
        later = jax.random.categorical(move_key, jnp.log(chances))
        return later, (state, action, later, mdp.rewards[time, state, action])

    horizon = policy.shape[0]
    keys = jax.random.split(key, horizon)
    start = jax.random.categorical(start_key, jnp.log(mdp.start))
    return jax.lax.scan(one, start, (jnp.arange(horizon), policy, uniform, keys))[1]


def learn(config: Config, method: Method, key: PRNGKeyArray) -> dict[str, Array]:
    """The greedy plan's value, and how wrong the model is, after each round, `[rounds]`."""
    lock_key, init_key, key = jax.random.split(key, 3)
    mdp = combination_lock.combination_lock(lock_key, horizon=config.horizon)
    horizon, states, actions = mdp.rewards.shape
    negative = jnp.full(states, 1 / states)
    steps = jnp.arange(horizon)
    size = config.size
    shapes = {
        "seen": (states, size),
        "moves": (horizon, actions, size, size),
        "psi": (states, size),
    }
    params = {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), jax.random.split(init_key, 3), strict=True)
    }
    descent = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)

    def loss(params: Any, batch: Memory, other: Array) -> Array:
        phi = log_phi(params["seen"][batch.state], params["moves"][steps, batch.action])
        true = contrastive.low_rank_log_scores(phi, params["psi"][batch.later])
        false = contrastive.low_rank_log_scores(phi, params["psi"][other])
        return contrastive.binary_nce(true, false).mean()

    def train(params: Any, opt_state: Any, memory: Memory, filled: Array, key: Array) -> Any:
        def one(carry: Any, key: Array) -> tuple[Any, None]:
            params, opt_state = carry
            row_key, other_key = jax.random.split(key)
            rows = jax.random.randint(row_key, (config.batch_size, horizon), 0, filled)
            batch = jax.tree.map(lambda x: x[rows, steps], memory)
            other = jax.random.randint(other_key, rows.shape, 0, states)
            grads = jax.grad(loss)(params, batch, other)
            updates, opt_state = descent.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        keys = jax.random.split(key, config.gradient_steps)
        return jax.lax.scan(one, (params, opt_state), keys)[0]

    def plan(params: Any, visits: Array, paid: Array, scale: Any) -> tuple[Array, Array]:
        every = log_phi(params["seen"][:, None], params["moves"][:, None])
        model = contrastive.recover_model(every, params["psi"], negative)
        start = uncertainty.elliptical_init(size, ridge=config.ridge)

        def of_step(features: Array, visits: Array, paid: Array) -> tuple[Array, Array]:
            known = uncertainty.elliptical_update(start, features, weights=visits)
            total = jnp.einsum("sa,sad->d", paid, features)
            reward = features @ jnp.linalg.solve(known.covariance, total)
            bonus = uncertainty.elliptical_bonus(known, features, scale=scale, cap=horizon)
            return reward, bonus

        rewards, bonuses = jax.vmap(of_step)(model.features, visits, paid)
        rewards = jnp.where(method.rewards_known, mdp.rewards, rewards)
        found = values.optimistic_values(model.transitions, rewards, bonuses, cap=2.0 * horizon)
        return found.action_values, model.transitions

    def round_(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, dict[str, Array]]:
        number, key = inputs
        params, opt_state, memory, visits, paid = carry
        tie_key, epsilon_key, meet_key, train_key = jax.random.split(key, 4)
        found, _ = plan(params, visits, paid, method.scale)
        # Small enough to choose among equals only.
        noise = 1e-6 * jax.random.uniform(tie_key, found.shape)
        policy = jnp.argmax(found + noise, axis=-1)
        now_and_then = jax.random.uniform(epsilon_key, (horizon, horizon)) < method.epsilon
        uniform = jnp.where(method.epsilon < 0, jnp.eye(horizon, dtype=bool), now_and_then)
        keys = jax.random.split(meet_key, horizon)
        state, action, later, reward = jax.vmap(functools.partial(met, mdp, policy))(uniform, keys)
        new = Memory(state, action, later)
        memory = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_slice(all_, x, (number * horizon, 0)),
            memory,
            new,
        )
        place = jnp.broadcast_to(steps, state.shape), state, action
        visits, paid = visits.at[place].add(1.0), paid.at[place].add(reward)
        filled = (number + 1) * horizon
        params, opt_state = train(params, opt_state, memory, filled, train_key)
        greedy, transitions = plan(params, visits, paid, 0.0)
        policy = jax.nn.one_hot(jnp.argmax(greedy, axis=-1), actions)
        value = values.policy_values(mdp.transitions, mdp.rewards, policy).values[0] @ mdp.start
        wrong = 0.5 * jnp.abs(transitions - mdp.transitions).sum(-1)[:-1]
        known = visits[:-1] > 0
        error = jnp.sum(jnp.where(known, wrong, 0.0)) / jnp.maximum(known.sum(), 1)
        carry = params, opt_state, memory, visits, paid
        return carry, {"value": value, "error": error}

    empty = jnp.zeros((config.rounds * horizon, horizon), jnp.int32)
    tables = jnp.zeros(mdp.rewards.shape), jnp.zeros(mdp.rewards.shape)
    carry = params, descent.init(params), Memory(empty, empty, empty), *tables
    keys = jax.random.split(key, config.rounds)
    return jax.lax.scan(round_, carry, (jnp.arange(config.rounds), keys))[1]


def run(config: Config) -> reproduction.Findings:
    """All methods on the same locks."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, horizon=2, rounds=5, gradient_steps=2)
    methods = {
        UCB: Method(scale=config.scale),
        NO_BONUS: Method(),
        EPSILON: Method(epsilon=config.epsilon),
        f"{UCB}, rewards known": Method(scale=config.scale, rewards_known=True),
        f"{NO_BONUS}, rewards known": Method(rewards_known=True),
    }
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    episodes = config.horizon * np.arange(1, config.rounds + 1)
    table: dict[str, Any] = {}
    panels: dict[str, Any] = {"value of the greedy plan": {}, "error of the model": {}}
    solved: dict[str, Float[np.ndarray, " S"]] = {}
    many = jax.jit(jax.vmap(functools.partial(learn, config), in_axes=(None, 0)))
    for name, method in reproduction.track(methods.items()):
        found = many(jax.tree.map(jnp.asarray, method), keys)
        value, error = (np.asarray(found[x]) for x in ("value", "error"))
        there = value >= GOAL
        solved[name] = there.any(1).astype(float)
        first = np.where(there.any(1), episodes[there.argmax(1)], np.inf)
        table[name] = {
            "solved": solved[name],
            "episodes to 90%": np.minimum(first, episodes[-1]),
            "value at last": value[:, -1],
            "model's TV error": error[:, -1],
        }
        panels["value of the greedy plan"][name] = reproduction.band(episodes, value)
        panels["error of the model"][name] = reproduction.band(episodes, error)
    claims = [
        judged(f"{UCB} reaches 90% of the best value in 8 of 10 runs", solved[UCB], 0.8, 1.0),
        judged(f"{NO_BONUS}: in at most 3 of 10", solved[NO_BONUS], 0.0, 0.3),
        judged(f"{EPSILON}: in at most 3 of 10", solved[EPSILON], 0.0, 0.3),
    ]
    return reproduction.Findings(
        title=f"A lock of {config.horizon} steps, at most {episodes[-1]} episodes",
        table=table,
        claims=claims,
        panels=panels,
        x_label="episodes",
    )


def judged(
    text: str, solved: Float[np.ndarray, " S"], low: float, high: float
) -> reproduction.Claim:
    """The share of runs that got there."""
    holds = low <= solved.mean() <= high
    return reproduction.Claim(text, bool(holds), f"{int(solved.sum())} of {solved.size}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "contrastive_ucb_lock", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
