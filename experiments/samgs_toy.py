"""Two tasks whose gradients differ in size: which way of adding them finds the common minimum.

Two losses in the plane, mirror images of each other, whose sum is least at two points. From six
starts, Adam follows the sum of both gradients, or what SAM-GS, PCGrad or CAGrad make of them.
SAM-GS must reach the least value from at least five of the six, and from more than the plain sum
(arXiv 2506.06130). Only PCGrad is random; it runs with several seeds, and its column counts the
mean. Exits with 1 if that does not show.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.optim import multitask

STARTS = np.array(
    [[-3.5, 5.5], [3.5, 5.5], [-6.5, 2.5], [6.5, 2.5], [0.0, 10.0], [0.0, -8.0]], np.float32
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Six starts, four ways of adding up."""

    steps: int = 5000
    """Updates of Adam."""
    learning_rate: float = 1e-2
    """Of Adam."""
    gamma: float = 0.1
    """Similarity of norms below which SAM-GS makes them equal."""
    b2: float = 0.9
    """Decay of SAM-GS's average of dissimilarity."""
    alpha: float = 0.4
    """Radius of CAGrad."""
    seeds: int = 3
    """Of PCGrad's orders."""
    quick: bool = False
    """A hundred updates, for tests."""
    out: pathlib.Path = pathlib.Path("runs/samgs_toy")
    """Directory for table and plot."""


def losses(x: Float[Array, " 2"], _: Any = None) -> Float[Array, " 2"]:
    """Both tasks."""
    x1, x2 = x
    upper, lower = jax.nn.relu(jnp.tanh(x2 / 2)), jax.nn.relu(jnp.tanh(-x2 / 2))

    def log_size(value: Array) -> Array:
        return jnp.log(jnp.maximum(jnp.abs(value), 5e-6)) + 6

    def basin(side: float) -> Array:
        near, far = (x1 - 5.5 * side) / 4, (x1 - 5.45 * side) / 4
        y = x2 / 4
        return 0.1 * far**6 + 0.1 * y**6 - near**4 - y**4 - 1.5 * near**2 - 1.5 * y**2 + 1.5

    first = log_size(0.5 * (-x1 - 7) - jnp.tanh(-x2))
    second = log_size(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2)
    return jnp.stack([first * upper + basin(1.0) * lower, second * upper + basin(-1.0) * lower])


def least_value() -> float:
    """The smallest sum of both losses, from many starts below the axis."""

    total = jax.jit(lambda x: jnp.sum(losses(x)))

    def value(x: Any) -> float:
        return float(total(jnp.asarray(x, jnp.float32)))

    found = [
        scipy.optimize.minimize(value, [x1, x2], method="Nelder-Mead").fun
        for x1 in (-6.0, 0.0, 6.0)
        for x2 in (-11.0, -7.0)
    ]
    return min(found)


def descend(
    config: Config, add_up: Callable[[Any, Array, Array], tuple[Array, Any]], memory: Any
) -> Callable[[Array, Array], Float[Array, "K 2"]]:
    """Adam's path from a start, with a key; `add_up` takes memory, key and task gradients."""
    optimizer = optax.adam(config.learning_rate)

    def run(start: Array, key: Array) -> Array:
        def step(carry: Any, key: Array) -> tuple[Any, Array]:
            x, state, memory = carry
            grads = multitask.task_gradients(losses, x, None)
            gradient, memory = add_up(memory, key, grads)
            update, state = optimizer.update(gradient, state, x)
            x = optax.apply_updates(x, update)
            return (x, state, memory), x

        first = (start, optimizer.init(start), memory)
        return jax.lax.scan(step, first, jax.random.split(key, config.steps))[1]

    return run


def methods(config: Config) -> dict[str, Callable[[Array, Array], Array]]:
    """Each as a function from a start and a key to a path."""

    def surgery(memory: Any, key: Array, grads: Array) -> tuple[Array, Any]:
        return multitask.samgs(
            memory, grads, gamma=config.gamma, b2=config.b2, factor=2.0, clip=1.0
        )[:2]

    return {
        "sum": descend(config, lambda memory, key, grads: (grads.sum(0), memory), None),
        "SAM-GS": descend(config, surgery, multitask.samgs_init(jnp.zeros((2, 2)))),
        "PCGrad": descend(
            config, lambda memory, key, grads: (multitask.pcgrad(key, grads), memory), None
        ),
        "CAGrad": descend(
            config,
            lambda memory, key, grads: (multitask.cagrad(grads, alpha=config.alpha), memory),
            None,
        ),
    }


def run(config: Config) -> reproduction.Findings:
    """Which starts lead to the least value."""
    if config.quick:
        config = dataclasses.replace(config, steps=100, seeds=3)
    best = least_value()
    table: dict[str, dict[str, np.ndarray]] = {}
    panels: dict[str, dict[str, tuple]] = {}
    for name, method in reproduction.track(methods(config).items()):
        seeds = config.seeds if name == "PCGrad" else 1
        each = jax.jit(jax.vmap(method, in_axes=(0, None)))
        paths = np.stack([np.asarray(each(STARTS, jax.random.key(seed))) for seed in range(seeds)])
        sums = np.asarray(
            jax.jit(jnp.vectorize(lambda x: losses(x).sum(), signature="(d)->()"))(paths)
        )
        last = sums[:, :, -1].mean(0)
        reached = (sums[:, :, -1] < best + 0.1).mean(0)
        table[name] = {"reached": reached, "last sum": last}
        every = max(1, config.steps // 200)
        panels[f"sum of both losses: {name}"] = {
            f"({x:g}, {y:g})": (np.arange(1, config.steps + 1)[::every], sums[0, i, ::every])
            for i, (x, y) in enumerate(STARTS)
        }
    hits = {name: float(row["reached"].sum()) for name, row in table.items()}
    claims = [
        reproduction.Claim(
            "SAM-GS reaches the least value from at least 5 of 6 starts",
            hits["SAM-GS"] >= 5,
            f"from {hits['SAM-GS']:g}; the least value is {best:.2f}",
        ),
        reproduction.Claim(
            "and from more than the plain sum does",
            hits["SAM-GS"] > hits["sum"],
            ", ".join(f"{name}: {count:g}" for name, count in hits.items()),
        ),
    ]
    return reproduction.Findings(
        title="Two tasks from six starts", table=table, claims=claims, panels=panels
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("samgs_toy", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
