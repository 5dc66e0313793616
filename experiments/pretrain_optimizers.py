"""Four optimizer stacks pre-train a small language model, each at the best of as many rates.

The text is there on every machine: the bytes of Python's own library, every tenth module held out.
AdamW, Muon, PolarGrad and the symmetry-compatible stack differ in who trains the matrices inside
the layers and who trains embedding and head, the two tables:

    AdamW       AdamW on all
    Muon        Muon on matrices, AdamW on tables
    PolarGrad   Muon on matrices, PolarGrad with momentum 0.5 on tables (arXiv 2505.21799)
    symmetry    Muon, head by head in attention, and row-normalised tables (arXiv 2605.18106)

Vectors have AdamW throughout. The rates, one for matrices and one for tables, come from grids of
equal size and are chosen on a seed of its own; a best rate at the edge of its grid is said.
The result is in bits per held-out byte; judged is whether each of the others ends below AdamW.
Exits with 1 if one does not.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

import pgjax as pg
from experiments.shared import reproduction
from experiments.shared.descent import descend
from experiments.shared.optimizers import falling
from pgjax.optim import oracles

Rates = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of model and text, and the rates that are tried."""

    seeds: int = 3
    """starts and orders of text; one more chooses the rates"""
    steps: int = 300
    """updates; rates are constant, then fall to zero over the last 40%"""
    batch: int = 16
    """rows of an update"""
    length: int = 128
    """bytes of a row"""
    width: int = 128
    """of the residual stream; the MLP is four times as wide"""
    layers: int = 4
    """of the decoder"""
    heads: int = 4
    """of attention"""
    vector_rate: float = 3e-3
    """of AdamW on norms"""
    adamw: tuple[Rates, Rates] = ((1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2))
    """rates of AdamW: for matrices, for tables"""
    muon: tuple[Rates, Rates] = ((3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2))
    """of Muon in Moonshot's scaling, and of AdamW for tables"""
    polar_grad: tuple[Rates, Rates] = ((3e-3, 1e-2, 3e-2), (0.1, 1.0, 10.0))
    """of Muon, and of PolarGrad for tables"""
    symmetry: tuple[Rates, Rates] = ((1e-2, 3e-2, 1e-1), (0.1, 0.3, 1.0))
    """of Muon, and of the embedding; the head has a hundredth, as published"""
    quick: bool = False
    """four updates of a tiny model at one pair of rates, to see that it runs"""
    out: str = "results/pretrain_optimizers"
    """directory for table, plot and numbers"""


Make = Callable[[Any, Any, Any], optax.GradientTransformation]


def adam(rate: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)


def with_tables(matrices: Any, tables: Any, vectors: Any) -> optax.GradientTransformation:
    """Transformations by role; matrices are all that belong to attention or MLP."""
    return pg.optim.by_role(
        {
            "attention/*": matrices,
            "mlp/*": matrices,
            "embedding": tables,
            "head": tables,
            "*": vectors,
        }
    )


def moonshot(rate: Any) -> optax.GradientTransformation:
    scaled = pg.optim.scale_by_muon(kind="heavy_ball_nesterov", shape="moonshot")
    return optax.chain(scaled, optax.scale_by_learning_rate(rate))


def polar_tables(rate: Any) -> optax.GradientTransformation:
    return pg.optim.polar_grad(rate, beta=0.5, oracle=oracles.polar("polar_express"))


STACKS: dict[str, tuple[str, Make]] = {
    "AdamW": ("adamw", lambda m, t, v: with_tables(adam(m), adam(t), adam(v))),
    "Muon": ("muon", lambda m, t, v: with_tables(moonshot(m), adam(t), adam(v))),
    "PolarGrad": ("polar_grad", lambda m, t, v: with_tables(moonshot(m), polar_tables(t), adam(v))),
    "symmetry": (
        "symmetry",
        lambda m, t, v: pg.optim.symmetry_stack(
            pg.optim.Rates(embedding=t, head=lambda count: 0.01 * t(count), matrices=m, vectors=v),
            weight_decay=0.0,
        ),
    ),
}


def text() -> tuple[UInt8[np.ndarray, " N"], UInt8[np.ndarray, " M"]]:
    """Bytes to learn from and bytes held out, of the modules of Python's library."""
    modules = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(modules) < 20:
        raise ValueError(f"text: expected Python's library in source, got {len(modules)} modules")
    held = [path.read_bytes() for path in modules[::10]]
    kept = [path.read_bytes() for k, path in enumerate(modules) if k % 10]
    return (
        np.frombuffer(b"\n".join(kept), np.uint8),
        np.frombuffer(b"\n".join(held), np.uint8),
    )


def decoder_of(config: Config) -> pg.models.FunctionalDecoder:
    size = pg.models.DecoderConfig(
        vocab_size=256,
        hidden_size=config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.heads,
        mlp_size=4 * config.width,
        tied_embeddings=False,
        max_length=config.length,
        remat=None,
    )
    return pg.models.init(size, jax.random.key(0))[0]


def windows(data: Array, starts: Array, length: int) -> pg.Rollout:
    """Rows of text from these places on; every byte but a row's first is predicted."""
    tokens = data[starts[:, None] + jnp.arange(length)].astype(jnp.int32)
    rows = len(starts)
    return pg.Rollout(
        tokens=tokens,
        mask=jnp.broadcast_to(jnp.arange(length) > 0, tokens.shape),
        behavior_logprobs=jnp.zeros(tokens.shape),
        rewards=jnp.zeros(rows),
        group_ids=jnp.arange(rows),
    )


def trainer(config: Config, make: Make, every: int) -> Callable[..., Float[Array, " K"]]:
    """A compiled `(rates [2], seed) -> held-out bits per byte`, before and after each `every`."""
    decoder = decoder_of(config)
    outputs = pg.train.language_model_outputs(decoder)
    kept, held = (jnp.asarray(part) for part in text())
    test = windows(held, jnp.linspace(0, len(held) - config.length, 64).astype(int), config.length)

    def bits(params: Any, rows: pg.Rollout) -> Float[Array, ""]:
        logprobs = outputs(params, rows, frozenset()).logprobs
        return -pg.aggregate.token_mean(logprobs, rows.mask) / jnp.log(2.0)

    @jax.jit
    def train(rates: Float[Array, 2], seed: Array) -> Float[Array, " K"]:
        first, order = jax.random.split(jax.random.key(seed))
        params = {"decoder": pg.models.init(decoder.config, first)[1]}
        peaks = (rates[0], rates[1], config.vector_rate)
        transform = make(*(falling(peak, config.steps) for peak in peaks))

        def gradient(params: Any, key: Array) -> Any:
            starts = jax.random.randint(key, (config.batch,), 0, len(kept) - config.length)
            return jax.grad(bits)(params, windows(kept, starts, config.length))

        keys = jax.random.split(order, config.steps)
        return descend(gradient, transform, params, keys, lambda p: bits(p, test), every)

    return train


def run(config: Config) -> reproduction.Findings:
    """Chooses each stack's rates, then trains it from every seed."""
    if config.quick:
        one = ((1e-2,), (1e-2,))
        config = dataclasses.replace(
            config, seeds=2, steps=4, batch=2, length=16, width=16, layers=1, heads=2,
            adamw=one, muon=one, polar_grad=one, symmetry=one,
        )  # fmt: skip
    if config.seeds < 2:
        raise ValueError(f"seeds: expected at least 2, got {config.seeds}")
    every = max(1, config.steps // 15)
    if config.steps % every:
        raise ValueError(f"steps: expected a multiple of {every}, got {config.steps}")
    grids = {name: getattr(config, field) for name, (field, _) in STACKS.items()}
    if len({len(m) * len(t) for m, t in grids.values()}) > 1:
        raise ValueError(f"rates: expected grids of one size, got {grids}")

    table, curves = {}, {}
    for name, (_, make) in reproduction.track(STACKS.items(), "stacks"):
        train = trainer(config, make, every)
        pairs = list(itertools.product(*grids[name]))
        at = functools.partial(train, seed=jnp.int32(1000))
        ends = [float(at(jnp.array(pair))[-1]) for pair in pairs]
        best = pairs[int(np.nanargmin(ends))]
        seen = np.stack([train(jnp.array(best), jnp.int32(s)) for s in range(config.seeds)])
        edge = [
            sum(rate in (grid[0], grid[-1]) for rate, grid in zip(best, grids[name], strict=True))
        ]
        table[name] = {
            "bits per byte": seen[:, -1],
            "halfway": seen[:, seen.shape[1] // 2],
            "rate of matrices": np.array([best[0]]),
            "rate of tables": np.array([best[1]]),
            "of them at an edge": np.array(edge),
            "worst of the grid": np.array([np.nanmax(ends)]),
        }
        curves[name] = reproduction.band(every * np.arange(seen.shape[1]), seen)
    first = table["AdamW"]["bits per byte"]
    claims = []
    for name in list(STACKS)[1:]:
        ended = table[name]["bits per byte"]
        claims.append(reproduction.ahead(f"{name} ends below AdamW, bits", first, ended))
    return reproduction.Findings(
        title="Bits per held-out byte of Python's library",
        table=table,
        claims=claims,
        panels={"bits per held-out byte": curves},
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "pretrain_optimizers", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
