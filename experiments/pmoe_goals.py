"""Does a mixture whose routing learns by frequency find what a single Gaussian sits between?

Soft actor-critic with a mixture of four experts (PMOE), of which the one learns whose action the
critic values most, against one Gaussian; with `--routers` also against mixtures that route by a
Gumbel-softmax and by the score function, without a claim. First on one decision with four goals
around the start, each as good: from the middle no direction is better, and a Gaussian may stay
there. A seed succeeds if an expert with a weight above .05 has its mean within .15 of a goal.
Several goals at once are not to be expected: one expert takes nearly all the weight.

Then on a decision with two sides, of which the better depends on where it starts: are the likeliest
experts of the two regions different ones? And on the pendulum: does a mixture learn as fast?

Exits 0 if PMOE succeeds on more seeds than one Gaussian (Fisher's exact test, one-sided, 5%), the
regions have different experts on most seeds, and PMOE's return while it learns the pendulum is no
lower than SAC's by more than two standard errors of their difference.

It exits 1: a single Gaussian comes to a goal on every seed as well, and its actions end nearer.
Here actions are remembered and sampled again; where a critic learns from the policy's latest
actions alone, symmetry may hold a Gaussian longer, which was not tried.

Source: PMOE, Ren et al. 2021, arXiv 2104.09122; the tasks are our own.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import agents, envs
from pgjax.agents.sac import Actor
from pgjax.envs import control
from pgjax.policies.mixture import Mixture

DISTANCE, WIDTH = 0.6, 0.1
PMOE, SINGLE = "PMOE, 4 experts", "one Gaussian"


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    updates: int = 2000
    """Gradient steps on the one-step tasks, each after one action in 16 environments."""
    batch_size: int = 64
    """Of each."""
    temperature: float = 0.01
    """On the one-step tasks, where it stays."""
    seeds: int = 30
    """Runs of each method on the four goals."""
    pendulum_updates: int = 2000
    """Gradient steps on the pendulum, each after one action in 4 environments."""
    few_seeds: int = 3
    """Runs on the other two tasks."""
    first_seed: int = 0
    """The others follow it."""
    out: pathlib.Path = pathlib.Path("runs/pmoe_goals")
    """Directory for results."""
    routers: bool = False
    """Mixtures that route by a Gumbel-softmax and by the score function as well."""
    quick: bool = False
    """Three seeds of a few updates."""


def one_step(observe: Any, reward: Any, name: str) -> envs.Environment:
    """Something is seen, one action in [-1, 1]² is paid, and that is all."""

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        seen = observe(key)
        return seen, seen

    def step(key: PRNGKeyArray, state: Array, action: Array) -> envs.Step:
        del key
        return envs.Step(state, state, reward(state, action), jnp.bool_(True), jnp.bool_(False))

    return envs.Environment(reset, step, envs.Box((1,)), envs.Box((2,), -1.0, 1.0), name)


GOALS = DISTANCE * jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


def closeness(action: Float[Array, 2], goals: Float[Array, "G 2"]) -> Float[Array, " G"]:
    return jnp.exp(-jnp.square(action - goals).sum(-1) / WIDTH)


def four_goals() -> envs.Environment:
    """Each pays 1."""
    return one_step(
        lambda key: jnp.ones(1), lambda seen, action: closeness(action, GOALS).max(), "four goals"
    )


def two_sides() -> envs.Environment:
    """Starts near -1 or 1, where the goal on the same side pays 1 and the other one a half."""

    def observe(key: PRNGKeyArray) -> Array:
        side, place = jax.random.split(key)
        sign = jnp.where(jax.random.bernoulli(side), 1.0, -1.0)
        return sign * jax.random.uniform(place, (1,), minval=0.5, maxval=1.0)

    def reward(seen: Array, action: Array) -> Array:
        pays = jnp.where(jnp.sign(GOALS[::2, 0]) == jnp.sign(seen[0]), 1.0, 0.5)
        return (pays * closeness(action, GOALS[::2])).max()

    return one_step(observe, reward, "two sides")


def routers(others: bool) -> dict[str, tuple[int, Actor]]:
    """Experts of each method, and how they learn."""
    found = {SINGLE: (1, agents.best_expert()), PMOE: (4, agents.best_expert())}
    if others:
        found["Gumbel-softmax, 4 experts"] = 4, agents.gumbel_routed()
        found["score function, 4 experts"] = 4, agents.score_routed()
    return found


def trained(
    agent: agents.Agent, seeds: int, config: Config, updates: int
) -> tuple[Any, dict[str, Array]]:
    """So many runs at once."""
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(seeds))
    # One start after the other: a batch of orthogonal matrices takes long to compile.
    states = jax.jit(lambda keys: jax.lax.map(agent.init, keys))(keys)
    train = jax.vmap(lambda state: agents.train(agent, state, num_updates=updates))
    return jax.jit(train)(states)


def one_step_agent(
    env: envs.Environment, num_experts: int, actor: Actor, config: Config
) -> tuple[agents.Agent, agents.Network]:
    """SAC with a temperature that stays, and its policy."""
    policy = agents.expert_policy(env, num_experts=num_experts, hidden=(64, 64))
    agent = agents.sac(
        env,
        policy,
        agents.critics(env, hidden=(64, 64)),
        actor=actor,
        optimizer={
            "actor": optax.adam(3e-3),
            "critic": optax.adam(1e-3),
            "log_temperature": optax.set_to_zero(),
        },
        num_envs=16,
        batch_size=config.batch_size,
        capacity=16 * (config.updates + 100),
        start_steps=config.batch_size,
        initial_temperature=config.temperature,
    )
    return agent, policy


def mixtures(
    env: envs.Environment, num_experts: int, actor: Actor, config: Config, seeds: int, seen: Array
) -> tuple[Mixture, Float[np.ndarray, "S U"]]:
    """What policies end as, where they see this, `[S, ...]`; rewards while they learn."""
    agent, policy = one_step_agent(env, num_experts, actor, config)
    states, metrics = trained(agent, seeds, config, config.updates)
    found = jax.vmap(lambda params: policy.apply(params, seen))(states.learner.params["actor"])
    return jax.tree.map(np.asarray, found), np.asarray(metrics["return"])


def reaches(found: Mixture) -> Float[np.ndarray, " S"]:
    """Whether an expert that acts at all has its mean at a goal."""
    away = np.linalg.norm(np.tanh(found.mean)[:, :, None] - np.asarray(GOALS), axis=-1).min(-1)
    weights = np.asarray(jax.nn.softmax(found.logits))
    return ((away < 0.15) & (weights > 0.05)).any(-1).astype(float)


def pendulum(
    num_experts: int | None, config: Config
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "S P"]]:
    """Mean return while learning, and its course; None: SAC itself."""
    env = envs.with_scaled_actions(control.pendulum())
    options: dict[str, Any] = {
        "num_envs": 4,
        "batch_size": 2 * config.batch_size,
        "learning_rate": 1e-3,
        "tau": 0.01,
        "start_steps": 800,  # one episode each, so that all end together from then on
    }
    judge = agents.critics(env, hidden=(64, 64))
    if num_experts is None:
        policy = agents.squashed_gaussian_policy(env, hidden=(64, 64))
        agent = agents.sac(env, policy, judge, **options)
    else:
        policy = agents.expert_policy(env, num_experts=num_experts, hidden=(64, 64))
        agent = agents.sac(env, policy, judge, actor=agents.best_expert(), **options)
    rewards = np.asarray(
        trained(agent, config.few_seeds, config, config.pendulum_updates)[1]["return"]
    )
    ended = rewards[:, ~np.isnan(rewards).any(0)]
    return ended.mean(1), ended


def fisher(more: int, less: int, number: int) -> float:
    """Chance of so many successes or more of one of two arms alike, given those of both."""
    total = more + less
    ways = [
        math.comb(number, k) * math.comb(number, total - k)
        for k in range(more, min(number, total) + 1)
        if total - k <= number
    ]
    return sum(ways) / math.comb(2 * number, total)


def run(config: Config) -> reproduction.Findings:
    """All three tasks."""
    if config.quick:
        config = dataclasses.replace(
            config, updates=20, seeds=3, few_seeds=3, pendulum_updates=200, batch_size=4
        )
    table: dict[str, dict[str, Float[np.ndarray, " S"]]] = {}
    panels: dict[str, dict[str, Any]] = {"reward, four goals": {}, "return, pendulum": {}}
    steps = 1 + np.arange(config.updates)
    for name, (number, actor) in reproduction.track(routers(config.routers).items()):
        found, rewards = mixtures(four_goals(), number, actor, config, config.seeds, jnp.ones(1))
        weights = np.asarray(jax.nn.softmax(found.logits))
        table[f"four goals: {name}"] = {
            "success": reaches(found),
            "largest weight": weights.max(-1),
            "reward, last tenth": rewards[:, -max(1, config.updates // 10) :].mean(1),
        }
        smooth = reproduction.smooth(rewards, 50)
        panels["reward, four goals"][name] = reproduction.band(steps[: smooth.shape[1]], smooth)
    sides = jnp.array([[-0.75], [0.75]])
    found, rewards = mixtures(two_sides(), 4, agents.best_expert(), config, config.few_seeds, sides)
    likeliest = found.logits.argmax(-1)
    differs = np.asarray(likeliest[:, 0] != likeliest[:, 1], float)
    table["two sides: PMOE, 4 experts"] = {
        "experts differ": differs,
        "reward, last tenth": rewards[:, -max(1, config.updates // 10) :].mean(1),
    }
    returns = {}
    for name, experts in {"SAC": None, PMOE: 4}.items():
        returns[name], course = pendulum(experts, config)
        table[f"pendulum: {name}"] = {"return while learning": returns[name]}
        at = 200 * (1 + np.arange(course.shape[1]))
        panels["return, pendulum"][name] = reproduction.band(at, course)
    return reproduction.Findings(
        title="Mixtures of experts in soft actor-critic",
        table=table,
        claims=claims(table, differs, returns[PMOE] - returns["SAC"]),
        panels=panels,
        x_label="gradient steps",
    )


def claims(
    table: dict[str, dict[str, Float[np.ndarray, " S"]]],
    differs: Float[np.ndarray, " S"],
    gain: Float[np.ndarray, " S"],
) -> list[reproduction.Claim]:
    """What is to be shown, judged."""
    more, less = (int(table[f"four goals: {x}"]["success"].sum()) for x in (PMOE, SINGLE))
    number = len(table[f"four goals: {PMOE}"]["success"])
    chance = fisher(more, less, number)
    error = gain.std(ddof=1) / len(gain) ** 0.5
    return [
        reproduction.Claim(
            "four goals: PMOE comes to one on more seeds than one Gaussian",
            chance < 0.05,
            f"{more} and {less} of {number}, p = {chance:.3g}",
        ),
        reproduction.Claim(
            "two sides: the likeliest experts differ on most seeds",
            bool(differs.mean() > 0.5),
            f"{int(differs.sum())} of {len(differs)}",
        ),
        reproduction.Claim(
            "pendulum: PMOE's return while it learns is not below SAC's by two standard errors",
            bool(gain.mean() > -2 * error),
            f"{gain.mean():+.0f} ± {error:.0f}",
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("pmoe_goals", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
