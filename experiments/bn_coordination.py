"""How much of the best return do agents reach that see what others have just chosen?

The coordination game of `envs.coordination` with tabular softmax policies, exact returns and exact
gradients: plain ascent from N(0, 1) logits. Three graphs: none of the agents sees another
(independent), each sees the one before it (line), each sees all before it (full, which can be any
joint policy). Curves end in local optima, and the question is in which.

Exits 0 if with three agents or more the mean share of the best return of line and full graph is
above that of independent agents by .02, and the full graph's is not below the line's by .02.

Source: BN-MAPPO, Chen and Zhang 2023, arXiv 2306.01920.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.envs import coordination
from pgjax.policies import bayes_net

EMPTY, LINE, FULL = "independent", "line", "full"
POINTS = 50  # of a curve


@dataclasses.dataclass(frozen=True)
class Config:
    """How to learn."""

    agents: tuple[int, ...] = (2, 3, 5)
    """Sizes of the game."""
    iterations: int = 5_000
    """Gradient steps."""
    learning_rate: float = 0.1
    """Of plain ascent."""
    seeds: int = 20
    """Starts, the same for all graphs."""
    out: pathlib.Path = pathlib.Path("runs/bn_coordination")
    """Directory for results."""
    quick: bool = False
    """Three starts, 50 steps, two and three agents."""


def graphs(size: int) -> dict[str, Array]:
    """What is compared."""
    ones = jnp.ones((size, size))
    return {EMPTY: 0 * ones, LINE: jnp.eye(size, k=1), FULL: jnp.triu(ones, 1)}


def joint_policy(table: Float[Array, "n S S 2"], graph: Float[Array, "n n"]) -> Array:
    """π(a|s), `[S, S]`; logits by agent, state and the parents' actions as a number."""
    size = len(table)
    places = 2.0 ** jnp.arange(size)

    def of(own: Float[Array, "n S 2"]) -> Array:
        def logits(agent: Any, parents: Float[Array, "n 2"]) -> Array:
            # A look-up: products with one-hot rows cost 32 times as much with five agents.
            return own[agent, (places @ parents[:, 1]).astype(jnp.int32)]

        return bayes_net.bn_joint(logits, graph, num_actions=2)

    return jax.vmap(of, in_axes=1)(table)


def learn(config: Config, size: int, graph: Array, key: Array) -> Float[Array, " K"]:
    """Return along the way, of one start."""
    game = coordination.tables(size)
    states = 2**size
    table = jax.random.normal(key, (size, states, states, 2))

    def value(table: Array) -> Array:
        return coordination.expected_return(game, joint_policy(table, graph))

    def steps(table: Array, _: None) -> tuple[Array, Array]:
        def one(_: int, table: Array) -> Array:
            return table + config.learning_rate * jax.grad(value)(table)

        table = jax.lax.fori_loop(0, max(1, config.iterations // POINTS), one, table)
        return table, value(table)

    return jax.lax.scan(steps, table, None, length=POINTS)[1]


def run(config: Config) -> reproduction.Findings:
    """All graphs from the same starts."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, iterations=50, agents=(2, 3))
    keys = jax.random.split(jax.random.key(0), config.seeds)
    table: dict[str, Any] = {}
    panels: dict[str, Any] = {}
    claims = []
    for size in reproduction.track(config.agents, "sizes"):
        best = float(coordination.best_return(coordination.tables(size)))
        shares: dict[str, Float[np.ndarray, "S K"]] = {}
        for name, graph in graphs(size).items():
            found = jax.jit(jax.vmap(lambda key, n=size, g=graph: learn(config, n, g, key)))(keys)
            shares[name] = np.asarray(found) / best
            last = shares[name][:, -1]
            table[f"{size} agents, {name}"] = {"share of best": last, "above .999": last > 0.999}
        steps = max(1, config.iterations // POINTS) * (1 + np.arange(POINTS))
        panels[f"share of the best return, {size} agents"] = {
            name: reproduction.band(steps, x) for name, x in shares.items()
        }
        ends = {name: float(x[:, -1].mean()) for name, x in shares.items()}
        seen = ", ".join(f"{name} {x:.3f}" for name, x in ends.items())
        if size > 2:
            claims += [
                reproduction.Claim(
                    f"{size} agents: line and full graph end above independent agents by .02",
                    min(ends[LINE], ends[FULL]) > ends[EMPTY] + 0.02,
                    seen,
                ),
                reproduction.Claim(
                    f"{size} agents: the full graph is not below the line by .02",
                    ends[FULL] >= ends[LINE] - 0.02,
                    seen,
                ),
            ]
    return reproduction.Findings(
        title=f"Share of the best return after {config.iterations} exact gradient steps",
        table=table,
        claims=claims,
        panels=panels,
        x_label="gradient steps",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "bn_coordination", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
