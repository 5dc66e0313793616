"""How far turn-level baselines bend the gradient, turn by turn, summed over every possible batch.

Episodes of up to three turns; an episode goes on only after one of three actions, so fewer and
fewer of a group's N samples reach a later turn. With a baseline that leaves the sample out (TRLOO)
the expected gradient is to be the true one at every turn. With the mean of all samples, the sample
included, turn m's share is to shrink to `E[1 - 1/N_m]`, later turns more than earlier ones, so that
the gradient's direction is off as well. Nothing is sampled: each "seed" is another random policy
and reward table. Exits with 1 if this is not what comes out.

Source: Dr. Kernel, 2026, arXiv 2602.05885 (its formula 1 - 1/N_m holds for a given N_m; N_m is
random here, and the expectation is over it).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction
from pgjax.diagnostics import problems
from pgjax.objectives import agentic

TURNS, ACTIONS, GO_ON = 3, 3, 1


@dataclasses.dataclass(frozen=True)
class Config:
    """What to enumerate."""

    group_sizes: tuple[int, ...] = (2, 4, 8)
    """Samples of a group."""
    seeds: int = 5
    """Random policies and reward tables."""
    out: pathlib.Path = pathlib.Path("runs/trloo_bias")
    """Directory for results."""
    quick: bool = False
    """Two small groups and two policies."""


def problem(rewards: Float[Array, "M A"]) -> problems.TokenProblem:
    """One token a turn; action 1 goes on, the others end the episode. Parameters: logits [M, A]."""

    def alive(tokens: Array) -> Array:
        """Whether the policy acts at each position."""
        went_on = jnp.cumprod(tokens[:, 1:] == GO_ON, axis=1).astype(bool)
        start = jnp.ones((tokens.shape[0], 1), bool)
        return jnp.concatenate([~start, start, went_on[:, :-1]], axis=1)

    def reward(tokens: Array) -> Array:
        table = jnp.concatenate([jnp.zeros_like(rewards[:1]), rewards])
        found = table[jnp.arange(TURNS + 1), tokens]
        return jnp.where(alive(tokens), found, 0.0)

    def logits(params: Array, tokens: Array) -> Array:
        rows = jnp.concatenate([jnp.zeros_like(params[:1]), params])
        return jnp.broadcast_to(rows, (tokens.shape[0], *rows.shape))

    return problems.TokenProblem(
        num_prompts=1,
        num_actions=ACTIONS,
        horizon=TURNS,
        logits=logits,
        reward=reward,
        roles=lambda tokens: jnp.where(alive(tokens), problems.POLICY, problems.NOBODY),
    )


def turn_ids(rollout: pg.Rollout) -> Array:
    """Every token of the policy is a turn of its own."""
    return jnp.where(rollout.mask, jnp.arange(rollout.mask.shape[1]) - 1, -1)


def objective(advantage: Callable[..., Array], **options: Any) -> pg.Objective:
    """TRLOO with another group advantage."""
    return dataclasses.replace(
        agentic.trloo(),
        advantage=agentic.by_turn(advantage, turn_ids=turn_ids, num_turns=TURNS, **options),
    )


def expected_gradient(
    objective: pg.Objective,
    params: Float[Array, "M A"],
    rewards: Float[Array, "M A"],
    *,
    group_size: int,
) -> Float[Array, "M A"]:
    """`E[-∇ loss]` over all groups; the order of the samples makes no difference to it."""
    rows = problems.all_sequences(problem(rewards))
    groups = np.array(
        list(itertools.combinations_with_replacement(range(len(rows)), group_size)), np.int32
    )
    orders = np.array(
        [
            math.factorial(group_size)
            / math.prod(math.factorial(n) for n in np.unique(group, return_counts=True)[1])
            for group in groups
        ]
    )
    return _weighted_sum(objective, params, rewards, rows, groups, orders)


@functools.partial(jax.jit, static_argnames="objective")
def _weighted_sum(
    objective: pg.Objective,
    params: Array,
    rewards: Array,
    rows: Array,
    groups: Array,
    orders: Array,
) -> Array:
    task = problem(rewards)
    logprobs = problems.log_probability(task, params, rows)
    weights = orders * jnp.exp(logprobs[groups].sum(-1))

    def gradient(group: Array) -> Array:
        prepared = objective.prepare(problems.rollout_of(task, rows[group], params))

        def loss(params: Array) -> Array:
            return objective.value(
                problems.outputs(task, params, prepared, objective.needs), prepared
            )

        return -jax.grad(loss)(params)

    gradients = jax.lax.map(gradient, groups, batch_size=128)
    return jnp.tensordot(weights, gradients, axes=1)


def shrinkage(reach: Float[np.ndarray, " M"], group_size: int) -> Float[np.ndarray, " M"]:
    """`E[1 - 1/N_m]` for a sample that reaches turn m, which each sample does with chance `reach`.

    The other samples that do are binomial, and `E[1 / (1 + Bin(N-1, p))] = (1 - (1-p)^N) / (N p)`.
    """
    return 1 - (1 - (1 - reach) ** group_size) / (group_size * reach)


def run(config: Config) -> reproduction.Findings:
    """Expected gradients of both baselines against the true one."""
    sizes = (2, 4) if config.quick else config.group_sizes
    seeds = 2 if config.quick else config.seeds
    methods = {
        "leave one out": objective(pg.advantages.leave_one_out),
        "mean of all": objective(pg.advantages.centered),
    }
    table: dict[str, dict[str, list[float]]] = {}
    gaps = {"leave one out": 0.0, "mean of all": 0.0}
    later = []
    for seed in reproduction.track(range(seeds), "seeds"):
        policy_key, reward_key = jax.random.split(jax.random.key(seed))
        params = jax.random.normal(policy_key, (TURNS, ACTIONS))
        rewards = jax.random.normal(reward_key, (TURNS, ACTIONS))
        true = jax.grad(lambda p, r=rewards: problems.expected_reward(problem(r), p))(params)
        true = np.asarray(true)
        go_on = np.asarray(jax.nn.softmax(params))[:, GO_ON]
        reach = np.cumprod([1.0, *go_on[:-1]])
        for size in sizes:
            for name, method in methods.items():
                found = np.asarray(expected_gradient(method, params, rewards, group_size=size))
                ratio = np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
                cosine = np.sum(found * true) / np.linalg.norm(found) / np.linalg.norm(true)
                row = table.setdefault(f"{name}, N={size}", {})
                for turn, value in enumerate(ratio, start=1):
                    row.setdefault(f"norm ratio, turn {turn}", []).append(float(value))
                row.setdefault("cosine", []).append(float(cosine))
                scale = np.ones(TURNS) if name == "leave one out" else shrinkage(reach, size)
                error = np.linalg.norm(found - scale[:, None] * true) / np.linalg.norm(true)
                gaps[name] = max(gaps[name], float(error))
                if name == "mean of all":
                    later.append(np.all(np.diff(ratio) < 0))
    claims = [
        reproduction.Claim(
            "leave one out: the true gradient at every turn",
            gaps["leave one out"] < 1e-4,
            f"largest relative error {gaps['leave one out']:.1e} (below 1e-4)",
        ),
        reproduction.Claim(
            "mean of all: every turn shrinks to E[1 - 1/N_m]",
            gaps["mean of all"] < 1e-4,
            f"largest relative error {gaps['mean of all']:.1e} (below 1e-4)",
        ),
        reproduction.Claim(
            "mean of all: later turns shrink more",
            bool(np.all(later)),
            f"in {int(np.sum(later))} of {len(later)} cases",
        ),
    ]
    panels = {
        "norm of the expected gradient over the true one": {
            name: (
                np.arange(1, TURNS + 1),
                np.array([np.mean(row[f"norm ratio, turn {m}"]) for m in range(1, TURNS + 1)]),
            )
            for name, row in table.items()
        }
    }
    return reproduction.Findings(
        title="Expected gradient, turn by turn",
        table={
            name: {column: np.array(x) for column, x in row.items()} for name, row in table.items()
        },
        claims=claims,
        panels=panels,
        x_label="turn",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("trloo_bias", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
