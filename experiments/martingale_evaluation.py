"""Policy evaluation in continuous time: which objectives survive small steps?

Brownian motion on [0, 1] ends with reward X_1; J(t, x) = x (1 + θ (1 - t)) is its value at θ = 0.
From the same paths, θ is found

* as the minimum of the mean-square TD error, in expectation -1.364, -1.471, -1.493 for steps of
  .1, .02, .005, and -3/2 in the limit: it makes the martingale quiet, not J right;
* as the minimum of the martingale loss;
* by CTD(0) and CTD(.5) after each path and CTD(0) within it, from θ = -1, one path an update, with
  the same falling learning rates 45 / (k + 300) for all three;
* by CLSTD.

Second, an Ornstein-Uhlenbeck process dX = -X dt + √2 dW with reward X² and ρ = 1/2, whose value is
0.4 X² + 1.6. CLSTD's fixed point on a grid has an error of order dt; the mean-square TD error's
coefficient goes to 0.

Exits 0 if the mean-square TD error's mean is within 3 standard errors of its wrong minimum at every
step, all others within 3 of 0 (and these below .02, so that it says something), the error of CLSTD
on the second problem falls with an exponent in [.8, 1.2], and the mean-square TD error's grows.

Source: Jia and Zhou 2022, arXiv 2108.06655.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import values
from pgjax.envs import sde
from pgjax.values import martingale

MSTDE, ML, CTD0, CTD5, ONLINE, CLSTD = (
    "mean-square TD error",
    "martingale loss",
    "CTD(0)",
    "CTD(.5)",
    "CTD(0), within paths",
    "CLSTD",
)
RATE, DISCOUNT, TRUTH = 1.0, 0.5, 0.4
START = -1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Two processes whose values are known."""

    steps: tuple[float, ...] = (0.1, 0.02, 0.005)
    """dt, for Brownian motion on [0, 1]."""
    paths: int = 6000
    """Of Brownian motion, for each seed and step."""
    long_steps: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)
    """dt, for the Ornstein-Uhlenbeck process."""
    long_paths: int = 25
    """Of the Ornstein-Uhlenbeck process, for each seed and step."""
    horizon: float = 200.0
    """Of the Ornstein-Uhlenbeck process."""
    seeds: int = 40
    """Independent sets of paths."""
    first_seed: int = 0
    """Of the paths."""
    out: pathlib.Path = pathlib.Path("runs/martingale_evaluation")
    """Directory for results."""
    quick: bool = False
    """Three seeds of a hundred short paths, two steps for each process."""


def family(theta: Array, t: Array, x: Array) -> Array:
    """Right at θ = 0."""
    return x * (1.0 + theta * (1.0 - t))


def minimiser(loss: Callable[[Array], Array], start: Array) -> Array:
    """Of a quadratic, by one Newton step."""
    return start - jnp.linalg.solve(jax.hessian(loss)(start), jax.grad(loss)(start))


def brownian(key: PRNGKeyArray, dt: float, paths: int) -> dict[str, Float[Array, ""]]:
    """θ by every method, from the same paths."""
    times = jnp.asarray(sde.time_grid(1.0, dt), jnp.float32)
    n = times.size - 1
    draw = functools.partial(sde.brownian_motion, start=jnp.float32(0.0), num_steps=n, dt=dt)
    x = jax.vmap(draw)(jax.random.split(key, paths))
    nothing = jnp.zeros((paths, n))
    slopes = (x * (1.0 - times))[..., None]

    def td_error(theta: Array) -> Array:
        delta = martingale.increments(family(theta[0], times, x), nothing, dt=dt)
        return jnp.mean(martingale.mean_square_td_error(delta, dt=dt)) * dt

    def distance(theta: Array) -> Array:
        v = family(theta[0], times, x)[:, :-1]
        return jnp.mean(martingale.martingale_loss(v, nothing, x[:, -1], dt=dt))

    rates = 45.0 / (jnp.arange(paths) + 300.0)
    traces = martingale.trace_test_functions(slopes[:, :-1], lambda_=0.5, dt=dt)

    def after_paths(test_functions: Array) -> Array:
        def update(theta: Array, given: Any) -> tuple[Array, None]:
            path, xi, rate = given
            delta = martingale.increments(family(theta[0], times, path), nothing[0], dt=dt)
            return theta + rate * martingale.orthogonality(xi, delta), None

        return jax.lax.scan(update, jnp.full(1, START), (x, test_functions, rates))[0][0]

    def within_paths() -> Array:
        def update(theta: Array, given: Any) -> tuple[Array, None]:
            path, rate = given
            theta, _ = values.ctd_online(
                family, theta, path, nothing[0], learning_rate=rate, dt=dt, terminal=path[-1]
            )
            return theta, None

        return jax.lax.scan(update, jnp.float32(START), (x, rates))[0]

    start = jnp.full(1, START)
    return {
        MSTDE: minimiser(td_error, start)[0],
        ML: minimiser(distance, start)[0],
        CTD0: after_paths(slopes[:, :-1]),
        CTD5: after_paths(traces),
        ONLINE: within_paths(),
        CLSTD: values.clstd(slopes, nothing, dt=dt, known=x)[0],
    }


def wrong_minimum(dt: float) -> float:
    """Where the expected mean-square TD error is least."""
    n = round(1 / dt)
    s, t = 1 - np.arange(1, n + 1) / n, np.arange(n) / n
    return float(-s.sum() / ((s**2).sum() + t.sum() / n))


def long_run(
    key: PRNGKeyArray, dt: float, paths: int, horizon: float
) -> dict[str, Float[Array, ""]]:
    """The coefficient of X² by both methods, from the same stationary paths."""
    n = len(sde.time_grid(horizon, dt)) - 1
    start_key, key = jax.random.split(key)
    draw = functools.partial(
        sde.ornstein_uhlenbeck, rate=RATE, volatility=(2 * RATE) ** 0.5, num_steps=n, dt=dt
    )
    x = jax.vmap(draw)(jax.random.split(key, paths), jax.random.normal(start_key, (paths,)))
    features = jnp.stack([jnp.square(x), jnp.ones_like(x)], axis=-1)
    rewards = jnp.square(x[:, :-1])

    def td_error(theta: Array) -> Array:
        delta = martingale.increments(features @ theta, rewards, dt=dt, rho=DISCOUNT)
        return jnp.mean(martingale.mean_square_td_error(delta, dt=dt)) * dt

    return {
        MSTDE: minimiser(td_error, jnp.zeros(2))[0],
        CLSTD: values.clstd(features, rewards, dt=dt, rho=DISCOUNT)[0],
    }


def fixed_point(dt: float) -> float:
    """CLSTD's coefficient of X² in expectation, at this step: `dt / (1 + ρ dt - e^{-2κ dt})`."""
    return dt / (1 + DISCOUNT * dt - np.exp(-2 * RATE * dt))


def run(config: Config) -> reproduction.Findings:
    """Both processes at every step."""
    seeds, paths, horizon = config.seeds, config.paths, config.horizon
    steps, long_steps = config.steps, config.long_steps
    if config.quick:
        seeds, paths, horizon, steps, long_steps = 3, 100, 20.0, (0.1, 0.05), (0.4, 0.2)
    if seeds < 2 or len(long_steps) < 2:
        raise ValueError(
            f"seeds, long_steps: expected at least 2 of each, got {seeds} and {len(long_steps)}"
        )
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(seeds))
    short, long = {}, {}
    for dt in reproduction.track(steps, "Brownian motion"):
        one = functools.partial(brownian, dt=dt, paths=paths)
        short[dt] = many(one, keys)
    for dt in reproduction.track(long_steps, "Ornstein-Uhlenbeck"):
        one = functools.partial(long_run, dt=dt, paths=config.long_paths, horizon=horizon)
        long[dt] = many(one, keys)
    table: dict[str, dict[str, Any]] = {
        name: {f"θ, dt {dt:g}": short[dt][name] for dt in steps} for name in short[steps[0]]
    }
    for name in (MSTDE, CLSTD):
        table[f"OU: {name}"] = {f"error, dt {dt:g}": long[dt][name] - TRUTH for dt in long_steps}
    return reproduction.Findings(
        title="Brownian motion: θ (right is 0); OU: error of the coefficient of X² (0.4)",
        table=table,
        claims=claims(short, long),
        panels={
            "Brownian motion: θ": {
                name: reproduction.band(steps, np.stack([short[dt][name] for dt in steps], 1))
                for name in short[steps[0]]
            },
            "Ornstein-Uhlenbeck: coefficient of X² less 0.4": {
                **{
                    name: reproduction.band(
                        long_steps, np.stack([long[dt][name] for dt in long_steps], 1) - TRUTH
                    )
                    for name in (MSTDE, CLSTD)
                },
                "CLSTD, expected": (
                    np.asarray(long_steps),
                    np.array([fixed_point(dt) for dt in long_steps]) - TRUTH,
                ),
            },
        },
        x_label="dt",
    )


def many(one: Callable[[PRNGKeyArray], dict[str, Array]], keys: Any) -> dict[str, np.ndarray]:
    """All seeds, some at a time: paths of all at once would not fit a small machine."""
    batch = min(20, keys.shape[0])
    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=batch))(keys)
    return {name: np.asarray(x, float) for name, x in found.items()}


def claims(short: dict[float, Any], long: dict[float, Any]) -> list[reproduction.Claim]:
    """What is to be shown of each process."""
    wrong = {dt: away(found[MSTDE], wrong_minimum(dt)) for dt, found in short.items()}
    right = {
        (name, dt): away(x, 0.0)
        for dt, found in short.items()
        for name, x in found.items()
        if name != MSTDE
    }
    errors = [
        reproduction.standard_error(found[name])
        for found in short.values()
        for name in found
        if name != MSTDE
    ]
    worst = max(right, key=lambda key: abs(right[key]))
    steps = np.array(sorted(long))
    bias = np.array([long[dt][CLSTD].mean() - TRUTH for dt in steps])
    order = float(np.polyfit(np.log(steps), np.log(np.abs(bias)), 1)[0])
    expected = [away(long[dt][CLSTD], fixed_point(dt)) for dt in steps]
    td = [float(np.abs(long[dt][MSTDE] - TRUTH).mean()) for dt in steps]
    return [
        reproduction.Claim(
            "the mean-square TD error has its minimum where the formula says, far from 0",
            all(abs(x) <= 3 for x in wrong.values()),
            ", ".join(
                f"{short[dt][MSTDE].mean():.4f}, {x:+.1f} standard errors from "
                f"{wrong_minimum(dt):.4f} (dt {dt:g})"
                for dt, x in wrong.items()
            ),
        ),
        reproduction.Claim(
            "all others are within 3 standard errors of 0 at every step",
            all(abs(x) <= 3 for x in right.values()) and max(errors) < 0.02,
            f"at most {abs(right[worst]):.1f} ({worst[0]}, dt {worst[1]:g}); "
            f"standard errors up to {max(errors):.4f} (below 0.02)",
        ),
        reproduction.Claim(
            "OU: CLSTD's error is of order dt",
            0.8 <= order <= 1.2,
            f"exponent {order:.2f} (0.8 to 1.2); from the fixed point of each step at most "
            f"{max(np.abs(expected)):.1f} standard errors",
        ),
        reproduction.Claim(
            "OU: the mean-square TD error's error grows as steps shrink",
            bool(np.all(np.diff(td) < 0)),
            ", ".join(f"{x:.3f} (dt {dt:g})" for dt, x in zip(steps, td, strict=True)),
        ),
    ]


def away(x: Float[np.ndarray, " S"], wanted: float) -> float:
    """How many standard errors the mean over seeds is from a number."""
    return float((x.mean() - wanted) / reproduction.standard_error(x))


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "martingale_evaluation", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
