"""Tricks of normalisation, clipping, aggregation and filtering side by side ("Tricks or Traps?").

Prompts ask for digits that sum to a target, then a stop; too long an answer is cut off and wrong.
Starting points: hard, an untrained policy that solves about 4%; medium, about half; easy, about
95%; split, every other prompt easy and the rest hard; and easy and hard with a tail, where every
fourth prompt asks for more than fits into an answer and is never solved. From each, every center
with every scale, and one change at a time to Lite PPO (group mean, batch deviation, token mean,
plain clip), all with the same budget (arXiv 2508.08221).

Lite PPO must end within noise of or above GRPO and DAPO on the untrained policy, with the tail and
without, each at the best of as many learning rates: steps that change with the batch's deviation
make one rate for all unfair. And where rewards within a group are nearly all alike, the batch's
deviation must give a lower 99th percentile of the gradient norm than the group's. That depends on
how prompts differ. Of p right answers in a batch the deviation is √(p(1-p)); of 8 answers to a
prompt, not all alike, it is at least √(1/8) = .35. So the batch's is the larger one, and takes the
smaller steps, while p lies between 15% and 85%. Where all prompts are equally easy it cannot, so
the claim is judged on the split start and on the easy prompts with a tail. Once all is solved it
cannot either: p goes to 1, and a single wrong answer's advantage has no bound, while the group's
keeps it to 2.5. A table of logits gets there on the split start within the budget. Exits with 1 if
one of the claims does not show.

The policy is a transformer of two layers, as it was drawn for the hard starts and after a
supervised warm-up to the stated shares for the others. `--policy table` takes one row of logits for
each prompt and running sum, which learns far faster. `--full` adds every combination of the tricks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import pgjax as pg
from experiments.shared import reproduction, tabular, token_network
from pgjax import advantages, aggregate, masks, objectives
from pgjax.diagnostics import problems
from pgjax.objectives import baselines

STOP, ACTIONS = 0, 4  # and the digits 1, 2 and 3
CENTERS = {
    "group": advantages.centered,
    "batch": advantages.batch_centered,
    "none": advantages.uncentered,
}
SCALES = {
    "group": advantages.by_group_std,
    "batch": advantages.by_batch_std,
    "none": advantages.unscaled,
}
AGGREGATES = {
    "token": aggregate.token_mean,
    "sequence": aggregate.sequence_mean_token_mean,
}
WIDTHS = (0.2, 0.28, 0.32)
LITE = "group/batch"
UNTRAINED, MIXED = ("hard", "hard, tail"), ("split", "easy, tail")
CLAIMED = (  # what the claims are about
    *itertools.product(UNTRAINED, (LITE, "GRPO", "DAPO")),
    *itertools.product(MIXED, (LITE, "group/group")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One budget for all cells of the grid."""

    seeds: int = 16
    """Runs of every cell."""
    tuning_seeds: int = 4
    """Further ones, on which learning rates are chosen."""
    first_seed: int = 500
    """Of those for tuning; the others follow it."""
    steps: int = 100
    """Batches."""
    policy: Literal["transformer", "table"] = "transformer"
    """Of two layers, or a row of logits for each prompt and running sum, which is cheap."""
    learning_rate: float | None = None
    """Of Adam, for all cells but the hard starts': it takes out most of what a scale alone does.
    None: what suits the policy."""
    rates: tuple[float, ...] = ()
    """The same on the hard starts, where each cell has the best of them. None given: what suits."""
    width: int = 32
    """Of the transformer."""
    warm_up: int = 300
    """Supervised steps before it starts as anything but hard."""
    prompts: int = 8
    """With targets from 4 on."""
    group_size: int = 8
    """Samples per prompt and step."""
    longest: int = 6
    """Tokens before an answer is cut off."""
    epochs: int = 2
    """Passes over a batch, in two minibatches each, so that clipping has work to do."""
    full: bool = False
    """Every combination instead of one change at a time: 108 cells for each starting point."""
    claimed_only: bool = False
    """Only the cells that the claims are about."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/tricks_grid")
    """Directory for table and plot."""


# Learning rates unless others are asked for: of the hard starts, and of the others.
RATES: dict[str, tuple[tuple[float, ...], float]] = {
    "transformer": ((2.5e-4, 5e-4, 1e-3, 2e-3), 1e-4),
    "table": ((0.1, 0.2, 0.4, 0.8), 0.05),
}
# Logit of a right token before training, of even and odd prompts.
MIXES = {
    "hard": (0.0, 0.0),
    "medium": (2.2, 2.2),
    "easy": (5.2, 5.2),
    "split": (5.2, 0.0),
    "hard, tail": (0.0, 0.0),
    "easy, tail": (5.2, 5.2),
}


def targets(config: Config, mix: str) -> Int[Array, " P"]:
    """With a tail, every fourth is more than the digits of an answer can sum to."""
    prompts = jnp.arange(config.prompts)
    out_of_reach = (prompts % 4 == 3) & mix.endswith("tail")
    return jnp.where(out_of_reach, 3 * config.longest, 4 + prompts % 5)


def before(x: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.cumsum(x, axis=1) - x


def table_logits(
    table: Float[Array, "P sums A"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T A"]:
    return table[tokens[:, :1], before(tokens.at[:, 0].set(0))]


def transformer(config: Config) -> pg.models.FunctionalDecoder:
    return token_network.make_decoder(
        num_prompts=config.prompts,
        num_actions=ACTIONS,
        horizon=config.longest,
        width=config.width,
    )


def digit_sums(config: Config, mix: str) -> problems.TokenProblem:
    """A table's parameters are `[P, sums, A]`, by prompt and sum so far."""
    wanted = targets(config, mix)

    def stops(tokens: Array) -> Array:
        return (tokens == STOP) & (jnp.arange(tokens.shape[1]) > 0)

    def roles(tokens: Array) -> Array:
        going = before(stops(tokens).astype(jnp.int32)) == 0
        return jnp.where(going, problems.POLICY, problems.NOBODY)

    def stopped(tokens: Array) -> Array:
        return jnp.any(stops(tokens), axis=1)

    def reward(tokens: Array) -> Array:
        right = tokens[:, 1:].sum(1) == wanted[tokens[:, 0]]
        return (right & stopped(tokens)).astype(jnp.float32)

    return problems.TokenProblem(
        num_prompts=config.prompts,
        num_actions=ACTIONS,
        horizon=config.longest,
        logits=token_network.logits_of(transformer(config), ACTIONS)
        if config.policy == "transformer"
        else table_logits,
        reward=reward,
        roles=roles,
        extras=lambda tokens: {"truncated": ~stopped(tokens)},
    )


def start(config: Config, mix: str) -> Float[Array, "P sums A"]:
    """Logits that favour, at every sum, the largest digit that fits and the stop at the target."""
    left = targets(config, mix)[:, None] - jnp.arange(3 * config.longest + 1)
    strength = jnp.array(MIXES[mix])[jnp.arange(config.prompts) % 2]
    return strength[:, None, None] * jax.nn.one_hot(jnp.clip(left, 0, 3), ACTIONS)


def initial(config: Config, mix: str, key: PRNGKeyArray) -> Any:
    """Parameters before the first batch: the table's start, or a network like it.

    On the hard starts the network is as it was drawn.
    """
    table = start(config, mix)
    if config.policy == "table":
        return table
    init_key, key = jax.random.split(key)
    params = pg.models.init(transformer(config).config, init_key)[1]
    if mix in UNTRAINED:
        return params

    def rows_of(key: Array) -> Array:
        digits = jax.random.randint(key, (16 * config.prompts, config.longest), 1, ACTIONS)
        prompts = jnp.tile(jnp.arange(config.prompts), 16)[:, None]
        return jnp.concatenate([prompts, digits], axis=1).astype(jnp.int32)

    return token_network.fitted(
        digit_sums(config, mix).logits,
        params,
        functools.partial(table_logits, table),
        rows_of,
        key,
        steps=config.warm_up,
    )


def cell(
    center: str, scale: str, *, reduce: str = "token", high: float = 0.2, keep_long: bool = True
) -> pg.Objective:
    return dataclasses.replace(
        objectives.lite_ppo(high=high),
        advantage=baselines.normalized(center=CENTERS[center], scale=SCALES[scale]),
        aggregate=AGGREGATES[reduce],
        mask=None if keep_long else without_long,
    )


def without_long(rollout: pg.Rollout) -> Array:
    assert rollout.extras is not None
    return masks.overlong_filter(rollout.extras["truncated"])


def grid(config: Config) -> dict[str, pg.Objective]:
    """Names are center/scale, then what else differs from Lite PPO."""
    cells = {f"{c}/{s}": cell(c, s) for c, s in itertools.product(CENTERS, SCALES)}
    for reduce, high, keep in itertools.product(AGGREGATES, WIDTHS, (True, False)):
        changed = [
            name
            for name, is_so in (
                (f"{reduce} mean", reduce != "token"),
                (f"high {high:g}", high != WIDTHS[0]),
                ("overlong filtered", not keep),
            )
            if is_so
        ]
        pairs = itertools.product(CENTERS, SCALES) if config.full else [("group", "batch")]
        for c, s in pairs if changed and (config.full or len(changed) == 1) else []:
            name = ", ".join([f"{c}/{s}", *changed])
            cells[name] = cell(c, s, reduce=reduce, high=high, keep_long=keep)
    return {**cells, "GRPO": objectives.grpo(), "DAPO": objectives.dapo()}


def learn(config: Config, objective: pg.Objective, mix: str) -> dict[str, Float[np.ndarray, " S"]]:
    """Columns of the table, and the accuracy's curve."""
    problem = digit_sums(config, mix)
    rows = problems.all_sequences(problem)
    right = jnp.asarray(rows[np.asarray(problem.reward(jnp.asarray(rows))) == 1])

    def measure(params: Any) -> dict[str, Array]:
        chances = jnp.exp(problems.log_probability(problem, params, right))
        return {"accuracy": jnp.sum(chances) / config.prompts}

    rates, rate = RATES[config.policy]
    rates = (config.rates or rates) if mix in UNTRAINED else (config.learning_rate or rate,)
    options: dict[str, Any] = {
        # One seed after the other: all at once, drawing networks takes twice as long to compile.
        "init": jax.custom_batching.sequential_vmap(functools.partial(initial, config, mix)),
        "measure": measure,
        "group_size": config.group_size,
        "steps": config.steps,
        "num_epochs": config.epochs,
        "num_minibatches": 2,
    }
    best = rates[0]
    if len(rates) > 1:
        tried = tabular.learn_at_rates(
            problem,
            objective,
            optax.adam,
            rates=rates,
            seeds=config.tuning_seeds,
            first_seed=config.first_seed,
            **options,
        )
        best = rates[int(np.argmax(tried["final/accuracy"].mean(1)))]
    curves = tabular.learn(
        problem,
        objective,
        optax.adam(best),
        seeds=config.seeds,
        first_seed=config.first_seed + config.tuning_seeds,
        **options,
    )
    last = slice(-max(config.steps // 10, 1), None)
    return {
        "learning rate": np.full(config.seeds, best),
        "start accuracy": curves["accuracy"][:, 0],
        "accuracy": curves["final/accuracy"],
        "mean accuracy": curves["accuracy"].mean(1),
        "entropy": curves["entropy"][:, last].mean(1),
        "length": curves["completion_length"][:, last].mean(1),
        "gradient norm p99": np.percentile(curves["gradient_norm"], 99, axis=1),
        "gradient norm p50": np.percentile(curves["gradient_norm"], 50, axis=1),
        "curve": curves["accuracy"],
    }


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config,
            seeds=3,
            tuning_seeds=1,
            policy="table",
            rates=(0.1,),
            steps=4,
            prompts=2,
            longest=3,
            claimed_only=True,
        )
    cells = [
        (mix, name, objective)
        for mix in MIXES
        for name, objective in grid(config).items()
        if not config.claimed_only or (mix, name) in CLAIMED
    ]
    found = {
        (mix, name): learn(config, objective, mix)
        for mix, name, objective in reproduction.track(cells, "cells")
    }
    shown = [LITE, "group/group", "group/none", "batch/batch", "GRPO", "DAPO"]
    steps = np.arange(config.steps)
    return reproduction.Findings(
        title="Tricks of normalisation, clipping, aggregation and filtering",
        table={
            f"{mix}: {name}": {k: v for k, v in x.items() if k != "curve"}
            for (mix, name), x in found.items()
        },
        claims=claims(lambda mix, name: found[mix, name]),
        panels={
            f"accuracy, {mix}": {
                name: reproduction.band(steps, found[mix, name]["curve"])
                for name in shown
                if (mix, name) in found
            }
            for mix in dict.fromkeys(mix for mix, _ in found)
        },
    )


def claims(found: Callable[[str, str], dict[str, Any]]) -> list[reproduction.Claim]:
    result = []
    for mix, other in itertools.product(UNTRAINED, ("GRPO", "DAPO")):
        gain = found(mix, LITE)["accuracy"] - found(mix, other)["accuracy"]
        result.append(
            reproduction.Claim(
                f"{mix}: Lite PPO's final accuracy is within noise of or above {other}'s",
                bool(gain.mean() + 2 * reproduction.standard_error(gain) >= 0),
                reproduction.with_error(gain, "+.4f"),
            )
        )
    text = "99th percentile of the gradient norm is lower with the batch's deviation"
    for mix in MIXED:
        group, batch = (found(mix, name)["gradient norm p99"] for name in ("group/group", LITE))
        result.append(reproduction.ahead(f"{mix}: {text}", group, batch))
    return result


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main("tricks_grid", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
