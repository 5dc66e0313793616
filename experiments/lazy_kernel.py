"""Lazy solutions: does rewarding and filtering by coverage teach fast code, not only correct code?

A task may be answered wrongly, by a trivial rewrite that is nearly always correct and no faster, or
by a fused kernel, which pays off only once one of several ways of writing it is mastered. Four
tasks differ in how often an untrained fused kernel is correct, from 15% to 60%. Policies learn with
TRLOO from (1) correctness alone, (2) correctness and speed-up, (3) the profiling reward, which adds
coverage, and (4) that with correct but lazy solutions dropped at random (profiling rejection); for
comparison also with the dropped ones left in the baselines. Shows the claim, and exits 0, if the
share of solutions that are correct and at least 1.2 times faster is ordered (4) >= (3) > (1), the
latter by 5 points or more, with (4)'s correctness within 10 points of (1)'s. Where a fused kernel
is rarely correct, the reward alone has little to work with: the share on the hardest task is given
apart.

Source: Dr. Kernel, 2026, arXiv 2602.05885.
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
from jaxtyping import Array

import pgjax as pg
from experiments.shared import reproduction, tabular
from pgjax.diagnostics import problems
from pgjax.masks import quality
from pgjax.objectives import agentic
from pgjax.rewards import profiling

WRONG, TRIVIAL, FUSED = 0, 1, 2
ACTIONS = 4  # ways to write a fused kernel; of the first choice, 3 is another wrong answer
CORRECT_TRIVIAL = 0.9
CORRECT_FUSED = (0.07, 0.1, 0.1, 0.95)
SPEEDUP = (0.0, 1.0, 2.0)
COVERAGE = (0.0, 0.05, 0.8)


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    untrained: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6)
    """How often a fused kernel is correct at first, task by task; the hardest one first."""
    steps: int = 400
    """Batches."""
    group_size: int = 16
    """Samples of each task in a batch."""
    learning_rate: float = 0.4
    """Of plain gradient ascent; the same for all."""
    seeds: int = 10
    """Independent runs."""
    out: pathlib.Path = pathlib.Path("runs/lazy_kernel")
    """Directory for results."""
    quick: bool = False
    """Twenty steps of three runs, only of what is compared."""


def facts(tokens: Array) -> dict[str, Array]:
    """What an evaluation of each answer finds."""
    kind = jnp.where(tokens[:, 1] > FUSED, WRONG, tokens[:, 1])
    return {
        "correct": tokens[:, 3] == 1,
        "speedup": jnp.asarray(SPEEDUP)[kind],
        "coverage": jnp.asarray(COVERAGE)[kind],
        "keep": tokens[:, 4] == 1,
    }


def chance_correct(first: Array, second: Array) -> Array:
    """Probability that an answer passes its tests."""
    fused = jnp.asarray(CORRECT_FUSED)[second]
    return jnp.where(first == TRIVIAL, CORRECT_TRIVIAL, jnp.where(first == FUSED, fused, 0.0))


def start(untrained: tuple[float, ...]) -> Array:
    """Logits `[P, 2, A]`: all kinds alike; the good way to fuse as likely as gives that share."""
    *poor, good = CORRECT_FUSED
    rest = sum(poor) / len(poor)
    chance = (jnp.asarray(untrained) - rest) / (good - rest)
    ways = jnp.stack([(1 - chance) / len(poor)] * len(poor) + [chance], axis=1)
    return jnp.stack([jnp.zeros_like(ways), jnp.log(ways)], axis=1)


def problem(reward: Callable[[dict[str, Array]], Array], *, tasks: int) -> problems.TokenProblem:
    """Choose a kind, then a way to write it if fused; tests and the rejection's draw are nature."""

    def roles(tokens: Array) -> Array:
        nobody = jnp.full(tokens.shape[0], problems.NOBODY)
        policy = jnp.full(tokens.shape[0], problems.POLICY)
        nature = jnp.full(tokens.shape[0], problems.NATURE)
        second = jnp.where(tokens[:, 1] == FUSED, policy, nobody)
        return jnp.stack([nobody, policy, second, nature, nature], axis=1)

    def nature(tokens: Array) -> Array:
        found = facts(tokens)
        passes = chance_correct(tokens[:, 1], tokens[:, 2])
        keeps = quality.coverage_keep_probability(found["coverage"], found["correct"])
        chance = jnp.stack([passes] * 4 + [keeps], axis=1)
        rest = jnp.zeros((*chance.shape, ACTIONS - 2))
        return jnp.concatenate([1 - chance[..., None], chance[..., None], rest], axis=-1)

    def logits(params: Array, tokens: Array) -> Array:
        mine = params[tokens[:, 0]]
        zero = jnp.zeros_like(mine[:, 0])
        return jnp.stack([zero, mine[:, 0], mine[:, 1], zero, zero], axis=1)

    return problems.TokenProblem(
        num_prompts=tasks,
        num_actions=ACTIONS,
        horizon=4,
        logits=logits,
        reward=lambda tokens: reward(facts(tokens)),
        roles=roles,
        nature=nature,
        extras=lambda tokens: {"keep": facts(tokens)["keep"]},
    )


def correctness(found: dict[str, Array]) -> Array:
    """1 for a correct answer."""
    return found["correct"].astype(jnp.float32)


def profiled(**options: Any) -> Callable[[dict[str, Array]], Array]:
    """The profiling reward."""

    def reward(found: dict[str, Array]) -> Array:
        return profiling.profiling_reward(
            found["correct"], found["speedup"], found["coverage"], **options
        )

    return reward


def one_turn(rollout: pg.Rollout) -> Array:
    """An answer is one turn."""
    positions = jnp.array([-1, 0, 0, -1, -1])
    return jnp.broadcast_to(positions, rollout.mask.shape)


def kept(rollout: pg.Rollout) -> Array:
    """Samples that the rejection's draw has kept."""
    assert rollout.extras is not None
    return rollout.extras["keep"]


def measure(params: Array) -> dict[str, Array]:
    """Exact shares of correct answers, and of correct ones that are 1.2 times faster."""
    first, second = jnp.moveaxis(jax.nn.softmax(params), 1, 0)
    fused = first[:, FUSED] * jnp.sum(second * jnp.asarray(CORRECT_FUSED), axis=-1)
    correct = fused + first[:, TRIVIAL] * CORRECT_TRIVIAL
    return {"fast": fused.mean(), "fast on the hardest": fused[0], "correct": correct.mean()}


def run(config: Config) -> reproduction.Findings:
    """All four ways of rewarding, all seeds."""
    steps, seeds = (20, 3) if config.quick else (config.steps, config.seeds)
    trloo = agentic.trloo(turn_ids=one_turn, num_turns=1)
    methods = {
        "correctness": (correctness, trloo),
        "+ speed-up": (profiled(coverage_weight=0.0), trloo),
        "+ coverage (PR)": (profiled(), trloo),
        "+ rejection (PR+PRS)": (profiled(), agentic.with_rejection(trloo, kept)),
        "rejected in baselines": (profiled(), dataclasses.replace(trloo, mask=kept)),
    }
    if config.quick:
        del methods["+ speed-up"], methods["rejected in baselines"]
    every = max(steps // 40, 1)
    curves = {
        name: tabular.learn(
            problem(reward, tasks=len(config.untrained)),
            objective,
            optax.sgd(config.learning_rate),
            init=lambda key: start(config.untrained),
            measure=measure,
            group_size=config.group_size,
            steps=steps,
            seeds=seeds,
            every=every,
        )
        for name, (reward, objective) in reproduction.track(methods.items())
    }
    fast = {name: curve["final/fast"] for name, curve in curves.items()}
    right = {name: curve["final/correct"] for name, curve in curves.items()}
    base, coverage, rejection = "correctness", "+ coverage (PR)", "+ rejection (PR+PRS)"
    gain = fast[coverage] - fast[base]
    more = float(np.mean(fast[rejection] - fast[coverage]))
    lost = float(np.mean(right[base] - right[rejection]))
    claims = [
        reproduction.Claim(
            "rejection gives at least as many fast solutions as the reward alone",
            more >= 0,
            f"{more:+.3f}",
        ),
        reproduction.Claim(
            "the profiling reward gives more fast solutions than correctness, by 5 points",
            float(np.mean(gain)) >= 0.05,
            f"{np.mean(gain):+.3f}",
        ),
        reproduction.Claim(
            "with both, correctness is within 10 points", lost <= 0.1, f"{lost:+.3f} lost"
        ),
    ]
    at = np.arange(0, steps, every)
    return reproduction.Findings(
        title="Fast kernels instead of lazy ones",
        table={
            name: {
                "correct and >= 1.2x": fast[name],
                "on the hardest": curves[name]["final/fast on the hardest"],
                "correct": right[name],
            }
            for name in methods
        },
        claims=claims,
        panels={
            title: {name: reproduction.band(at, curve[key]) for name, curve in curves.items()}
            for title, key in (("correct and at least 1.2x", "fast"), ("correct", "correct"))
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("lazy_kernel", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
