"""Batches that grow with what sample gradients disagree on, and how few updates that takes.

Logistic regression with noisy labels, a budget of samples: AdaGrad-Norm with constant batches of 8,
256 and all samples, and with batches by the norm test (AdAdaGrad-Norm; also AdaGrad by the norm
test and by the coordinate-wise test). The adaptive run must end within 5 times the smallest gap
with fewer than a hundredth of the updates of batches of 8, its batches never shrinking. Exits with
1 if that does not show.

Source: AdAdaGrad, 2024, arXiv 2402.11215.
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
import scipy.optimize
from jaxtyping import Array, Float, Int

from experiments.shared import reproduction
from pgjax.curriculum import batch_size as growth
from pgjax.optim import per_sample
from pgjax.optim.adagrad import adagrad_norm

Test = Callable[[per_sample.PerSampleMoments], Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """The regression and what is spent on it."""

    samples: int = 4000
    """Of the data, and the largest batch."""
    features: int = 20
    """Standard normal."""
    budget: int = 200_000
    """Sample gradients of a run."""
    first: int = 8
    """Batch that adaptive runs start with; all their batches are multiples of it."""
    constant: tuple[int, ...] = (8, 256, 4000)
    """Batches of the other runs, the smallest first."""
    eta: float = 0.5
    """Of the tests."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates to choose from, by the gap on another seed's data."""
    seeds: int = 5
    """Data sets."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/adaptive_batch")
    """Directory for table and plot."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer of a learning rate, a first batch, and a test that makes it grow."""

    optimizer: Callable[[float], optax.GradientTransformation]
    first: int
    test: Test | None = None


def adagrad(rate: float) -> optax.GradientTransformation:
    return optax.adagrad(rate, initial_accumulator_value=0.0, eps=1e-10)


def methods(config: Config) -> dict[str, Method]:
    norm = functools.partial(growth.norm_test, eta=config.eta)
    by_coordinate = functools.partial(growth.coordinate_test, eta=config.eta, quantile=0.9)
    return {
        **{f"constant {size}": Method(adagrad_norm, size) for size in config.constant},
        "AdAdaGrad-Norm": Method(adagrad_norm, config.first, norm),
        "AdAdaGrad": Method(adagrad, config.first, norm),
        "AdAdaGrad, by coordinate": Method(adagrad, config.first, by_coordinate),
    }


@dataclasses.dataclass(frozen=True)
class Problem:
    """Features, labels of ±1, and the least loss."""

    x: Float[np.ndarray, "N D"]
    y: Float[np.ndarray, " N"]
    least: float


def problem(config: Config, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(config.samples, config.features))
    chance = 1 / (1 + np.exp(-x @ rng.normal(size=config.features)))
    y = np.where(rng.random(config.samples) < chance, 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = y * (x @ w)
        slope = -y / (1 + np.exp(margin))
        return float(np.logaddexp(0, -margin).mean()), slope @ x / len(y)

    best = scipy.optimize.minimize(
        loss, np.zeros(config.features), jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    return Problem(x.astype(np.float32), y.astype(np.float32), loss(best.x)[0])


def sample_loss(w: Array, sample: tuple[Array, Array]) -> Array:
    x, y = sample
    return jax.nn.softplus(-y * (x @ w))


@functools.partial(jax.jit, static_argnames=("optimizer", "number"))
def constant_steps(
    optimizer: Any, rate: Array, data: Any, key: Array, *, number: int, rows: Int[Array, " b"]
) -> Array:
    """The parameters after so many updates with batches of one size, drawn with replacement."""
    transform = optax.chain(optimizer(1.0), optax.scale(rate))

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        w, state = carry
        chosen = jax.random.randint(key, rows.shape, 0, data[0].shape[0])
        batch = jax.tree.map(lambda z: z[chosen], data)
        gradient = jax.grad(lambda w: jnp.mean(jax.vmap(sample_loss, (None, 0))(w, batch)))(w)
        update, state = transform.update(gradient, state, w)
        return (optax.apply_updates(w, update), state), None

    w = jnp.zeros(data[0].shape[1])
    return jax.lax.scan(step, (w, transform.init(w)), jax.random.split(key, number))[0][0]


@functools.partial(jax.jit, static_argnames=("optimizer", "micro"))
def adaptive_step(
    optimizer: Any,
    rate: Array,
    data: Any,
    w: Array,
    state: Any,
    key: Array,
    batch: Array,
    *,
    micro: int,
) -> tuple[Array, Any, per_sample.PerSampleMoments]:
    """One update with a batch of any multiple of `micro`, and its moments: one program for all."""
    transform = optax.chain(optimizer(1.0), optax.scale(rate))

    def moments(index: Array) -> per_sample.PerSampleMoments:
        chosen = jax.random.randint(jax.random.fold_in(key, index), (micro,), 0, data[0].shape[0])
        rows = jax.tree.map(lambda z: z[chosen], data)
        gradients = per_sample.per_sample_grads(sample_loss, w, rows)
        return per_sample.per_sample_moments(gradients)

    found = growth.accumulate_moments(moments, batch // micro)
    update, state = transform.update(found.mean, state, w)
    return optax.apply_updates(w, update), state, found


def learn(
    config: Config, method: Method, rate: float, task: Problem, seed: int
) -> tuple[float, list[int]]:
    """The gap at the end of the budget, and the batch of every update."""
    data, key = (jnp.asarray(task.x), jnp.asarray(task.y)), jax.random.key(seed)
    if method.test is None:
        number = config.budget // method.first
        w = constant_steps(
            method.optimizer,
            rate,
            data,
            key,
            number=number,
            rows=jnp.zeros(method.first, jnp.int32),
        )
        batches = [method.first] * number
    else:
        w = jnp.zeros(config.features)
        state = optax.chain(method.optimizer(1.0), optax.scale(rate)).init(w)
        batches, size, spent = [], method.first, 0
        while spent + size <= config.budget:
            now = jax.random.fold_in(key, len(batches))
            w, state, moments = adaptive_step(
                method.optimizer, rate, data, w, state, now, size, micro=config.first
            )
            batches.append(size)
            spent += size
            size = growth.next_batch_size(
                size, method.test(moments), maximum=config.samples, multiple=config.first
            )
    loss = np.logaddexp(0, -np.asarray(task.y, float) * (task.x @ np.asarray(w, float))).mean()
    return float(loss) - task.least, batches


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config,
            samples=320,
            features=5,
            constant=(8, 32, 320),
            budget=8_000,
            rates=(0.3, 1.0),
            seeds=3,
        )
    if config.samples % config.first:
        raise ValueError(f"samples: expected a multiple of {config.first}, got {config.samples}")
    tuning = problem(config, 10_000)
    tasks = [problem(config, seed) for seed in range(config.seeds)]
    table: dict[str, dict[str, Any]] = {}
    paths: dict[str, list[list[int]]] = {}
    for name, method in reproduction.track(methods(config).items()):
        ends = [learn(config, method, rate, tuning, 10_000)[0] for rate in config.rates]
        best = config.rates[int(np.nanargmin(ends))]
        runs = [learn(config, method, best, task, seed) for seed, task in enumerate(tasks)]
        paths[name] = [batches for _, batches in runs]
        table[name] = {
            "rate": np.full(config.seeds, best),
            "gap ×1e4": 1e4 * np.array([gap for gap, _ in runs]),
            "updates": np.array([len(batches) for batches in paths[name]]),
            "last batch": np.array([batches[-1] for batches in paths[name]]),
        }
    gaps = {name: row["gap ×1e4"].mean() for name, row in table.items()}
    updates = {name: row["updates"].mean() for name, row in table.items()}
    ours, smallest = "AdAdaGrad-Norm", f"constant {config.constant[0]}"
    best = min(gaps.values())
    growing = all(np.all(np.diff(b) >= 0) for name in paths if "Ada" in name for b in paths[name])
    claims = [
        reproduction.Claim(
            "AdAdaGrad-Norm ends within 5 times the smallest gap",
            bool(gaps[ours] <= 5 * best),
            f"{1e-4 * gaps[ours]:.2e} against {1e-4 * best:.2e}",
        ),
        reproduction.Claim(
            f"with fewer than a hundredth of the updates of batches of {config.constant[0]}",
            bool(updates[ours] < updates[smallest] / 100),
            f"{updates[ours]:.0f} against {updates[smallest]:.0f}",
        ),
        reproduction.Claim("no batch is smaller than the one before", growing, str(growing)),
    ]
    panels: dict[str, dict[str, Any]] = {"log10 of the batch, first data set": {}}
    for name, runs_of in paths.items():
        sizes = np.array(runs_of[0])
        panels["log10 of the batch, first data set"][name] = (np.cumsum(sizes), np.log10(sizes))
    return reproduction.Findings(
        title=f"After {config.budget} sample gradients",
        table=table,
        claims=claims,
        panels=panels,
        x_label="samples",
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main(
        "adaptive_batch", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
