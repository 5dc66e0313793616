"""Do agents that learn whom to watch agree better than agents that watch nobody, and can they stop?

The coordination game of three agents of `envs.coordination`, by PPO from samples: perceptrons that
see the state, one for each agent, and one critic. Each agent also sees what its parents have just
done, along one of four graphs: none (independent), every earlier agent (full), one that a network
draws anew for each state and that is learnt with the rest, and the same with a penalty on the
distance of its density from a target that falls from 1 to 0 in the first part of the training
(annealed), after which the agents can do without each other's actions.

Judged is the exact return of the joint policy, its draws of graphs averaged, as a share of the best
one; of annealed agents also with all edges taken away. All zeros is best and all ones a trap, the
best policy needs no edges once it is found: the question is which agents find it.

Exits 0 if agents with a learnt graph end above independent ones by two standard errors of the
paired difference, and annealed ones, at a density below .1 and with all edges taken away, as well.

It exits 1: most runs end in the trap, whatever the graph, and learnt graphs no less than others.

Source: BN-MAPPO, Chen and Zhang 2023, arXiv 2306.01920.
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
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import agents, envs
from pgjax.agents.bn_mappo import BayesNetCritic
from pgjax.envs import coordination
from pgjax.models import dag
from pgjax.policies import bayes_net

EMPTY, FULL, LEARNT, ANNEALED = "independent", "full", "learnt", "annealed"
DISCOUNT = 0.95


@dataclasses.dataclass(frozen=True)
class Config:
    """How to learn."""

    agents: int = 3
    """Of the game."""
    updates: int = 80
    """Of PPO, each of 32 games times 16 steps."""
    learning_rate: float = 3e-3
    """Of PPO, for every graph."""
    density_coefficient: float = 0.1
    """Of the penalty, for annealed graphs."""
    anneal: float = 0.8
    """Share of the training after which the density's target is 0."""
    points: int = 10
    """At which the return is computed, on the way."""
    graphs: int = 64
    """Draws of a graph in each state, to average the policy over."""
    seeds: int = 20
    """Independent runs."""
    first_seed: int = 1000
    """The others follow it."""
    out: pathlib.Path = pathlib.Path("runs/bn_learned_graph")
    """Directory for results."""
    quick: bool = False
    """Three seeds of four updates."""


class Method(NamedTuple):
    """What is different: numbers, so that one compiled program serves two methods.

    Attributes:
      full: the graph that is fixed has all edges, or none.
      penalty: α of the density.
    """

    full: bool = False
    penalty: float = 0.0


def scaled(env: envs.Environment) -> envs.Environment:
    """The game with rewards times 1 - γ.

    Returns are then of order 1, as the clip of values, .2 an update, takes for granted: of the
    game's own, 40, the critic would not have come near by the time that the policy has settled.
    """

    def step(key: Array, state: Any, action: Any) -> envs.Step:
        found = env.step(key, state, action)
        return found._replace(reward=(1.0 - DISCOUNT) * found.reward)

    return dataclasses.replace(env, step=step)


def share_of_best(
    config: Config, net: BayesNetCritic, params: Any, key: PRNGKeyArray, edges: float = 1.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """J / J* of the joint policy, and the density of its graphs in all states.

    `edges` of 0 takes all of them away.
    """
    game = coordination.tables(config.agents)

    def one(key: PRNGKeyArray, state: Float[Array, " n"]) -> tuple[Array, Array]:
        logits = functools.partial(net.logits, params, state)
        graph = edges * net.sample_graph(params, key, state).graph
        return bayes_net.bn_joint(logits, graph, num_actions=2), dag.density(graph)

    states = game.bits.astype(jnp.float32)
    keys = jax.random.split(key, (config.graphs, len(states)))
    policies, densities = jax.vmap(lambda keys: jax.vmap(one)(keys, states))(keys)
    found = coordination.expected_return(game, policies.mean(0))
    return found / coordination.best_return(game), densities.mean()


def learn(config: Config, learnt: bool, method: Method, key: PRNGKeyArray) -> dict[str, Array]:
    """Share of the best return and density along the way, and at the end without edges."""
    env = scaled(coordination.coordination_game(config.agents))
    if learnt:
        net = agents.learned_graph_network(env, hidden=(32,))
    else:
        graph = method.full * jnp.triu(jnp.ones((config.agents, config.agents)), 1)
        net = agents.fixed_graph_network(env, graph, hidden=(32,))

    def target(updates: Array) -> Array:
        return jnp.clip(1.0 - updates / (config.anneal * config.updates), 0.0, 1.0)

    agent = agents.bn_mappo(
        env,
        net,
        density_target=target if learnt else None,
        density_coefficient=method.penalty,
        discount=DISCOUNT,
        learning_rate=config.learning_rate,
    )
    init_key, test_key = jax.random.split(key)

    def part(state: Any, key: PRNGKeyArray) -> tuple[Any, tuple[Array, Array]]:
        state, _ = agents.train(agent, state, num_updates=config.updates // config.points)
        return state, share_of_best(config, net, state.params, key)

    keys = jax.random.split(test_key, config.points)
    state, (share, density) = jax.lax.scan(part, agent.init(init_key), keys)
    alone, _ = share_of_best(config, net, state.params, test_key, edges=0.0)
    return {"share of best": share, "density": density, "without edges": alone}


def run(config: Config) -> reproduction.Findings:
    """All graphs, all seeds."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, updates=4, points=2, graphs=4)
    if config.updates < 1 or config.updates % config.points:
        raise ValueError(
            f"updates: expected a multiple of points, {config.points}, got {config.updates}"
        )
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(config.seeds))
    table: dict[str, dict[str, Float[np.ndarray, " S"]]] = {}
    shares, densities = {}, {}
    steps = config.updates // config.points * (1 + np.arange(config.points))
    methods = {
        EMPTY: Method(),
        FULL: Method(full=True),
        LEARNT: Method(),
        ANNEALED: Method(penalty=config.density_coefficient),
    }
    many = jax.vmap(learn, in_axes=(None, None, None, 0))
    train = jax.jit(many, static_argnums=(0, 1))
    for kind, method in reproduction.track(methods.items()):
        learnt = kind in (LEARNT, ANNEALED)
        numbers = jax.tree.map(jnp.asarray, method)
        found = {name: np.asarray(x) for name, x in train(config, learnt, numbers, keys).items()}
        shares[kind] = reproduction.band(steps, found["share of best"])
        densities[kind] = reproduction.band(steps, found["density"])
        last = {name: x if x.ndim == 1 else x[:, -1] for name, x in found.items()}
        table[kind] = last | {"above .95": last["share of best"] > 0.95}
    alone = table[EMPTY]["share of best"]
    density = float(table[ANNEALED]["density"].mean())
    return reproduction.Findings(
        title=f"Share of the best return after {config.updates} updates, {config.agents} agents",
        table=table,
        claims=[
            reproduction.ahead(
                "a learnt graph ends above independent agents",
                table[LEARNT]["share of best"],
                alone,
            ),
            reproduction.Claim(
                "annealed graphs end at a density below .1", density < 0.1, f"{density:.3f}"
            ),
            reproduction.ahead(
                "annealed agents, their edges taken away, end above independent ones",
                table[ANNEALED]["without edges"],
                alone,
            ),
        ],
        panels={"share of the best return": shares, "density": densities},
        x_label="updates",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "bn_learned_graph", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
