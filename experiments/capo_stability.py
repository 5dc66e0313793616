"""CAPO: does rejecting a few tokens keep training stable where GRPO collapses?

A tiny transformer (`experiments.shared.digits`) has read demonstrations of a format and answers
with digits; the reward is the share of right digits, and 0 for whatever is malformed, so that a
step too far ends all reward and with it all learning. The learning rate of Adam is swept, from a
safe one to 30 times that; batches are small, and two passes are made over each. (A linear policy
under plain gradient descent never collapses in such a sweep, so that nothing can be saved there.)

Compared: GRPO, GRPO with a narrow clip, GRPO with a strong KL penalty, and CAPO, which predicts
Adam's step for every token, with limits that grow with the step (the gain's in proportion, the
shift's with its square) and with the same limits everywhere. Each limit is what 95% of the tokens
keep in free runs at 1x from seeds of their own; nothing is chosen by how CAPO does.

A run has collapsed if its final reward is below 20% of its best. Exits 1 unless at some learning
rate most of GRPO's runs collapse and most of scaled CAPO's do not while it rejects below 10% of the
tokens, and if scaled CAPO anywhere rejects more than half of them: there it has frozen.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import digits, reproduction
from pgjax import objectives
from pgjax.masks import curvature

SCALED, FIXED = "CAPO, scaled", "CAPO, fixed"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    out: pathlib.Path = pathlib.Path("runs/capo_stability")
    """Where results go."""
    seeds: int = 6
    """Independent runs of every method and learning rate."""
    tuning_seeds: int = 4
    """Others, by which CAPO's limits are chosen."""
    steps: int = 150
    """Batches."""
    growth: int = 10
    """Batches over which the learning rate grows; the limits are from twice as many after it."""
    epochs: int = 2
    """Passes over each batch."""
    pretraining: int = 300
    """Updates on demonstrations."""
    prompts: int = 8
    """Of a batch, with eight completions each."""
    width: int = 32
    """Of the transformer."""
    base_rate: float = 0.001
    """Learning rate 1x, of Adam."""
    factors: tuple[float, ...] = (1.0, 3.0, 6.0, 10.0, 30.0)
    """The sweep."""
    narrow: float = 0.05
    """Clip width of the narrow GRPO."""
    kl_coefficient: float = 1.0
    """Of the penalised GRPO."""
    quantile: float = 0.95
    """Share of tokens that keep each of CAPO's limits at 1x."""
    quick: bool = False
    """A tiny version, for tests."""


class Limits(NamedTuple):
    """Of CAPO: of the predicted change of the objective, and of the policy."""

    gain: float = float("inf")
    shift: float = float("inf")

    def scaled(self, factor: float) -> Limits:
        """For steps so many times as long."""
        return Limits(self.gain * factor, self.shift * factor**2)


Measure = Callable[[pg.train.TrainState, pg.Rollout], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The task and what learns it."""

    config: Config
    task: digits.Digits
    decoder: pg.models.FunctionalDecoder
    outputs: pg.train.OutputsFunction

    def capo(self, rate: float, limits: Limits) -> pg.Objective:
        """CAPO that plans the steps of the optimizer below, in its first pass over a batch."""
        return objectives.capo_adam(
            learning_rate=digits.increasing(self.config.growth, rate),
            vocab_size=self.task.vocab_size,
            hidden_size=self.config.width,
            gain_limit=limits.gain,
            shift_limit=limits.shift,
        )

    def learner(self, objective: pg.Objective, measure: Measure | None = None) -> digits.Curves:
        config = self.config
        return digits.learner(
            self.task,
            self.decoder,
            objective,
            lambda rate: optax.adam(digits.increasing(config.growth * config.epochs, rate)),
            steps=config.steps,
            pretraining=config.pretraining,
            reward=lambda formed, right: formed * right,
            measure=measure,
            num_epochs=config.epochs,
        )

    def prepared(
        self, objective: pg.Objective, state: pg.train.TrainState, rollout: pg.Rollout
    ) -> tuple[pg.Rollout, pg.Rollout]:
        """The rollout with the policy's outputs, and as the objective makes it."""
        old = self.outputs(state.params, rollout, objective.old_needs)
        full = rollout.replace(old=old, memory=state.memory)
        return full, objective.prepare(full)

    def rejections(self, objective: pg.Objective) -> Measure:
        """Counts a batch's tokens with an advantage, and those of them that are masked."""

        def measure(state: pg.train.TrainState, rollout: pg.Rollout) -> dict[str, Array]:
            _, prepared = self.prepared(objective, state, rollout)
            given = with_advantage(rollout, prepared)
            return {"given": jnp.sum(given), "rejected": jnp.sum(given & ~prepared.mask)}

        return measure

    def quantiles(self, objective: pg.Objective, rate: float) -> Measure:
        """Of the predicted gain, either way, and shift over a batch's tokens with an advantage."""
        schedule = digits.increasing(self.config.growth, rate)

        def measure(state: pg.train.TrainState, rollout: pg.Rollout) -> dict[str, Array]:
            full, prepared = self.prepared(objective, state, rollout)
            old, plan = cast(Any, (full.old, state.memory))
            found = curvature.head_curvature(
                functools.partial(curvature.adam_direction, plan.moments),
                jnp.pad(old.features[:, :-1], ((0, 0), (1, 0), (0, 0))),
                old.support,
                cast(Array, prepared.advantages),
                learning_rate=schedule(plan.steps),
            )
            given = with_advantage(rollout, prepared)
            return {
                name: jnp.nanquantile(jnp.where(given, x, jnp.nan), self.config.quantile)
                for name, x in (("gain", jnp.abs(found.gain)), ("shift", found.shift))
            }

        return measure


def with_advantage(rollout: pg.Rollout, prepared: pg.Rollout) -> Array:
    """The policy's tokens that some method might learn from."""
    return rollout.mask & (cast(Array, prepared.advantages) != 0)[:, None]


def limits_at_base(bench: Bench) -> Limits:
    """What most tokens of free runs at 1x keep, once the learning rate has grown."""
    config = bench.config
    short = dataclasses.replace(config, steps=3 * config.growth)
    bench = dataclasses.replace(bench, config=short)
    free = bench.capo(config.base_rate, Limits())
    curves = bench.learner(free, bench.quantiles(free, config.base_rate))(
        rates=[config.base_rate], seeds=config.tuning_seeds, first_seed=1000, label="limits"
    )
    gain, shift = (np.nanmean(curves[x][..., config.growth :]) for x in ("gain", "shift"))
    return Limits(float(gain), float(shift))


def runs_of(bench: Bench, limits: Limits) -> dict[str, dict[str, Float[np.ndarray, "R S K"]]]:
    """Curves of every method, learning rate and seed."""
    config = bench.config
    rates = [factor * config.base_rate for factor in config.factors]
    grpo = {
        "GRPO": objectives.grpo(),
        "GRPO, narrow clip": objectives.grpo(low=config.narrow, high=config.narrow),
        "GRPO, KL penalty": objectives.grpo(kl_coefficient=config.kl_coefficient),
    }
    found = {
        name: bench.learner(objective)(rates=rates, seeds=config.seeds, label=name)
        for name, objective in list(grpo.items())[: 1 if config.quick else None]
    }
    for name in (SCALED,) if config.quick else (SCALED, FIXED):
        curves = []
        for factor, rate in zip(config.factors, rates, strict=True):
            capo = bench.capo(rate, limits.scaled(factor) if name == SCALED else limits)
            learn = bench.learner(capo, bench.rejections(capo))
            curves.append(learn(rates=[rate], seeds=config.seeds, label=name))
        found[name] = {key: np.concatenate([x[key] for x in curves]) for key in curves[0]}
    return found


def columns(curves: dict[str, Float[np.ndarray, "S K"]]) -> dict[str, Float[np.ndarray, " S"]]:
    """Of the table, for one method and learning rate."""
    reward = reproduction.smooth(curves["reward"])
    found = {
        "best reward": reward.max(1),
        "final reward": reward[:, -1],
        "collapsed": (reward[:, -1] < 0.2 * reward.max(1)).astype(float),
        "final format rate": reproduction.smooth(curves["formed"])[:, -1],
    }
    if "rejected" in curves:
        found["rejected"] = curves["rejected"].sum(1) / np.maximum(curves["given"].sum(1), 1)
    return found


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config,
            seeds=2,
            tuning_seeds=1,
            steps=4,
            growth=1,
            pretraining=100,
            prompts=2,
            width=16,
            factors=(3.0,),
        )
    task = digits.Digits(prompts=config.prompts)
    decoder = digits.make_decoder(task, width=config.width)
    outputs = pg.train.language_model_outputs(decoder, support_size=task.vocab_size)
    bench = Bench(config, task, decoder, outputs)
    limits = limits_at_base(bench)
    found = {
        (name, factor): {key: x[index] for key, x in curves.items()}
        for name, curves in runs_of(bench, limits).items()
        for index, factor in enumerate(config.factors)
    }
    table = {key: columns(curves) for key, curves in found.items()}
    return reproduction.Findings(
        title=f"Stability over learning rates, limits {limits.gain:.3g} and {limits.shift:.3g}",
        table={f"{name} {factor:g}x": x for (name, factor), x in table.items()},
        claims=claims_of(table, config.factors),
        panels={
            f"reward at {at:g}x": {
                name: reproduction.band(np.arange(config.steps), curves["reward"])
                for (name, factor), curves in found.items()
                if factor == at
            }
            for at in config.factors
        },
    )


def claims_of(
    table: dict[tuple[str, float], dict[str, np.ndarray]], factors: Sequence[float]
) -> list[reproduction.Claim]:
    def mean(column: str, name: str) -> dict[float, float]:
        return {f: float(table[name, f][column].mean()) for f in factors}

    falls, falls_of_capo = mean("collapsed", "GRPO"), mean("collapsed", SCALED)
    rejected = mean("rejected", SCALED)
    fallen = [f for f in factors if falls[f] > 0.5]
    kept = [f for f in fallen if falls_of_capo[f] < 0.5 and rejected[f] < 0.1]
    seen = "; ".join(
        f"{f:g}x: {falls_of_capo[f]:.0%} collapsed, GRPO {falls[f]:.0%}, {rejected[f]:.1%} rejected"
        for f in fallen
    )
    frozen = [key for key, x in table.items() if "rejected" in x and x["rejected"].mean() > 0.5]
    return [
        reproduction.Claim(
            "some learning rate makes most runs of GRPO collapse",
            bool(fallen),
            f"{len(fallen)} of {len(factors)} do",
        ),
        reproduction.Claim(
            "at one of them most of scaled CAPO's stay up and it rejects less than a tenth",
            bool(kept),
            seen or "there is none",
        ),
        reproduction.Claim(
            "scaled CAPO never rejects most tokens",
            not any(name == SCALED for name, _ in frozen),
            "most rejected: " + (", ".join(f"{name} {f:g}x" for name, f in frozen) or "nowhere"),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "capo_stability", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
