"""Step sizes that fall linearly to zero rid the last iterate of its log factor.

On the function of Harvey et al. against which constant and 1/√t steps do worst, √T times the last
iterate's value must grow by at least 0.05 with every factor 4 of T for those two, and stay within
10% for linear decay. Beside it, |x| with noisy subgradients, many chains: mean and 99% quantile of
the last iterate. Exits with 1 if that does not show. The first part has no randomness; its
"seeds" are the horizons.

Source: Liu and Zhou, 2024, arXiv 2312.08531; the function: Harvey, Liaw, Plan and Randhawa, 2019,
arXiv 1812.05217.
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
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.optim import mirror, schedules


@dataclasses.dataclass(frozen=True)
class Config:
    """Horizons of the worst case; chains on |x|."""

    horizons: tuple[int, ...] = (100, 400, 1600)
    """T, each four times the last."""
    total: int = 1000
    """Steps on |x|."""
    base: float = 0.5
    """Of the step sizes on |x|."""
    noise: float = 1.0
    """Standard deviation of the noise of a subgradient of |x|."""
    chains: int = 4000
    """Of each seed."""
    seeds: int = 5
    """Of the chains."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/last_iterate")
    """Directory for table and plot."""


def constant(base: float, total: int) -> schedules.Schedule:
    """`base / √T`, the textbook's step for the average of the iterates."""
    return lambda count: jnp.full(jnp.shape(count), base / total**0.5)


STEPS: dict[str, Callable[[float, int], schedules.Schedule]] = {
    "constant": constant,
    "1/√t": lambda base, total: schedules.last_iterate_sqrt(base),
    "linear": schedules.last_iterate_linear,
}


def worst_case(total: int) -> Float[np.ndarray, "T+1 T"]:
    """The rows h_i of `f(x) = max_i <h_i, x>`: a_j before place i, -b_i at it, 0 after it."""
    j = np.arange(1, total + 1)
    a, b = 1 / (8 * (total - j + 1)), np.sqrt(j) / (2 * np.sqrt(total))
    rows = np.where(j[None] < np.arange(1, total + 2)[:, None], a, 0.0)
    rows[np.arange(total), np.arange(total)] = -b
    return rows


def worst_case_values(schedule: schedules.Schedule, total: int) -> Float[np.ndarray, " T"]:
    """The function after every step from 0, each along the first row that attains the maximum.

    In the unit ball, and in double precision: rows tie exactly, and rounding must not choose.
    """

    def project(x: Array, lr: Any) -> Array:
        return optax.projections.projection_l2_ball(x, 1.0)

    with jax.enable_x64(True):
        rows = jnp.asarray(worst_case(total))

        def step(x: Array, count: Array) -> tuple[Array, Array]:
            values = rows @ x
            first = jnp.argmax(values >= jnp.max(values) - 1e-12)
            x = mirror.mirror_step(x, rows[first], schedule(count), prox=project)
            return x, jnp.max(rows @ x)

        _, values = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(total)))(jnp.zeros(total))
        return np.asarray(values)


def noisy_distances(
    config: Config, schedule: schedules.Schedule
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Mean and 99% quantile of the last |x|, from x = 1."""

    def chains(seed: Array) -> tuple[Array, Array]:
        def step(x: Array, now: Any) -> tuple[Array, None]:
            count, key = now
            gradient = jnp.sign(x) + config.noise * jax.random.normal(key, x.shape)
            return mirror.mirror_step(x, gradient, schedule(count)), None

        keys = jax.random.split(jax.random.key(seed), config.total)
        x, _ = jax.lax.scan(step, jnp.ones(config.chains), (jnp.arange(config.total), keys))
        return jnp.mean(jnp.abs(x)), jnp.quantile(jnp.abs(x), 0.99)

    mean, high = jax.jit(lambda seeds: jax.lax.map(chains, seeds))(jnp.arange(config.seeds))
    return np.asarray(mean), np.asarray(high)


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config, horizons=(25, 100, 400), total=100, chains=200, seeds=3
        )
    table: dict[str, dict[str, Any]] = {}
    scaled: dict[str, np.ndarray] = {}
    panels: dict[str, dict[str, Any]] = {"worst case: √T f(last)": {}}
    for name, build in reproduction.track(STEPS.items(), "schedules"):
        ends = np.array(
            [worst_case_values(build(1.0, total), total)[-1] for total in config.horizons]
        )
        scaled[name] = np.sqrt(config.horizons) * ends
        mean, high = noisy_distances(config, build(config.base, config.total))
        columns = dict(zip(config.horizons, scaled[name], strict=True))
        table[name] = {f"√T f, T={total}": np.array([x]) for total, x in columns.items()}
        table[name] |= {"|x| ×1e3": 1e3 * mean, "|x| ×1e3, 99%": 1e3 * high}
        panels["worst case: √T f(last)"][name] = (np.log2(config.horizons), scaled[name])
    claims = [
        reproduction.Claim(
            f"{name}: the last iterate's √T f grows by at least 0.05 with each factor 4 of T",
            bool(np.all(np.diff(scaled[name]) >= 0.05)),
            ", ".join(f"{x:.3f}" for x in scaled[name]),
        )
        for name in ("constant", "1/√t")
    ]
    linear = scaled["linear"]
    claims.append(
        reproduction.Claim(
            "linear: it stays within 10%",
            bool(linear.max() <= 1.1 * linear.min()),
            ", ".join(f"{x:.4f}" for x in linear),
        )
    )
    far = {name: (row["|x| ×1e3"], row["|x| ×1e3, 99%"]) for name, row in table.items()}
    others = [far[name] for name in STEPS if name != "linear"]
    claims.append(
        reproduction.Claim(
            "on |x| linear decay ends nearest to 0, by mean and 99% quantile, with every seed",
            bool(all(np.all(np.array(far["linear"]) < np.array(other)) for other in others)),
            ", ".join(
                f"{name} {1e-3 * x.mean():.2g} ({1e-3 * q.mean():.2g})"
                for name, (x, q) in far.items()
            ),
        )
    )
    return reproduction.Findings(
        title="The last iterate",
        table=table,
        claims=claims,
        panels=panels,
        x_label="log2 T",
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main("last_iterate", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
