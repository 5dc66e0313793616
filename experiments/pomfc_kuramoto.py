"""Does a kernel's decision rule serve a swarm better than a histogram's with as many parts?

Phases that shall fall into step (Kuramoto, no positions): each agent sees, with noise, where it
stands relative to the circular mean, and turns by up to 0.2 a step, with as much noise. PPO sees
kernel features of fifty agents' phases and gives all of them the parameters of their rule, seven
Gaussians on the circle; agents draw from the rule by themselves. Compared at equal steps: rules
that blend the parameters of the seven by a radial kernel, rules that blend their densities, and
rules constant within each of seven bins. Then swarms of 10 and of 1000 act by what was learnt with
fifty; and a swarm of fifty acts by the rules that a swarm of 1000 had, in their order, without
looking at its own mean field.

Means of the Gaussians are some constant times the parameters, since the latter stay within 1.5 in
so few updates, and a good rule turns at full speed where it is a third of a radian away. Where a
histogram's middle bin lies around rest it does not turn there, and an edge at rest is better; both
are judged. Of each kind the best of six settings on other seeds was taken: constants of 1, 3 and 5,
and for kernels bandwidths of the distance of the anchors and half of it, for histograms a bin or an
edge at rest.

Order is |mean exp(ix)|², averaged over the last 30 of 100 steps. For comparison, the proportional
rule clip(3 Im(z exp(-ix))) of the noisy observation, z the mean of exp(ix), and no rule at all.

Exits 0 if rules of blended parameters come to an order of .85, on average, change by less than .05
with the number of agents, and are above both histograms' by two standard errors of the paired
difference. Nothing is claimed of blended densities: such a mixture draws at rest from anchors to
either side, and so turns to and fro.

Source: Dec-POMFC, Cui et al. 2023, arXiv 2307.06175; the numbers of the task are our own.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax import agents, envs, sampling
from pgjax.envs import mean_field, swarms
from pgjax.policies import kernel_rule

KERNEL, DENSITIES = "kernel", "kernel, densities"
EDGE, BIN = "histogram, edge at rest", "histogram, bin at rest"
TURN = 2 * np.pi


class Rule(NamedTuple):
    """What is different: numbers, so that one compiled program serves all.

    Attributes:
      scale: of means over parameters.
      bandwidth: of the kernel, over the distance of anchors.
      offset: of all anchors, over their distance; by 0 the middle one is at rest.
      nearest: a histogram.
      densities: are blended, not parameters.
    """

    scale: float
    bandwidth: float = 0.5
    offset: float = 0.0
    nearest: bool = False
    densities: bool = False


RULES = {
    KERNEL: Rule(scale=3.0),
    EDGE: Rule(scale=3.0, offset=0.5, nearest=True),
    BIN: Rule(scale=5.0, nearest=True),
    DENSITIES: Rule(scale=3.0, densities=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    updates: int = 100
    """Of PPO, each of 16 swarms times 100 steps."""
    agents: int = 50
    """Of a swarm that is trained with."""
    transfer: tuple[int, ...] = (10, 1000)
    """Of swarms that act by what was learnt."""
    anchors: int = 7
    """Of rules and features."""
    learning_rate: float = 3e-4
    """Of PPO."""
    swarms: int = 16
    """To judge a rule by."""
    seeds: int = 10
    """Independent runs."""
    first_seed: int = 400
    """The others follow it."""
    out: pathlib.Path = pathlib.Path("runs/pomfc_kuramoto")
    """Directory for results."""
    quick: bool = False
    """Three seeds of three updates, swarms of five."""


def decision(config: Config, rule: Rule, key: Array, xi: Array, seen: Array) -> Array:
    """Actions of agents by their observations; ξ holds all means, then all log deviations."""
    width = TURN / config.anchors
    anchors = kernel_rule.anchor_grid(-np.pi, np.pi, number=config.anchors) + rule.offset * width
    weights = jnp.where(
        rule.nearest,
        kernel_rule.nearest_weights(seen, anchors, period=TURN),
        kernel_rule.rbf_weights(seen, anchors, bandwidth=rule.bandwidth * width, period=TURN),
    )
    mean, log_std = xi.reshape(2, config.anchors)
    xi = jnp.stack([rule.scale * mean, jnp.clip(log_std - 1.0, -4.0, 0.0)], axis=-1)
    return jnp.where(
        rule.densities,
        kernel_rule.kernel_rule_sample(key, xi, weights),
        kernel_rule.interpolated_rule_sample(key, xi, weights),
    )


def world(decide: Callable[[Array, Array, Array], Array], number: int, config: Config) -> Any:
    """A swarm of so many."""
    anchors = kernel_rule.anchor_grid(0.0, TURN, number=config.anchors)
    features = functools.partial(
        kernel_rule.mean_field_features,
        anchors=anchors,
        bandwidth=TURN / config.anchors,
        period=TURN,
    )
    return mean_field.mean_field_environment(
        swarms.kuramoto(),
        decide,
        features,
        num_agents=number,
        num_parameters=2 * config.anchors,
        num_features=config.anchors,
    )


def learner(env: envs.Environment, config: Config) -> agents.Agent:
    """PPO by one set of numbers for all."""
    return agents.ppo(
        env,
        agents.actor_critic(env, initial_log_std=-0.5),
        num_envs=16,
        num_steps=100,
        num_epochs=8,
        num_minibatches=4,
        discount=0.95,
        entropy_coefficient=0.0,
        learning_rate=config.learning_rate,
    )


def course(
    env: envs.Environment,
    act: Callable[[Array, Any], Any],
    key: Array,
    number: int,
) -> tuple[Float[Array, ""], Float[Array, "T N P"]]:
    """Order over the last 30 steps, and the rules' parameters, of so many swarms."""
    start, key = jax.random.split(key)
    _, seen, _ = sampling.unroll_environments(
        env,
        lambda key, observation: sampling.Decision(act(key, observation)),
        sampling.start_environments(env, start, number),
        key,
        num_steps=100,
    )
    return seen.reward[-30:].mean(), seen.action


def learnt(config: Config, rule: Rule, state: Any, key: Array) -> dict[str, Array]:
    """One run: the order of each size of swarm at the end, and of that trained with before."""
    decide = functools.partial(decision, config, rule)
    env = world(decide, config.agents, config)
    agent = learner(env, config)
    test_key = jax.random.fold_in(key, 1)
    state, metrics = agents.train(agent, state, num_updates=config.updates)

    def mode(key: Array, observation: Array) -> Array:
        return agent.act(state, key, observation)

    found = {f"order, {config.agents} agents": course(env, mode, test_key, config.swarms)[0]}
    plan = None
    for number in config.transfer:
        other = world(decide, number, config)
        found[f"order, {number} agents"], plan = course(other, mode, test_key, 4)
    assert plan is not None
    found["order, open loop"] = open_loop(env, plan[:, 0], test_key, config.swarms)
    # An episode's return over its hundred steps.
    return found | {"curve": metrics["return"] / 100}


def open_loop(
    env: envs.Environment, plan: Float[Array, "T P"], key: Array, number: int
) -> Float[Array, ""]:
    """Order over the last 30 steps of swarms that get planned rules, one after the other."""
    start, key = jax.random.split(key)
    state, _ = jax.vmap(env.reset)(jax.random.split(start, number))

    def one(state: Any, given: tuple[Array, Array]) -> tuple[Any, Array]:
        key, xi = given
        found = jax.vmap(lambda key, state: env.step(key, state, xi))(
            jax.random.split(key, number), state
        )
        return found.state, found.reward

    _, rewards = jax.lax.scan(one, state, (jax.random.split(key, len(plan)), plan))
    return rewards[-30:].mean()


def fixed(config: Config, gain: float) -> dict[str, Float[np.ndarray, " S"]]:
    """Order by the proportional rule, which needs no parameters; a gain of 0 is no rule."""

    def decide(key: Array, xi: Array, seen: Array) -> Array:
        del key, xi
        return jnp.clip(-gain * jnp.sin(seen), -1.0, 1.0)

    still = lambda key, observation: jnp.zeros((len(observation), 2 * config.anchors))  # noqa: E731
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(config.seeds))
    found = {}
    for number in (config.agents, *config.transfer):
        env = world(decide, number, config)
        judge = jax.jit(jax.vmap(lambda key, env=env: course(env, still, key, 4)[0]))
        found[f"order, {number} agents"] = np.asarray(judge(keys))
    return found


def run(config: Config) -> reproduction.Findings:
    """All kinds of rules, and what they are compared with."""
    if config.quick:
        config = dataclasses.replace(
            config, updates=3, agents=5, transfer=(3, 8), swarms=2, seeds=3
        )
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(config.seeds))
    table: dict[str, dict[str, Float[np.ndarray, " S"]]] = {}
    curves = {}
    steps = 1600 * (1 + np.arange(config.updates))
    any_rule = functools.partial(decision, config, RULES[KERNEL])  # they start alike
    agent = learner(world(any_rule, config.agents, config), config)
    # One start after the other: a batch of orthogonal matrices takes long to compile.
    states = jax.jit(lambda keys: jax.lax.map(agent.init, keys))(keys)
    train = jax.jit(jax.vmap(functools.partial(learnt, config), in_axes=(None, 0, 0)))
    for name, rule in reproduction.track(RULES.items()):
        numbers = jax.tree.map(jnp.asarray, rule)
        found = {column: np.asarray(x) for column, x in train(numbers, states, keys).items()}
        curves[name] = reproduction.band(steps, found.pop("curve"))
        table[name] = found
    table["proportional"] = fixed(config, 3.0)
    table["no rule"] = fixed(config, 0.0)
    column = f"order, {config.agents} agents"
    kernel = table[KERNEL][column]
    changes = {
        number: float((table[KERNEL][f"order, {number} agents"] - kernel).mean())
        for number in config.transfer
    }
    return reproduction.Findings(
        title=f"Order of swarms, rules of {config.anchors} parts",
        table=table,
        claims=[
            reproduction.above("kernel rules come to an order of .85", kernel, 0.85),
            reproduction.Claim(
                "they keep it, within .05, in swarms of other sizes",
                all(abs(change) < 0.05 for change in changes.values()),
                ", ".join(f"{number} agents {change:+.3f}" for number, change in changes.items()),
            ),
            *(
                reproduction.ahead(
                    f"they are above: {name}", kernel, table[name][column], format=".4f"
                )
                for name in (EDGE, BIN)
            ),
        ],
        panels={"reward while exploring": curves},
        x_label="environment steps",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "pomfc_kuramoto", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
