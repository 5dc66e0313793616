"""B-LoRA finds the rank and the bits that a regression needs.

The target is a linear map of rank 2 (12 inputs, 16 outputs), the adapter has rank 8 and up to 16
bits, its base is zero; the penalty counts the quantisers of A, E and B. The stronger it is, the
fewer rank components and bits should be left, down to the true rank with R² above 0.95. Rank gates
are summed, not averaged, in the penalty, and start at a logit of 2; how many are left where they
are averaged, or start at the released code's 6, is measured as well, and what a penalty does that
is too strong. Exits with 1 if this is not what comes out.

Source: B-LoRA ("Bayesian-LoRA"), 2024, arXiv:2406.13046.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import quantize

IN, OUT, TRUE_RANK, VARIANCE = 12, 16, 2, 2.81
PARTS = ("a", "e", "b")


@dataclasses.dataclass(frozen=True)
class Config:
    """Data, adapter and penalties."""

    samples: int = 2048
    """Inputs, standard normal."""
    rank: int = 8
    """Of the adapter."""
    steps: int = 6000
    """Of Adam."""
    batch: int = 128
    """Samples a step."""
    learning_rate: float = 1e-2
    """Of weights and gates alike."""
    strengths: tuple[float, ...] = (0.0125, 0.05, 0.125, 0.25)
    """λ, times the penalty."""
    phi_rank: float = 2.0
    """Logit at which rank gates start."""
    seeds: int = 5
    """Maps, data and starts."""
    out: pathlib.Path = pathlib.Path("runs/blora")
    """Directory for results."""
    quick: bool = False
    """Three short runs of two penalties."""


def data(key: PRNGKeyArray, samples: int) -> tuple[Array, Array]:
    """Inputs, and noiseless targets of a map with two equal singular values.

    The targets' mean variance is `VARIANCE` whatever the seed, or λ would not mean the same.
    """
    a_key, b_key, x_key = jax.random.split(key, 3)
    a, _ = jnp.linalg.qr(jax.random.normal(a_key, (IN, TRUE_RANK)))
    b, _ = jnp.linalg.qr(jax.random.normal(b_key, (OUT, TRUE_RANK)))
    x = jax.random.normal(x_key, (samples, IN))
    return x, (VARIANCE * OUT / TRUE_RANK) ** 0.5 * x @ a @ b.T


@functools.partial(jax.jit, static_argnames=("config", "reduction"))
def trained(
    config: Config,
    key: PRNGKeyArray,
    base: Array,
    strength: Array,
    phi_rank: Array,
    *,
    reduction: str,
) -> dict[str, Array]:
    """One run, and what is left after it.

    The base is an argument: as a constant of the program it is hoisted out of the loop, which some
    versions of XLA do wrongly on CPUs, so that the last lines read memory that was never written.
    """
    data_key, start_key, loop_key = jax.random.split(key, 3)
    x, y = data(data_key, config.samples)
    alpha = float(config.rank)
    params = quantize.blora_init(start_key, IN, OUT, rank=config.rank, phi_first=6.0)
    start = jnp.full(config.rank, phi_rank)
    params = params._replace(gates={**params.gates, "rank": start})
    optimizer = optax.adam(config.learning_rate)

    def loss(params: quantize.BLora, key: PRNGKeyArray) -> Array:
        index_key, gate_key = jax.random.split(key)
        rows = jax.random.randint(index_key, (config.batch,), 0, config.samples)
        found, _ = quantize.blora_apply(
            params, gate_key, x[rows], base=base, alpha=alpha, deterministic=False
        )
        penalty = quantize.blora_penalty(
            params, strength=strength, parts=PARTS, reduction=reduction
        )
        return jnp.mean(jnp.square(found - y[rows])) + penalty

    def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, None]:
        params, state = carry
        update, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, update), state), None

    keys = jax.random.split(loop_key, config.steps)
    carry = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, carry, keys)
    found, _ = quantize.blora_apply(params, None, x, base=base, alpha=alpha, deterministic=True)
    error = jnp.mean(jnp.square(found - y))
    bits = quantize.effective_bits(params)
    return {
        "mean squared error": error,
        "R²": 1 - error / jnp.var(y, axis=0).mean(),
        "rank": quantize.effective_rank(params),
        "bits of A": bits["a"],
        "bits of B": bits["b"],
    }


def run(config: Config) -> reproduction.Findings:
    """All penalties, and the two settings that prune nothing."""
    strengths = config.strengths
    seeds = config.seeds
    if config.quick:
        config = dataclasses.replace(config, steps=150, samples=256)
        strengths, seeds = (0.2, 1.0), 3
    keys = jax.random.split(jax.random.key(0), seeds)

    base = jnp.zeros((OUT, IN))

    def of(strength: float, phi: float, reduction: str) -> dict[str, np.ndarray]:
        each = [
            trained(config, key, base, jnp.float32(strength), jnp.float32(phi), reduction=reduction)
            for key in keys
        ]
        return {name: np.array([float(run[name]) for run in each]) for name in each[0]}

    settings = {
        **{f"λ={s:g}": (s, config.phi_rank, "sum") for s in strengths},
        f"λ={4 * strengths[-1]:g}": (4 * strengths[-1], config.phi_rank, "sum"),
        "rank logits from 6": (strengths[-1], 6.0, "sum"),
        "rank gates averaged": (strengths[-1], config.phi_rank, "mean"),
    }
    table = {}
    for name, setting in reproduction.track(settings.items(), "penalties"):
        table[name] = of(*setting)
    rows = [table[f"λ={s:g}"] for s in strengths]
    rank, bits_a, bits_b = (
        np.array([row[name].mean() for row in rows]) for name in ("rank", "bits of A", "bits of B")
    )
    last = rows[-1]
    claims = [
        reproduction.Claim(
            "the rank falls with λ, down to the true one on every seed",
            bool((np.diff(rank) <= 0).all() and rank[0] > rank[-1])
            and bool((last["rank"] == TRUE_RANK).all()),
            " → ".join(f"{value:.1f}" for value in rank),
        ),
        reproduction.Claim(
            "bits do not grow with λ, and end below the 16 they start from",
            bool((np.diff(bits_a) <= 0).all() and (np.diff(bits_b) <= 0).all())
            and max(bits_a[-1], bits_b[-1]) < 16,
            "A "
            + " → ".join(f"{v:.1f}" for v in bits_a)
            + ", B "
            + " → ".join(f"{v:.1f}" for v in bits_b),
        ),
        reproduction.Claim(
            "R² at the true rank on every seed",
            bool((last["R²"] > 0.95).all()),
            f"{last['R²'].mean():.3f}, least {last['R²'].min():.3f} (above 0.95)",
        ),
        reproduction.Claim(
            "measured, not claimed: rank left with 4λ, with logits from 6, with averaged gates",
            True,
            f"{table[f'λ={4 * strengths[-1]:g}']['rank'].mean():.1f}, "
            f"{table['rank logits from 6']['rank'].mean():.1f}, "
            f"{table['rank gates averaged']['rank'].mean():.1f}",
        ),
    ]
    x = np.array(strengths)
    return reproduction.Findings(
        title="B-LoRA on a map of rank 2",
        table=table,
        claims=claims,
        panels={
            name: {name: reproduction.band(x, np.stack([row[name] for row in rows], axis=1))}
            for name in ("rank", "bits of A", "bits of B", "R²")
        },
        x_label="λ",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("blora", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
