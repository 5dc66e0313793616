"""Channel scales from fine-tuning's updates, beside those from activations, on small networks.

A three-layer network learns a procedural task (the labels of a random teacher, whose inputs have
unequal sizes), is then tuned by REINFORCE to a teacher that has moved, and stored in bfloat16, in
which about half of the weights have not moved at all. It is quantised to 3 bits in groups of 16:
by plain rounding, and with channels scaled by powers of AWQ's activations, of QuantLRM's
importance, and of that importance in random order. What is claimed is that the importance is what
its formula says, and that the searched scales are never worse than plain rounding on the
calibration inputs; which importance serves held-out accuracy best is measured and reported. The
paper's gain is one of billion-parameter reasoning models. Exits with 1 if the claims do not hold.

Source: QuantLRM, 2026, arXiv:2602.02581.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import quantize

Weights = list[Array]
"""Of each layer, `[out, in]`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Task, training and quantiser."""

    inputs: int = 32
    """Features of an input."""
    hidden: int = 64
    """Width of both hidden layers."""
    classes: int = 10
    """Labels."""
    train_steps: int = 1500
    """Of Adam on labels, batches of 256."""
    tune_steps: int = 300
    """Of REINFORCE, batches of 512."""
    tune_rate: float = 3e-6
    """Adam's learning rate there; small, so that many weights stay the same in bfloat16."""
    moved: float = 0.3
    """How far the teacher moves before tuning, relative to its size."""
    bits: int = 3
    """Of the weights."""
    group: int = 16
    """Columns with one step and zero point."""
    calibration: int = 512
    """Inputs for the search."""
    test: int = 8192
    """Inputs for the accuracy."""
    seeds: int = 10
    """Tasks and networks."""
    out: pathlib.Path = pathlib.Path("runs/quantlrm")
    """Directory for results."""
    quick: bool = False
    """Three seeds of short training."""


def forward(weights: Weights, x: Float[Array, "N c"]) -> Float[Array, "N classes"]:
    """Logits; ReLU between layers."""
    for w in weights[:-1]:
        x = jax.nn.relu(x @ w.T)
    return x @ weights[-1].T


def drawn(key: PRNGKeyArray, config: Config, scale: float = 1.0) -> Weights:
    """He-initialised layers."""
    sizes = (config.inputs, config.hidden, config.hidden, config.classes)
    keys = jax.random.split(key, 3)
    return [
        scale * (2 / n) ** 0.5 * jax.random.normal(k, (m, n))
        for k, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]


def examples(
    key: PRNGKeyArray, spread: Float[Array, " c"], teacher: Weights, count: int
) -> tuple[Float[Array, "N c"], Int[Array, " N"]]:
    """Inputs whose features have the given standard deviations, and the teacher's labels."""
    x = spread * jax.random.normal(key, (count, spread.shape[0]))
    return x, jnp.argmax(forward(teacher, x), axis=-1)


@functools.partial(jax.jit, static_argnames="config")
def networks(key: PRNGKeyArray, config: Config) -> tuple[Weights, Weights, dict[str, Any]]:
    """Weights before and after tuning, as stored, and data of the tuned task."""
    keys = jax.random.split(key, 8)
    spread = jnp.exp(0.7 * jax.random.normal(keys[0], (config.inputs,)))
    teacher = drawn(keys[1], config)
    later = [a + b for a, b in zip(teacher, drawn(keys[2], config, config.moved), strict=True)]

    def fitted(weights: Weights, loss: Any, key: PRNGKeyArray, steps: int, rate: float) -> Weights:
        optimizer = optax.adam(rate)

        def step(carry: Any, key: PRNGKeyArray) -> Any:
            weights, state = carry
            update, state = optimizer.update(jax.grad(loss)(weights, key), state)
            return (optax.apply_updates(weights, update), state), None

        carry = (weights, optimizer.init(weights))
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]

    def supervised(weights: Weights, key: PRNGKeyArray) -> Array:
        x, labels = examples(key, spread, teacher, 256)
        return optax.softmax_cross_entropy_with_integer_labels(forward(weights, x), labels).mean()

    def reinforce(weights: Weights, key: PRNGKeyArray) -> Array:
        data_key, action_key = jax.random.split(key)
        x, labels = examples(data_key, spread, later, 512)
        logits = forward(weights, x)
        actions = jax.random.categorical(action_key, logits)
        rewards = (actions == labels).astype(jnp.float32)
        logprobs = -optax.softmax_cross_entropy_with_integer_labels(logits, actions)
        return -jnp.mean((rewards - rewards.mean()) * logprobs)

    def stored(weights: Weights) -> Weights:
        return [w.astype(jnp.bfloat16).astype(jnp.float32) for w in weights]

    base = stored(fitted(drawn(keys[3], config), supervised, keys[4], config.train_steps, 2e-3))
    tuned = stored(fitted(base, reinforce, keys[5], config.tune_steps, config.tune_rate))
    data = {
        "calibration": examples(keys[6], spread, later, config.calibration)[0],
        "test": examples(keys[7], spread, later, config.test),
    }
    return base, tuned, data


def quantized(
    weights: Weights, x: Float[Array, "N c"], importances: list[Array] | None, config: Config
) -> tuple[Weights, list[float]]:
    """Layers as their codes stand for; each one's output error on x over plain rounding's."""
    found, ratios = [], []
    for index, w in enumerate(weights):
        scale = jnp.ones(w.shape[1])
        if importances is not None:
            search = quantize.awq_search(
                w, x, importances[index], bits=config.bits, group=config.group
            )
            scale = search.scale
            ratios.append(float(search.error / search.errors[0]))
        grid = quantize.uniform_grid(w * scale, bits=config.bits, group_size=config.group)
        found.append(quantize.fake_quant(w * scale, *grid, bits=config.bits) / scale)
        x = jax.nn.relu(x @ w.T)
    return found, ratios or [1.0] * len(weights)


def run(config: Config) -> reproduction.Findings:
    """All importances on all networks."""
    if config.quick:
        config = dataclasses.replace(
            config, seeds=3, train_steps=100, tune_steps=30, hidden=32, test=1024
        )
    table: dict[str, dict[str, list[float]]] = {}
    still: list[float] = []
    correlations: list[float] = []
    for seed in reproduction.track(range(config.seeds), "networks"):
        base, tuned, data = networks(jax.random.key(seed), config)
        x, (test_x, labels) = data["calibration"], data["test"]
        deltas = quantize.update_sizes(base, tuned)
        stats = quantize.update_stats(deltas)
        still.append(float(np.mean(np.concatenate([np.ravel(d == 0) for d in deltas]))))
        signal = [quantize.channel_importance(d, stats) for d in deltas]
        inputs = [x]
        for w in tuned[:-1]:
            inputs.append(jax.nn.relu(inputs[-1] @ w.T))
        sizes = [quantize.activation_importance(v) for v in inputs]
        rng = np.random.default_rng(seed)
        correlations.append(float(np.corrcoef(sizes[0], signal[0])[0, 1]))
        importances: dict[str, list[Array] | None] = {
            "plain rounding": None,
            "activations (AWQ)": sizes,
            "fine-tuning (QuantLRM)": signal,
            "fine-tuning, shuffled": [v[rng.permutation(len(v))] for v in signal],
        }

        def scored(weights: Weights, x: Array = test_x, labels: Array = labels) -> float:
            return float(jnp.mean(jnp.argmax(forward(weights, x), axis=-1) == labels))

        def entered(name: str, **values: float) -> None:
            row = table.setdefault(name, {})
            for column, value in values.items():
                row.setdefault(column, []).append(value)

        before = jnp.argmax(forward(tuned, test_x), axis=-1)
        none = {"mean error ratio": 0.0, "largest error ratio": 0.0, "agreement": 1.0}
        entered("not quantised", accuracy=scored(tuned), **none)
        for name, importance in importances.items():
            weights, ratios = quantized(tuned, x, importance, config)
            same = jnp.argmax(forward(weights, test_x), axis=-1) == before
            values = {
                "mean error ratio": float(np.mean(ratios)),
                "largest error ratio": max(ratios),
                "agreement": float(jnp.mean(same)),
            }
            entered(name, accuracy=scored(weights), **values)
    rows = {n: {c: np.array(v) for c, v in row.items()} for n, row in table.items()}
    scaled = [name for name in rows if name not in ("not quantised", "plain rounding")]
    worst = max(float(rows[name]["largest error ratio"].max()) for name in scaled)
    gains = {name: rows[name]["accuracy"] - rows["plain rounding"]["accuracy"] for name in scaled}
    claims = [
        reproduction.Claim(
            "between 30% and 70% of the weights are the same after tuning, on every seed",
            min(still) >= 0.3 and max(still) <= 0.7,
            f"{min(still):.0%} to {max(still):.0%}",
        ),
        reproduction.Claim(
            "no scaled layer is worse than plain rounding on the calibration inputs",
            worst <= 1.0,
            f"largest error ratio {worst:.3f}",
        ),
        reproduction.Claim(
            "measured, not claimed: held-out accuracy over plain rounding's",
            True,
            ", ".join(f"{name} {reproduction.with_error(gain)}" for name, gain in gains.items()),
        ),
        reproduction.Claim(
            "measured, not claimed: correlation of the two importances in the first layer",
            True,
            f"{np.mean(correlations):+.2f}",
        ),
    ]
    seeds = np.arange(config.seeds)
    return reproduction.Findings(
        title=f"{config.bits} bits, groups of {config.group}",
        table=rows,
        claims=claims,
        panels={
            "held-out accuracy": {name: (seeds, row["accuracy"]) for name, row in rows.items()},
            "output error / plain rounding's": {
                name: (seeds, rows[name]["mean error ratio"]) for name in scaled
            },
        },
        x_label="seed",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("quantlrm", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
