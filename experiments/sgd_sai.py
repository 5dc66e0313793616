"""Steps scaled once, by the first gradient (SGD-SaI), beside AdamW and momentum SGD.

A small network learns (a + b) mod 23. Judged is the mechanism: the scale of every tensor is
`√((d - 1) / (1 - ρ))`, near the root of its size; the optimizer's memory is half of AdamW's, in
bytes; and at the best of five learning rates each, the loss ends at no more than 3 times AdamW's.
Whether it beats tuned momentum SGD is shown and not judged (arXiv 2412.11768, whose parity with
AdamW is claimed for vision transformers and GPT-2). Exits with 1 if that does not show.
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
from jaxtyping import Array, Float, Int

from experiments.shared import reproduction
from pgjax.models import functional
from pgjax.optim import sai

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sums modulo a prime, and learning rates."""

    seeds: int = 3
    """Initialisations and orders of batches."""
    modulus: int = 23
    """All pairs of numbers below it are examples."""
    width: int = 128
    """Of embedding and hidden layer."""
    batch: int = 128
    """Pairs of an update."""
    steps: int = 1500
    """Updates."""
    weight_decay: float = 0.0
    """Decoupled, of all three; above 0 it holds each one's loss at another floor."""
    adam_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates of AdamW."""
    sgd_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates of momentum SGD."""
    sai_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates of SGD-SaI."""
    quick: bool = False
    """Thirty updates at two learning rates, for tests."""
    out: pathlib.Path = pathlib.Path("runs/sgd_sai")
    """Directory for table and plot."""


def init(config: Config, key: Array) -> Params:
    """Embedding, gain of a norm, one hidden layer, head."""
    keys = jax.random.split(key, 3)
    scale = config.width**-0.5
    return {
        "embedding": jax.random.normal(keys[0], (config.modulus, config.width)),
        "gain": jnp.ones(config.width),
        "weight": scale * jax.random.normal(keys[1], (config.width, config.width)),
        "bias": jnp.zeros(config.width),
        "head": scale * jax.random.normal(keys[2], (config.width, config.modulus)),
    }


def loss(config: Config, params: Params, pairs: Int[Array, "B 2"]) -> Float[Array, ""]:
    """Mean cross-entropy of the sum modulo `modulus`."""
    summed = params["embedding"][pairs].sum(1)
    hidden = functional.rms_norm(summed, params["gain"], epsilon=1e-6)
    hidden = jax.nn.gelu(hidden @ params["weight"] + params["bias"])
    each = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ params["head"], pairs.sum(1) % config.modulus
    )
    return jnp.mean(each)


def train(
    config: Config, make: Callable[[Any], optax.GradientTransformation]
) -> Callable[[Array, Array], Float[Array, " K"]]:
    """Loss of all pairs, 31 times during a run, from a learning rate and a seed."""
    side = jnp.arange(config.modulus)
    pairs = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    chunks = min(30, config.steps)

    def run(rate: Array, seed: Array) -> Array:
        start, order = jax.random.split(jax.random.key(seed))
        params = init(config, start)
        optimizer = make(rate)

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            params, state = carry
            chosen = jax.random.randint(key, (config.batch,), 0, len(pairs))
            gradient = jax.grad(lambda p: loss(config, p, pairs[chosen]))(params)
            update, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, update), state), None

        def chunk(carry: Any, key: Array) -> tuple[Any, Array]:
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, config.steps // chunks))
            return carry, loss(config, carry[0], pairs)

        first = (params, optimizer.init(params))
        _, curve = jax.lax.scan(chunk, first, jax.random.split(order, chunks))
        return jnp.concatenate([loss(config, params, pairs)[None], curve])

    return run


def scales(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Of each tensor and seed: gSNR, what the identity gives, and the root of the size."""
    side = jnp.arange(config.modulus)
    pairs = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(config.seeds):
        params = init(config, jax.random.key(seed))
        for name, g in jax.grad(lambda p: loss(config, p, pairs))(params).items():
            wide = np.asarray(g, np.float64)
            rho = wide.size * wide.mean() ** 2 / np.sum(wide**2)
            row = found.setdefault(name, {})
            row.setdefault("gSNR", []).append(float(sai.gradient_snr(g)))
            row.setdefault("identity", []).append(((wide.size - 1) / (1 - rho)) ** 0.5)
            row.setdefault("root of size", []).append(wide.size**0.5)
    return {name: {c: np.array(x) for c, x in row.items()} for name, row in found.items()}


def state_bytes(optimizer: optax.GradientTransformation, params: Params) -> int:
    """Of the optimizer's state."""
    return sum(x.nbytes for x in jax.tree.leaves(optimizer.init(params)))


def run(config: Config) -> reproduction.Findings:
    """Scales, memory, and the sweep of learning rates."""
    if config.quick:
        config = dataclasses.replace(
            config,
            width=32,
            batch=32,
            steps=30,
            adam_rates=(1e-3, 1e-2),
            sgd_rates=(0.3, 1.0),
            sai_rates=(1e-2, 3e-2),
        )
    decay = config.weight_decay
    optimizers: dict[str, tuple[tuple[float, ...], Callable[[Any], Any]]] = {
        "AdamW": (config.adam_rates, lambda r: optax.adamw(r, weight_decay=decay)),
        "momentum SGD": (
            config.sgd_rates,
            lambda r: optax.chain(
                optax.ema(0.9, debias=False),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(r),
            ),
        ),
        "SGD-SaI": (config.sai_rates, lambda r: sai.sgd_sai(r, weight_decay=decay)),
    }
    table: dict[str, dict[str, np.ndarray]] = {}
    panels: dict[str, dict[str, Any]] = {}
    best: dict[str, tuple[float, float]] = {}
    for name, (rates, make) in reproduction.track(optimizers.items()):
        each = jax.jit(jax.vmap(train(config, make), in_axes=(None, 0)))
        curves = [np.asarray(each(jnp.float32(r), np.arange(config.seeds))) for r in rates]
        panels[f"loss: {name}"] = {
            f"{r:g}": reproduction.band(np.linspace(0, config.steps, c.shape[1]), c)
            for r, c in zip(rates, curves, strict=True)
        }
        for rate, curve in zip(rates, curves, strict=True):
            table[f"{name} {rate:g}"] = {"last loss, x 1000": 1000 * curve[:, -1]}
        last = [float(np.nan_to_num(c[:, -1], nan=np.inf).mean()) for c in curves]
        best[name] = (min(last), rates[int(np.argmin(last))])
    found = scales(config)
    table |= {f"gSNR of {name}": row for name, row in found.items()}
    off = max(float(np.max(np.abs(r["gSNR"] / r["identity"] - 1))) for r in found.values())
    params = init(config, jax.random.key(0))
    weights = sum(x.nbytes for x in params.values())
    memory = {name: state_bytes(make(0.1), params) for name, (_, make) in optimizers.items()}
    ratio = best["SGD-SaI"][0] / best["AdamW"][0]
    claims = [
        reproduction.Claim(
            "gSNR is √((d - 1) / (1 - ρ))", off < 1e-4, f"largest relative error {off:.1e}"
        ),
        reproduction.Claim(
            "its memory is half of AdamW's",
            memory["SGD-SaI"] / memory["AdamW"] < 0.505,
            f"{memory['SGD-SaI']} bytes against {memory['AdamW']}, parameters {weights}",
        ),
        reproduction.Claim(
            "at its best learning rate it ends within 3 times AdamW's loss",
            ratio <= 3,
            f"{ratio:.2f} times ("
            + ", ".join(f"{name} {x:.1e} at {rate:g}" for name, (x, rate) in best.items())
            + ")",
        ),
    ]
    return reproduction.Findings(
        title=f"(a + b) mod {config.modulus}", table=table, claims=claims, panels=panels
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("sgd_sai", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
