"""Does a sixth of the entries of Q suffice, if the rest is completed as a matrix of low rank?

A noisy pendulum on a grid of 40 x 40 states and 50 torques, with a generative model: value
iteration of 60 iterations whose expectations are means over N draws. Full sampling draws for all
80,000 entries, with N = 20, and with N = 4, a fifth of that; the completions draw N = 20 for the
rows and columns of 8 anchors, 16.4% of the entries, and invert the 3 largest singular values of the
block where they meet. Action anchors are Chebyshev's; state anchors are the pivots of the columns
just sampled, or random. Errors are against the exact Q of the same grid, of which the transitions
are known in closed form. Two more rows show what the truncated rank and the pivots are for.

Exits 0 if, at both discounts and in the mean over seeds, the completion with pivots has a largest
error no larger than that of full sampling with the sixfold budget, and largest and mean errors at
most half those of full sampling at equal budget. The paper's guarantees are of the largest error;
the mean one is shown beside that of full sampling, and not judged there.

Source: Sample Efficient Reinforcement Learning via Low-Rank Matrix Estimation, Shah et al. 2020,
arXiv 2006.06135; task and sizes are our own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax import values as pv

SPEED = 10.0
NOISE = 0.2


@dataclasses.dataclass(frozen=True)
class Config:
    """One pendulum, two discounts, several ways to sample."""

    side: int = 40
    """Points of the grid for the angle, and for the velocity."""
    torques: int = 50
    """Points of the grid for the action."""
    discounts: tuple[float, ...] = (0.5, 0.9)
    """γ."""
    iterations: int = 60
    """Of value iteration."""
    samples: int = 20
    """N draws of an entry; equal budget means a fifth of them."""
    anchors: int = 8
    """States, and actions."""
    rank: int = 3
    """Singular values that are inverted."""
    seeds: int = 5
    """Of draws and random anchors."""
    quick: bool = False
    """A small grid, few iterations and three seeds, for tests."""
    out: pathlib.Path = pathlib.Path("runs/low_rank_pendulum")
    """Directory for table and plot."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Angles from -π without π, velocities from -10 to 10, torques from -1 to 1."""

    side: int
    torques: int

    @property
    def angles(self) -> Float[np.ndarray, " K"]:
        return -np.pi + 2 * np.pi * np.arange(self.side) / self.side

    @property
    def speeds(self) -> Float[np.ndarray, " K"]:
        return np.linspace(-SPEED, SPEED, self.side)

    @property
    def states(self) -> Float[np.ndarray, "M 2"]:
        both = np.meshgrid(self.angles, self.speeds, indexing="ij")
        return np.stack(both, -1).reshape(-1, 2)

    @property
    def actions(self) -> Float[np.ndarray, " N"]:
        return np.linspace(-1.0, 1.0, self.torques)


def sample(key: Array, state: Float[Array, " 2"], action: Float[Array, ""]) -> Any:
    """θ' = θ + 0.3 w, w' = w + 0.3 (sin θ + a) + noise; reward cos θ - 0.05 a²."""
    angle, speed = state
    following = speed + 0.3 * (jnp.sin(angle) + action) + NOISE * jax.random.normal(key)
    new = jnp.stack([angle + 0.3 * speed, jnp.clip(following, -SPEED, SPEED)])
    return jnp.cos(angle) - 0.05 * jnp.square(action), new


def nearest(grid: Grid, state: Float[Array, " 2"]) -> Array:
    """Index of the grid's nearest state; angles are periodic."""
    turn = jnp.round((state[0] + np.pi) / (2 * np.pi / grid.side)).astype(jnp.int32) % grid.side
    at = jnp.round((state[1] + SPEED) / (2 * SPEED / (grid.side - 1))).astype(jnp.int32)
    return turn * grid.side + jnp.clip(at, 0, grid.side - 1)


def exact(grid: Grid, discount: float) -> Float[np.ndarray, "M N"]:
    """Q of the grid: each velocity's cell has the normal probability of what rounds to it."""
    states, actions = grid.states, grid.actions
    angle, speed = states[:, 0], states[:, 1]
    turn = np.round((angle + 0.3 * speed + np.pi) / (2 * np.pi / grid.side)).astype(int) % grid.side
    mean = speed[:, None] + 0.3 * (np.sin(angle)[:, None] + actions)
    edges = (grid.speeds[1:] + grid.speeds[:-1]) / 2
    below = np.vectorize(math.erf)((edges - mean[..., None]) / (NOISE * 2**0.5)) / 2 + 0.5
    chance = np.diff(below, axis=-1, prepend=0.0, append=1.0)  # [M, N, velocities]
    reward = np.cos(angle)[:, None] - 0.05 * actions**2
    value = np.zeros(len(states))
    while True:
        following = value.reshape(grid.side, grid.side)[turn]  # [M, velocities]
        q = reward + discount * np.einsum("mnk,mk->mn", chance, following)
        new = q.max(1)
        if np.abs(new - value).max() < 1e-10:
            return q
        value = new


def completed(
    key: Array,
    grid: Grid,
    config: Config,
    discount: float,
    iterations: int,
    *,
    rank: int | None,
    pivoted: bool,
) -> Float[Array, "M N"]:
    """Q by completion; random state anchors are drawn once, before the first iteration."""
    draw_key, key = jax.random.split(key)
    fixed = pv.random_anchors(draw_key, grid.side**2, count=config.anchors)

    def pivots(key: Array, columns: Float[Array, "M k"]) -> Array:
        return pv.pivoted_anchors(columns, count=config.anchors)

    return pv.low_rank_value_iteration(
        key,
        jnp.asarray(grid.states),
        jnp.asarray(grid.actions),
        num_iterations=iterations,
        value_range=bounds(discount),
        sample=sample,
        nearest=functools.partial(nearest, grid),
        num_samples=config.samples,
        discount=discount,
        action_anchors=pv.chebyshev_anchors(grid.torques, count=config.anchors),
        select_states=pivots if pivoted else lambda key, columns: fixed,
        rank=rank,
    ).action_values


def sampled(
    key: Array, grid: Grid, discount: float, iterations: int, *, num_samples: int
) -> Float[Array, "M N"]:
    """Q by full sampling."""
    low, high = bounds(discount)

    def step(values: Array, key: Array) -> tuple[Array, None]:
        q = backup(values, key)
        return jnp.clip(q.max(1), low, high), None

    def backup(values: Array, key: Array) -> Array:
        return pv.sampled_backup(
            key,
            values,
            jnp.asarray(grid.states),
            jnp.asarray(grid.actions),
            sample=sample,
            nearest=functools.partial(nearest, grid),
            num_samples=num_samples,
            discount=discount,
        )

    keys = jax.random.split(key, iterations)
    values, _ = jax.lax.scan(step, jnp.zeros(grid.side**2), keys[:-1])
    return backup(values, keys[-1])


def bounds(discount: float) -> tuple[float, float]:
    """Least and largest value there can be."""
    return -1.05 / (1 - discount), 1.0 / (1 - discount)


def run(config: Config) -> reproduction.Findings:
    """All ways to sample at all discounts."""
    if not 1 <= config.rank <= config.anchors:
        raise ValueError(f"rank: expected 1 to {config.anchors} anchors, got {config.rank}")
    grid = Grid(12, 10) if config.quick else Grid(config.side, config.torques)
    iterations, seeds = (8, 3) if config.quick else (config.iterations, config.seeds)
    few = max(1, config.samples // 5)
    entries = pv.observed_entries(
        grid.side**2, grid.torques, rows=config.anchors, columns=config.anchors
    )
    full = grid.side**2 * grid.torques
    keys = jax.random.split(jax.random.key(0), seeds)
    table: dict[str, dict[str, Any]] = {}
    claims: list[reproduction.Claim] = []
    panels: dict[str, Any] = {}
    for discount in config.discounts:
        truth = exact(grid, discount)
        spectrum = np.linalg.svd(truth, compute_uv=False)[:10]
        panels[f"singular values of Q, γ = {discount}"] = {
            "log10 of σ / σ₁": (np.arange(1, 11), np.log10(spectrum / spectrum[0]))
        }
        low_rank = functools.partial(
            completed, grid=grid, config=config, discount=discount, iterations=iterations
        )
        drawn = functools.partial(sampled, grid=grid, discount=discount, iterations=iterations)
        names = {
            "wide": f"full, {config.samples} draws",
            "equal": f"full, {few} draws",
            "pivots": "completed, pivots",
            "random": "completed, random anchors",
            "all": "completed, pivots, all singular values",
            "both": "completed, random anchors, all singular values",
        }
        methods: dict[str, tuple[float, Callable[[Array], Array]]] = {
            "wide": (1.0, functools.partial(drawn, num_samples=config.samples)),
            "equal": (few / config.samples, functools.partial(drawn, num_samples=few)),
            "pivots": (
                entries / full,
                functools.partial(low_rank, rank=config.rank, pivoted=True),
            ),
            "random": (
                entries / full,
                functools.partial(low_rank, rank=config.rank, pivoted=False),
            ),
            "all": (entries / full, functools.partial(low_rank, rank=None, pivoted=True)),
            "both": (entries / full, functools.partial(low_rank, rank=None, pivoted=False)),
        }
        largest, average = {}, {}
        for short, (budget, method) in reproduction.track(methods.items(), f"γ = {discount}"):
            found = np.stack([np.asarray(q) for q in map(jax.jit(method), keys)])
            error = np.abs(found - truth)
            largest[short], average[short] = error.max((1, 2)), error.mean((1, 2))
            table[f"γ = {discount}: {names[short]}"] = {
                "draws, of full": np.array([budget]),
                "largest error": largest[short],
                "mean error": average[short],
            }
        paired = largest["pivots"] - largest["wide"]
        claims.append(
            reproduction.Claim(
                f"γ = {discount}: largest error no larger than full sampling's",
                float(paired.mean()) <= 0.0,
                f"{largest['pivots'].mean():.4f} against {largest['wide'].mean():.4f}, smaller "
                f"for {int(np.sum(paired < 0))} of {seeds} seeds",
            )
        )
        for what, errors in {"largest": largest, "mean": average}.items():
            ratio = float(errors["equal"].mean() / errors["pivots"].mean())
            claims.append(
                reproduction.Claim(
                    f"γ = {discount}: {what} error at most half that at equal budget",
                    ratio >= 2.0,
                    f"{ratio:.1f} times smaller than {errors['equal'].mean():.4f}",
                )
            )
    return reproduction.Findings(
        title=f"Completion from {100 * entries / full:.1f}% of the entries of Q",
        table=table,
        claims=claims,
        panels=panels,
        x_label="number",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs, prints and saves; 0 if the claims hold."""
    return reproduction.main(
        "low_rank_pendulum", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
