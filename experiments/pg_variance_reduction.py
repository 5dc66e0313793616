"""N-PG-IGT and HARPG against plain and momentum policy gradients, one sample an iteration.

A softmax policy on random bandits with contexts and noisy rewards; the true gradient and the gap
to the best policy are known exactly. Steps γ₀ are chosen by the final gap on other bandits. The
error of the averaged gradient in the second half must fall by more than a factor 2 from normalised
momentum to N-PG-IGT, and again to N-HARPG, and HARPG must end with the smallest gap. Exits with 1
if that does not show. Printed beside it: by what power of the samples error and gap fall (HARPG
draws a second sample, for its Hessian), with 95% intervals over seeds, and gaps at equal samples.

Source: Fatkhullin et al., 2023, arXiv 2302.01734, whose rates are O(ε^-2.5) samples for N-PG-IGT
and O(ε^-2) for HARPG: gaps would fall by the powers -0.4 and -0.5.
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
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.optim import pg_momentum, points, schedules


@dataclasses.dataclass(frozen=True)
class Config:
    """Bandits, and how long to learn on them."""

    seeds: int = 400
    """Bandits to measure on; a fifth as many others to choose among five step sizes. With 16 or 80
    HARPG's gap is not told apart from that of its normalised form."""
    steps: int = 10_000
    """Iterations."""
    contexts: int = 4
    """Drawn evenly."""
    actions: int = 5
    """Their mean rewards are uniform in [0, 1]."""
    noise: float = 0.5
    """Standard deviation of a reward."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Choices of γ₀."""
    records: int = 60
    """Points of a curve, evenly spaced in the logarithm of the iteration."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/pg_variance_reduction")
    """Directory for table and plot."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A transformation that makes gradients averages, schedules, and what it does with them."""

    rates: Callable[[float], schedules.GradientSchedules]
    kind: str = "plain"
    normalized: bool = True
    samples: int = 1


METHODS = {
    "PG": Method(schedules.plain_gradient_schedules, normalized=False),
    "N-PGM": Method(schedules.normalized_momentum_schedules),
    "N-PG-IGT": Method(schedules.igt_schedules, kind="igt"),
    "N-HARPG": Method(schedules.normalized_harpg_schedules, kind="harpg", samples=2),
    "HARPG": Method(schedules.harpg_schedules, kind="harpg", normalized=False, samples=2),
}


def value(means: Float[Array, "C A"], theta: Float[Array, "C A"]) -> Float[Array, ""]:
    """Expected reward."""
    return jnp.mean(jnp.sum(jax.nn.softmax(theta) * means, axis=-1))


def draw(
    config: Config, means: Array, theta: Array, key: Array
) -> tuple[Callable[[Array], Array], Array]:
    """The log-probability of a sampled action as a function of the parameters, and its reward."""
    keys = jax.random.split(key, 3)
    context = jax.random.randint(keys[0], (), 0, config.contexts)
    action = jax.random.categorical(keys[1], theta[context])
    reward = means[context, action] + config.noise * jax.random.normal(keys[2])
    return lambda t: jax.nn.log_softmax(t[context])[action], reward


def learn(
    config: Config, method: Method, gamma0: Array, means: Array, key: Array
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Squared error of the averaged gradient, and the gap, of every iteration."""
    # A traced γ₀ scales the unit schedule; its own checks would need a number.
    rates = method.rates(1.0)
    average = (
        pg_momentum.scale_by_harpg(rates.eta)
        if method.kind == "harpg"
        else pg_momentum.scale_by_igt(rates.eta)
    )
    size = pg_momentum.normalize_global() if method.normalized else optax.identity()

    def step(carry: Any, now: Any) -> tuple[Any, Any]:
        theta, state = carry
        index, key = now
        keys = jax.random.split(key, 3)
        point = theta
        if method.kind == "igt":
            point = pg_momentum.igt_point(state, theta, rates.eta)
        logp, reward = draw(config, means, point, keys[0])
        gradient = reward * jax.grad(logp)(point)
        extra = {}
        if method.kind == "harpg":
            middle, v = pg_momentum.harpg_point(state, theta, jax.random.uniform(keys[1]))
            logp, reward = draw(config, means, middle, keys[2])
            extra["hvp"] = points.score_hvp(logp, reward, middle, v)
        d, state = average.update(gradient, state, theta, **extra)
        true = jax.grad(functools.partial(value, means))(theta)
        gap = jnp.mean(jnp.max(means, axis=-1)) - value(means, theta)
        direction, _ = size.update(d, size.init(theta), theta)
        moved = theta + gamma0 * rates.learning_rate(index) * direction
        return (moved, state), (jnp.sum((d - true) ** 2), gap)

    theta = jnp.zeros((config.contexts, config.actions))
    indices = jnp.arange(config.steps)
    _, found = jax.lax.scan(
        step, (theta, average.init(theta)), (indices, jax.random.split(key, config.steps))
    )
    return found


Curves = tuple[np.ndarray, np.ndarray, np.ndarray]


def measured(config: Config, method: Method) -> Callable[[Any, Any], Curves]:
    """Step sizes `[N]` and seeds `[N]` to errors and gaps in bins `[N, K]`, late errors `[N]`."""
    edges = bins(config)
    place = np.searchsorted(edges, np.arange(config.steps), side="right") - 1
    spread = np.zeros((config.steps, len(edges) - 1), np.float32)
    spread[np.arange(config.steps), place] = 1
    spread /= spread.sum(0)

    @jax.jit
    @jax.vmap
    def one(gamma0: Array, seed: Array) -> tuple[Array, Array, Array]:
        means_key, key = jax.random.split(jax.random.key(seed))
        means = jax.random.uniform(means_key, (config.contexts, config.actions))
        error, gap = learn(config, method, gamma0, means, key)
        return error @ spread, gap @ spread, jnp.mean(error[config.steps // 2 :])

    return lambda gammas, seeds: jax.device_get(one(jnp.asarray(gammas, jnp.float32), seeds))


def bins(config: Config) -> np.ndarray:
    """Edges of bins of iterations, from 0 to the last."""
    return np.unique(np.geomspace(1, config.steps + 1, config.records + 1).astype(int)) - 1


def exponents(x: np.ndarray, ys: Float[np.ndarray, "S K"]) -> Float[np.ndarray, " S"]:
    """Slope of log y against log x for every seed, over the last two of the decades."""
    keep = x >= x[-1] / 100
    return np.array([np.polyfit(np.log(x[keep]), np.log(y[keep]), 1)[0] for y in ys])


def interval(values: Float[np.ndarray, " S"]) -> float:
    """Half of a 95% interval of the mean, by Student's distribution."""
    import scipy.stats

    error = reproduction.standard_error(values)
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * error)


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, seeds=4, steps=300, rates=(0.3, 1.0), records=20)
    if config.seeds % len(config.rates):
        raise ValueError(f"seeds: expected a multiple of {len(config.rates)}, got {config.seeds}")
    edges = bins(config)
    middle = (edges[:-1] + edges[1:] + 1) / 2
    table: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    fits: list[str] = []
    panels: dict[str, dict[str, Any]] = {"squared error": {}, "gap": {}}
    for name, method in reproduction.track(METHODS.items()):
        chains = measured(config, method)
        # As many chains to choose as to measure: one program serves both.
        tuning = np.arange(config.seeds) // len(config.rates)
        _, gap, _ = chains(
            np.tile(config.rates, config.seeds // len(config.rates)), 10_000 + tuning
        )
        ends = gap[:, -1].reshape(-1, len(config.rates)).mean(0)
        best = config.rates[int(np.argmin(ends))]
        error, gap, late = chains(np.full(config.seeds, best), np.arange(config.seeds))
        samples = method.samples * middle
        half = gap[:, np.searchsorted(edges, config.steps // 2) - 1]
        slopes = {"error": exponents(samples, error), "gap": exponents(samples, gap)}
        table[name] = {
            "γ₀": np.full(config.seeds, best),
            "error ×1e4": 1e4 * late,
            "gap": gap[:, -1],
            "gap, equal samples": half if method.samples == 2 else gap[:, -1],
            "power of error": slopes["error"],
            "power of gap": slopes["gap"],
        }
        found[name] = {"late": late, "gap": gap[:, -1]}
        for what, values in slopes.items():
            text = f"{what} of {name} ~ samples^({values.mean():.3f} ± {interval(values):.3f})"
            fits.append(text)
        for title, ys in (("squared error", error), ("gap", gap)):
            panels[title][name] = reproduction.band(np.log10(samples), np.log10(ys))
    errors = {name: x["late"].mean() for name, x in found.items()}
    gaps = {name: x["gap"].mean() for name, x in found.items()}
    first, second = errors["N-PGM"] / errors["N-PG-IGT"], errors["N-PG-IGT"] / errors["N-HARPG"]
    rival = min((name for name in gaps if name != "HARPG"), key=gaps.__getitem__)
    apart = found["HARPG"]["gap"] - found[rival]["gap"]
    claims = [
        reproduction.Claim(
            "the error of N-PGM is above twice that of N-PG-IGT", bool(first > 2), f"{first:.2f}"
        ),
        reproduction.Claim(
            "the error of N-PG-IGT is above twice that of N-HARPG",
            bool(second > 2),
            f"{second:.2f}",
        ),
        reproduction.Claim(
            "HARPG ends with the smallest gap, by more than the 95% interval of the difference",
            bool(apart.mean() + interval(apart) < 0),
            f"{gaps['HARPG']:.4f} against {gaps[rival]:.4f} of {rival}, on the same bandits "
            f"{apart.mean():+.4f} ± {interval(apart):.4f}",
        ),
    ]
    for text in fits:
        print(text)
    return reproduction.Findings(
        title=f"After {config.steps} iterations",
        table=table,
        claims=claims,
        panels={f"log10 of the {title}": x for title, x in panels.items()},
        x_label="log10 of the samples",
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main(
        "pg_variance_reduction", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
