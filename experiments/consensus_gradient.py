"""Particles that follow a gradient which nobody computes, over a landscape of many valleys.

Consensus-based optimisation (CBO) and consensus hopping see only values of a noisy canyon with its
least value, 0, at the origin; gradient descent and annealed Langevin dynamics see its gradient. All
start near (8, 8). The swarms must end within 0.5 of the origin in at least 90% of runs, gradient
descent in none: the consensus point descends as a gradient does, but with a perturbation that
leads out of local minima. Clouds that are too narrow hop as gradient descent goes, which is shown
and not judged (arXiv 2306.09778). Exits with 1 if that does not show.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax import search

START = jnp.array([8.0, 8.0])


@dataclasses.dataclass(frozen=True)
class Config:
    """One landscape, several ways down."""

    seeds: int = 50
    """Runs of each method."""
    steps: int = 250
    """Steps of the swarms."""
    particles: int = 200
    """Of a swarm."""
    alpha: float = 100.0
    """Inverse temperature of the consensus."""
    widths: tuple[float, ...] = (0.4, 0.6, 0.7)
    """Widths of hopping clouds; the last one is judged."""
    gradient_steps: int = 10_000
    """Steps of 0.001 of the methods that see the gradient."""
    langevin_noise: float = 10.0
    """At the first step; divided by log(k + 1) later."""
    quick: bool = False
    """Three short runs, for tests."""
    out: pathlib.Path = pathlib.Path("runs/consensus_gradient")
    """Directory for table and plot."""


def canyon(v: Float[Array, " 2"]) -> Float[Array, ""]:
    """A curved canyon under a grid of bumps; the least value is 0, at the origin."""
    x, y = v
    floor = (x - 1) * (x - 4) ** 2 / 8 + 2
    u, across = y - floor, -x - 1.6 * y
    walls = 25 * (1 - jnp.exp(-1.4 * u**2 * jnp.exp(-0.002 * x**4)))
    bumps = 1.1625 * ((1 - jnp.cos(0.75 * jnp.pi * x)) + (1 - jnp.cos(0.75 * jnp.pi * y)))
    side = jnp.maximum((1 - jnp.exp(-9 * across**2)) * jnp.sign(across), 0)
    return walls + 0.4 * x**2 + 0.2 * y**2 + bumps + 4 * jnp.exp(1 - 2 * u**4) * side


def langevin(
    key: Array, start: Float[Array, " 2"], *, steps: int, noise: float, dt: float = 1e-3
) -> Float[Array, "K 2"]:
    """`x ← x - dt ∇E(x) + (noise / log(k + 1)) √dt ξ`; gradient descent without noise."""
    slope = jax.grad(canyon)

    def step(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        key, k = inputs
        shake = noise / jnp.log(k + 1.0) * dt**0.5 * jax.random.normal(key, (2,))
        x = x - dt * slope(x) + shake
        return x, x

    _, path = jax.lax.scan(
        step, start, (jax.random.split(key, steps), jnp.arange(1.0, steps + 1.0))
    )
    return path


def methods(config: Config) -> dict[str, Callable[[Array], Float[Array, "K 2"]]]:
    """Each method as a function from a key to the path of its point."""

    def swarm(key: Array) -> Array:
        start, run = jax.random.split(key)
        particles = START + 0.5 * jax.random.normal(start, (config.particles, 2))
        return search.run_cbo(
            run, canyon, particles, steps=config.steps, alpha=config.alpha
        ).centers

    def hopping(width: float) -> Callable[[Array], Array]:
        return lambda key: (
            search.run_hopping(
                key,
                canyon,
                START,
                steps=config.steps,
                n=config.particles,
                sigma=width,
                alpha=config.alpha,
            ).centers
        )

    def descent(noise: float) -> Callable[[Array], Array]:
        def run(key: Array) -> Array:
            start, run = jax.random.split(key)
            first = START + 0.5 * jax.random.normal(start, (2,))
            return langevin(run, first, steps=config.gradient_steps, noise=noise)

        return run

    found: dict[str, Callable[[Array], Array]] = {"CBO": swarm}
    found |= {f"hopping, width {width:g}": hopping(width) for width in config.widths}
    return found | {
        "gradient descent": descent(0.0),
        "Langevin": descent(config.langevin_noise),
    }


def run(config: Config) -> reproduction.Findings:
    """Where every method ends, over seeds."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, steps=30, particles=50, gradient_steps=200)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    table: dict[str, dict[str, np.ndarray]] = {}
    panels: dict[str, dict[str, tuple]] = {"paths of the first run": {}, "value along the way": {}}
    for name, method in reproduction.track(methods(config).items()):
        paths = np.asarray(jax.jit(jax.vmap(method))(keys))
        values = np.asarray(jax.jit(jax.vmap(jax.vmap(canyon)))(paths))
        table[name] = {
            "within 0.5 of the origin": (np.linalg.norm(paths[:, -1], axis=1) < 0.5).astype(float),
            "last value": values[:, -1],
        }
        panels["paths of the first run"][name] = (paths[0, :, 0], paths[0, :, 1])
        share = np.linspace(0, 1, paths.shape[1])
        panels["value along the way"][name] = reproduction.band(share, np.minimum(values, 100.0))
    arrived = {name: row["within 0.5 of the origin"] for name, row in table.items()}
    wide = f"hopping, width {config.widths[-1]:g}"
    stuck = float(arrived["gradient descent"].mean())
    claims = [
        reproduction.above("CBO arrives", arrived["CBO"], 0.9),
        reproduction.above(f"{wide}: arrives", arrived[wide], 0.9),
        reproduction.Claim("gradient descent never does", stuck == 0, f"{stuck:.3f}"),
    ]
    return reproduction.Findings(
        title="From (8, 8) to the origin",
        table=table,
        claims=claims,
        panels=panels,
        x_label="share of the run (first coordinate, for paths)",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "consensus_gradient", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
