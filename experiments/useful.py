"""What is learnt slowly, found and shown twice (USEFUL); and sharpness-aware minimisation (SAM).

A two-layer network of cubic filters, on examples with a slow feature that is always there and a
fast, larger one that is there in nine of ten. Gradient descent learns the fast one and does badly
where it is missing. USEFUL clusters the outputs after a short training, doubles the cluster of
higher loss in each class, and starts afresh; SAM takes gradients uphill of the parameters. Both
must raise the test accuracy by at least 2 points over gradient descent, and SAM's filters must
prefer the fast feature by at least 1 less at iteration 100; that they prefer it less on every data
set at iteration 10 is asked as well (arXiv 2404.17768). With gradients of all examples at once,
repeating an example is weighting it, which is how it is done here. Exits with 1 if that does not
show.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.curriculum import useful
from pgjax.optim import sam


@dataclasses.dataclass(frozen=True)
class Config:
    """Examples of three patches, and filters."""

    seeds: int = 8
    """Data sets and initialisations."""
    examples: int = 2000
    """For training, and as many for testing."""
    size: int = 50
    """Numbers of a patch."""
    slow: float = 0.4
    """Strength of the feature that is always there."""
    fast: float = 1.0
    """Strength of the one that may be missing."""
    share: float = 0.9
    """Chance of the fast feature."""
    noise: float = 0.15
    """Standard deviation of each number of a patch without a feature."""
    filters: int = 20
    """Of the network."""
    start: float = 0.1
    """Standard deviation of the first weights."""
    learning_rate: float = 0.3
    """Of gradient descent."""
    steps: int = 1000
    """Of each training."""
    separating_step: int = 60
    """After which the outputs are clustered."""
    early: tuple[int, int] = (10, 100)
    """Iterations at which filters are compared."""
    radii: tuple[float, ...] = (0.05, 0.2)
    """Distances of SAM; the last one is judged."""
    quick: bool = False
    """Two hundred steps on a tenth of the examples, for tests."""
    out: pathlib.Path = pathlib.Path("runs/useful")
    """Directory for table and plot."""


class Data(NamedTuple):
    """Patches, labels ±1, and whether the fast feature is there."""

    patches: Float[Array, "n 3 D"]
    labels: Float[Array, " n"]
    fast: Array


class Trained(NamedTuple):
    """Last weights `[D, J]`, weights after `separating_step`, the alignment gap at each step."""

    last: Array
    early: Array
    gaps: Array


def draw(config: Config, key: Array) -> Data:
    """The slow feature is the first axis, the fast one the second; noise is orthogonal to both."""
    keys = jax.random.split(key, 3)
    n = config.examples
    labels = jax.random.rademacher(keys[0], (n,), jnp.float32)
    there = jax.random.bernoulli(keys[1], config.share, (n,))
    noise = config.noise * jax.random.normal(keys[2], (n, 2, config.size))
    noise = noise.at[:, :, :2].set(0.0)
    axes = jnp.eye(config.size)[:2] * labels[:, None, None]
    fast = jnp.where(there[:, None], config.fast * axes[:, 1], noise[:, 0])
    patches = jnp.stack([config.slow * axes[:, 0], fast, noise[:, 1]], axis=1)
    return Data(patches, labels, there)


def outputs(weights: Float[Array, "D J"], patches: Float[Array, "n 3 D"]) -> Float[Array, " n"]:
    """`f(x) = Σ_j Σ_p <w_j, x_p>³`."""
    return jnp.sum((patches @ weights) ** 3, axis=(1, 2))


def logistic(weights: Array, data: Data) -> Float[Array, " n"]:
    """Each example's loss."""
    return jax.nn.softplus(-data.labels * outputs(weights, data.patches))


def gap(weights: Float[Array, "D J"]) -> Float[Array, ""]:
    """How much better the best filter fits the fast feature than one does the slow feature."""
    return weights[1].max() - weights[0].max()


@functools.partial(jax.jit, static_argnames="config")
def train(
    config: Config, weights: Array, data: Data, counts: Float[Array, " n"], radius: Array
) -> Trained:
    """Gradient descent on all examples at once, by SAM's gradient; radius 0 is the plain one."""

    def loss(w: Array, batch: Data) -> Array:
        return jnp.sum(counts * logistic(w, batch)) / jnp.sum(counts)

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        w, early = carry
        w = w - config.learning_rate * sam.sam_gradient(loss, w, data, rho=radius)
        return (w, jnp.where(index + 1 == config.separating_step, w, early)), gap(w)

    (last, early), gaps = jax.lax.scan(step, (weights, weights), jnp.arange(config.steps))
    return Trained(last, early, gaps)


def run(config: Config) -> reproduction.Findings:
    """Every method on every data set."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, steps=200, examples=200)
    table: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, list[np.ndarray]] = {}

    def note(name: str, trained: Trained, test: Data) -> None:
        right = np.asarray(outputs(trained.last, test.patches) * test.labels > 0)
        row = table.setdefault(name, {})
        missing = ~np.asarray(test.fast)
        row.setdefault("test accuracy", []).append(float(right.mean()))
        row.setdefault("without the fast feature", []).append(float(right[missing].mean()))
        for step in config.early:
            row.setdefault(f"gap at {step}", []).append(float(trained.gaps[step - 1]))
        curves.setdefault(name, []).append(np.asarray(trained.gaps))

    for seed in reproduction.track(range(config.seeds), "seeds"):
        keys = jax.random.split(jax.random.key(seed), 4)
        data, test = draw(config, keys[0]), draw(config, keys[1])
        first = config.start * jax.random.normal(keys[2], (config.size, config.filters))
        once = jnp.ones(config.examples)
        plain = train(config, first, data, once, jnp.float32(0.0))
        note("gradient descent", plain, test)
        found = outputs(plain.early, data.patches)[:, None]
        classes = (data.labels > 0).astype(jnp.int32)
        losses = logistic(plain.early, data)
        slow = np.asarray(useful.slow_cluster_mask(keys[3], found, classes, losses, n_classes=2))
        counts = np.bincount(useful.upsample_indices(slow), minlength=config.examples)
        again = train(config, first, data, jnp.asarray(counts, jnp.float32), jnp.float32(0.0))
        note("USEFUL", again, test)
        missing = ~np.asarray(data.fast)
        hits = float(np.sum(slow & missing))
        row = table["USEFUL"]
        row.setdefault("precision of the cluster", []).append(hits / max(slow.sum(), 1))
        row.setdefault("recall", []).append(hits / max(missing.sum(), 1))
        for radius in config.radii:
            note(f"SAM {radius:g}", train(config, first, data, once, jnp.float32(radius)), test)

    arrays = {
        name: {column: np.array(x) for column, x in row.items()} for name, row in table.items()
    }
    base = arrays["gradient descent"]
    judged = f"SAM {config.radii[-1]:g}"
    before, after = (
        base[f"gap at {step}"] - arrays[judged][f"gap at {step}"] for step in config.early
    )
    claims = [
        reproduction.above(
            f"{name}: test accuracy above gradient descent's",
            arrays[name]["test accuracy"] - base["test accuracy"],
            0.02,
            format="+.4f",
        )
        for name in ("USEFUL", judged)
    ]
    claims += [
        reproduction.Claim(
            f"{judged}: prefers the fast feature less at iteration {config.early[0]}",
            bool(np.all(before > 0)),
            f"{before.mean():.3f}, on {int(np.sum(before > 0))} of {config.seeds} data sets",
        ),
        reproduction.above(
            f"{judged}: prefers the fast feature less at iteration {config.early[1]}", after, 1.0
        ),
    ]
    steps = np.arange(1, config.steps + 1)
    return reproduction.Findings(
        title="A fast feature that may be missing",
        table=arrays,
        claims=claims,
        panels={
            "alignment with the fast feature less that with the slow one": {
                name: reproduction.band(steps, np.stack(x)) for name, x in curves.items()
            }
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("useful", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
