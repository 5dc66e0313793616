"""CAPO: does rejecting a few tokens keep training stable where GRPO collapses?

The tiny transformer of `shared.digits` knows a format and has few digits right. The reward is the
share of right digits, and 0 for anything malformed, so a step too far can end all reward and with
it all learning. The learning rate of plain gradient descent is swept; two passes are made over each
batch. Compared: GRPO, GRPO with a narrow clip, GRPO with a strong KL penalty, and CAPO, whose limit
on the predicted shift of the policy grows with the square of the learning rate, as the shift does.
On other seeds the lowest learning rate is found at which most runs of GRPO collapse, and there
CAPO's limit, of a list: of those that reject less than a tenth of the tokens the one with the
fewest collapsed runs, then with the highest final reward.

A run has collapsed if its final reward is below a fifth of its best. Exits 1 unless at that
learning rate most of GRPO's runs collapse and most of CAPO's do not, while it rejects below a tenth
of the tokens. Learning rates at which CAPO rejects more than half are reported: there it has
frozen.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import digits, reproduction
from pgjax import objectives


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    out: pathlib.Path = pathlib.Path("runs/capo_stability")
    """Where results go."""
    seeds: int = 8
    """Independent runs of every method and learning rate."""
    tuning_seeds: int = 4
    """Others, by which learning rate and limit are chosen."""
    steps: int = 150
    """Batches."""
    pretraining: int = 300
    """Updates on demonstrations."""
    base_rate: float = 0.03
    """Learning rate 1x, of plain gradient descent."""
    factors: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    """The sweep."""
    narrow: float = 0.05
    """Clip width of the narrow GRPO."""
    kl_coefficient: float = 1.0
    """Of the penalised GRPO."""
    limits: tuple[float, ...] = (30.0, 100.0, 300.0, 1000.0)
    """Of CAPO's predicted shift, times the square of the learning rate."""
    width: int = 32
    """Of the transformer."""
    quick: bool = False
    """A tiny version, for tests."""


def capo(limit: float) -> pg.Objective:
    """With a limit that scales: at rate 1, because the shift goes with the rate's square."""
    objective = objectives.capo(learning_rate=1.0, gain_limit=1e9, shift_limit=limit)

    def extras(rollout: pg.Rollout) -> dict[str, Array]:
        assert rollout.advantages is not None
        given = rollout.mask & (rollout.advantages != 0)[:, None]
        return {"given": given.astype(jnp.float32)}

    def rejected(outputs: pg.PolicyOutputs, rollout: pg.Rollout) -> Array:
        """Share of the batch's tokens with an advantage that are left out, at every token."""
        assert rollout.extras is not None
        given = rollout.extras["given"]
        share = jnp.sum(given * ~rollout.mask) / jnp.maximum(jnp.sum(given), 1.0)
        return jnp.broadcast_to(share, rollout.mask.shape)

    meter = pg.Regularizer("rejected", rejected, 0.0)
    return dataclasses.replace(
        objective, extras=extras, regularizers=(*objective.regularizers, meter)
    )


def collapsed(rewards: Float[np.ndarray, "*R K"]) -> Float[np.ndarray, " *R"]:
    """1 for runs that end below a fifth of their best."""
    curves = reproduction.smooth(rewards.reshape(-1, rewards.shape[-1]))
    fallen = curves[:, -1] < 0.2 * curves.max(1)
    return fallen.astype(float).reshape(rewards.shape[:-1])


def final(rewards: Float[np.ndarray, "*R K"]) -> Float[np.ndarray, " *R"]:
    return rewards[..., -10:].mean(-1)


def run(config: Config) -> reproduction.Findings:
    task = digits.Digits()
    if config.quick:
        task = dataclasses.replace(task, prompts=2, group_size=4)
        config = dataclasses.replace(
            config,
            seeds=2,
            tuning_seeds=1,
            steps=4,
            pretraining=0,
            factors=(1.0, 3.0),
            limits=(100.0,),
            width=16,
        )
    decoder = digits.make_decoder(task, width=config.width)
    rates = [factor * config.base_rate for factor in config.factors]

    def learner(objective: pg.Objective) -> digits.Curves:
        return digits.learner(
            task,
            decoder,
            objective,
            optax.sgd,
            steps=config.steps,
            pretraining=config.pretraining,
            reward=lambda formed, right: formed * right,
            num_epochs=2,
        )

    tuning = {"seeds": config.tuning_seeds, "first_seed": 1000}
    grpo = learner(objectives.grpo())
    shares = collapsed(grpo(rates=rates, **tuning, label="learning rates")["reward"]).mean(1)
    fallen = [rate for rate, share in zip(rates, shares, strict=True) if share > 0.5]
    rate = min(fallen, default=rates[int(np.argmax(shares))])

    tried: dict[float, tuple[bool, float, float]] = {}
    learners: dict[str, digits.Curves] = {"GRPO": grpo}
    for limit in config.limits:
        curves_of = learner(capo(limit))
        found = curves_of(rates=(rate,), **tuning, label=f"limit {limit:g}")
        spared = bool(found["rejected"].mean() < 0.1)
        tried[limit] = spared, -collapsed(found["reward"]).mean(), final(found["reward"]).mean()
        learners[f"CAPO {limit:g}"] = curves_of
    limit = max(tried, key=lambda x: tried[x])
    if not config.quick:
        learners["narrow clip"] = learner(objectives.grpo(low=config.narrow, high=config.narrow))
        learners["KL penalty"] = learner(objectives.grpo(kl_coefficient=config.kl_coefficient))
    curves = {
        name: curves_of(rates=rates, seeds=config.seeds, label=name)
        for name, curves_of in learners.items()
        if not name.startswith("CAPO") or name == f"CAPO {limit:g}"
    }
    table = {
        f"{name} {factor:g}x": {
            "best reward": reproduction.smooth(x["reward"][i]).max(1),
            "final reward": final(x["reward"][i]),
            "collapsed": collapsed(x["reward"][i]),
            **({"rejected": x["rejected"][i].mean(1)} if "rejected" in x else {}),
        }
        for name, x in curves.items()
        for i, factor in enumerate(config.factors)
    }
    at, chosen = f"{rate / config.base_rate:g}x", f"CAPO {limit:g}"
    theirs, ours = table[f"GRPO {at}"], table[f"{chosen} {at}"]
    frozen = [
        f"{factor:g}x"
        for factor in config.factors
        if table[f"{chosen} {factor:g}x"]["rejected"].mean() > 0.5
    ]
    claims = [
        reproduction.Claim(
            "there is a learning rate at which most runs of GRPO collapse",
            bool(theirs["collapsed"].mean() > 0.5),
            f"{theirs['collapsed'].mean():.2f} of them at {at}",
        ),
        reproduction.Claim(
            "there most of CAPO's do not",
            bool(ours["collapsed"].mean() < 0.5),
            f"{ours['collapsed'].mean():.2f} of them collapse",
        ),
        reproduction.Claim(
            "while it rejects less than a tenth of the tokens",
            bool(ours["rejected"].mean() < 0.1),
            f"{ours['rejected'].mean():.3f}",
        ),
        reproduction.Claim(
            "at no learning rate does it reject most tokens",
            not frozen,
            ", ".join(frozen) or "nowhere",
        ),
    ]
    return reproduction.Findings(
        title="Stability over learning rates",
        table=table,
        claims=claims,
        panels={
            f"reward at {factor:g}x": {
                name: reproduction.band(np.arange(config.steps), x["reward"][i])
                for name, x in curves.items()
            }
            for i, factor in enumerate(config.factors)
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "capo_stability", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
