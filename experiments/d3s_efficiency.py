"""D3S: the same reward from fewer tokens of gradient, by choosing rows and tokens.

The tiny transformer of `shared.digits` answers in a format that it knows, each of its 64 prompts
with digits that have to be learnt by heart. All prompts are in every batch. For one prompt in eight
all demonstrations were right, so that it is nearly solved; for one in eight none was more than
chance, so that one answer in sixty-four scores; for the others half were, and between a third and a
half of the answers score at first. Mix and number of batches were chosen by GRPO alone, on the
seeds that tune the learning rates: enough rows have a signal that D3S can choose among them, and at
the end GRPO is at .80 of the .877 that there is while the hopeless prompts stay at chance, still
rising. In twice as many batches every good method ends at .87, and which of two comes to a level
there is chance. Where half of the prompts are nearly solved and a quarter hopeless, one row in nine
of GRPO has a signal, fewer than D3S is to use.

Compared by the tokens that are learnt from, each method at its best of one list of Adam's learning
rates, chosen on other seeds: GRPO on all tokens; PODS, the rows of largest reward variance in each
group; and D3S with its schedule. D3S may go on for half as many batches again, since what it saves
is tokens of gradient and not samples; the table also shows where it is when GRPO ends. With
`--ablations` also D3S's rows within groups and across the batch, without its token level; both
levels at a fixed share; and a schedule that ends at all rows and tokens. The paper does not state
where the schedule ends. That under a fifth of all tokens is used and nearly all chosen rows have a
signal, which it does state, is impossible if all rows are used in the end, so the schedule of D3S
stops before. A larger step is no gain of the method, hence the tuning.
Exits 1 if D3S does not come to the tuned GRPO's final reward with 60% of its update tokens, if
fewer than 85% of its rows have a signal, or if the best learning rate of either lies at an end of
the list, where it may not be the best.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import pgjax as pg
from experiments.shared import digits, reproduction
from pgjax import aggregate, objectives
from pgjax.masks import downsample
from pgjax.objectives import token_selection


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    out: pathlib.Path = pathlib.Path("runs/d3s_efficiency")
    """Where results go."""
    seeds: int = 8
    """Independent runs of every method."""
    first_seed: int = 200
    """The others follow it."""
    tuning_seeds: int = 3
    """Others, by which each method's learning rate is chosen."""
    steps: int = 20
    """Batches."""
    longer: float = 1.5
    """Batches of the methods with a schedule, as a multiple of the others'."""
    group_size: int = 8
    """Samples of each prompt."""
    choices: int = 8
    """Different digits; all pairs of them are prompts."""
    demonstrated: tuple[float, ...] = (1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0)
    """Shares of right demonstrations, by kind of prompt."""
    pretraining: int = 2000
    """Updates on demonstrations."""
    width: int = 32
    """Of the transformer."""
    learning_rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    """Of Adam, after ten steps of growth; each method is reported at its best."""
    rows: float = 0.25
    """First share of rows."""
    tokens: float = 0.2
    """First share of the kept rows' tokens."""
    last_rows: float = 0.5
    """Last share of rows."""
    last_tokens: float = 0.6
    """Last share of the kept rows' tokens: 16% of all tokens over the schedule."""
    fixed_rows: float = 0.5
    """Share of rows of the methods without a schedule."""
    fixed_tokens: float = 0.5
    """Share of tokens of both levels without a schedule."""
    ablations: bool = False
    """Also parts of D3S, and another end of its schedule."""
    quick: bool = False
    """A tiny version, for tests."""


def reward(formed: Array, right: Array) -> Array:
    return formed & (right == 1)


def pods(share: float) -> pg.Objective:
    """GRPO within the rows of each group whose rewards have the largest variance."""

    def chosen(rollout: pg.Rollout) -> Array:
        ids, number = rollout.group_ids, rollout.rewards.shape[0]
        count = pg.segments.count(ids, num_segments=number)
        return downsample.max_variance_subset_by_group(
            rollout.rewards, ids, downsample.rows_to_keep(share, count), num_groups=number
        )

    def advantage(rollout: pg.Rollout) -> Array:
        return pg.advantages.group_normalize(
            rollout.rewards,
            rollout.group_ids,
            num_groups=rollout.rewards.shape[0],
            where=chosen(rollout),
        )

    return dataclasses.replace(base(), advantage=advantage, mask=chosen)


def base() -> pg.Objective:
    return dataclasses.replace(objectives.grpo(), aggregate=aggregate.token_mean)


def methods(config: Config) -> dict[str, pg.Objective]:
    """What is compared, each with meters of what it uses."""
    fixed, all_ = (config.fixed_rows, config.fixed_rows), (1.0, 1.0)
    scheduled = batches(config, "D3S")
    select = token_selection.with_down_sampling
    found = {
        "GRPO": base(),
        "PODS": pods(config.fixed_rows),
        "rows within groups": select(
            base(),
            steps=config.steps,
            rows=fixed,
            tokens=all_,
            subset=token_selection.most_varied_rows_of_groups,
        ),
        "rows across the batch": select(base(), steps=config.steps, rows=fixed, tokens=all_),
        "rows and tokens, fixed": select(
            base(), steps=config.steps, rows=fixed, tokens=(config.fixed_tokens,) * 2
        ),
        "D3S, all at the end": select(
            base(), steps=scheduled, rows=(config.rows, 1.0), tokens=(config.tokens, 1.0)
        ),
        "D3S": select(
            base(),
            steps=scheduled,
            rows=(config.rows, config.last_rows),
            tokens=(config.tokens, config.last_tokens),
        ),
    }
    names = found if config.ablations else ("GRPO", "PODS", "D3S")
    return {name: metered(found[name]) for name in names}


def batches(config: Config, name: str) -> int:
    """Of a method."""
    return round(config.steps * config.longer) if name.startswith("D3S") else config.steps


def metered(objective: pg.Objective) -> pg.Objective:
    """The objective with two more diagnostics: update tokens, and the share of rows with signal."""

    def everywhere(rollout: pg.Rollout, number: Array) -> Array:
        return jnp.broadcast_to(number.astype(jnp.float32), rollout.mask.shape)

    def tokens(outputs: pg.PolicyOutputs, rollout: pg.Rollout) -> Array:
        return everywhere(rollout, rollout.mask.sum())

    def usefulness(outputs: pg.PolicyOutputs, rollout: pg.Rollout) -> Array:
        assert rollout.advantages is not None
        used = jnp.any(rollout.mask, axis=1)
        useful = jnp.sum(used & (rollout.advantages != 0))
        return everywhere(rollout, useful / jnp.maximum(jnp.sum(used), 1))

    meters = (
        pg.Regularizer("update_tokens", tokens, 0.0),
        pg.Regularizer("usefulness", usefulness, 0.0),
    )
    return dataclasses.replace(objective, regularizers=objective.regularizers + meters)


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config,
            seeds=2,
            tuning_seeds=1,
            steps=4,
            group_size=4,
            choices=2,
            pretraining=0,
            learning_rates=(0.001,),
            width=16,
        )
    task = digits.Digits(
        by_heart=True,
        choices=config.choices,
        demonstrated=config.demonstrated,
        prompts=config.choices**2,
        group_size=config.group_size,
    )
    decoder = digits.make_decoder(task, width=config.width)

    def measure(state: pg.train.TrainState, rollout: pg.Rollout) -> dict[str, Array]:
        found = digits.accuracy(task, decoder, state.params)
        return {"expected": found.mean(), "sampled_tokens": rollout.mask.sum()}

    def learner(name: str, objective: pg.Objective) -> digits.Curves:
        return digits.learner(
            task,
            decoder,
            objective,
            lambda rate: optax.adam(digits.increasing(10, rate)),
            steps=batches(config, name) + 1,  # the last batch shows what the others came to
            pretraining=config.pretraining,
            reward=reward,
            measure=measure,
        )

    best: dict[str, dict[str, np.ndarray]] = {}
    rates: dict[str, float] = {}
    for name, objective in methods(config).items():
        curves_of = learner(name, objective)
        tuning = curves_of(
            rates=config.learning_rates,
            seeds=config.tuning_seeds,
            first_seed=1000,
            label=f"{name}, learning rates",
        )
        chosen = int(np.argmax(tuning["expected"][..., -1].mean(1)))
        rates[name] = config.learning_rates[chosen]
        found = curves_of(
            rates=(rates[name],), seeds=config.seeds, first_seed=config.first_seed, label=name
        )
        best[name] = {column: x[0] for column, x in found.items()}
    curves = {name: x["expected"] for name, x in best.items()}
    used = {name: np.cumsum(x["update_tokens"][:, :-1], axis=1) for name, x in best.items()}
    goal = curves["GRPO"][:, -1]
    table = {}
    for name, x in best.items():
        pairs = list(zip(curves[name], goal, strict=True))
        there = np.array([first_at(curve, level) for curve, level in pairs])
        tokens = np.insert(used[name], 0, 0.0, axis=1)
        reached = [
            row[int(at)] if np.isfinite(at) else np.nan
            for row, at in zip(tokens, there, strict=True)
        ]
        table[name] = {
            "learning rate": np.array([rates[name]]),
            "first reward": curves[name][:, 0],
            "reward at GRPO's end": curves[name][:, config.steps],
            "final reward": curves[name][:, -1],
            "tokens used": used[name][:, -1] / x["sampled_tokens"][:, :-1].sum(1),
            "tokens to its reward": np.array(reached) / used["GRPO"][:, -1],
            "batches to it": there,
            "usefulness": x["usefulness"][:, :-1].mean(1),
        }
    cost = table["D3S"]["tokens to its reward"]
    ends = (min(config.learning_rates), max(config.learning_rates))
    outside = [name for name in ("GRPO", "D3S") if rates[name] in ends]
    claims = [
        reproduction.Claim(
            "D3S comes to the tuned GRPO's final reward with at most 60% of its update tokens, "
            f"in up to {config.longer:g} times its batches",
            bool(np.mean(cost) <= 0.6),  # not a number if one seed does not come to it
            f"{np.mean(cost):.3f} (at most 0.600); {np.isfinite(cost).sum()} seeds come to it",
        ),
        reproduction.above(
            "most rows that D3S learns from have a signal", table["D3S"]["usefulness"], 0.85
        ),
        reproduction.Claim(
            "the list of learning rates encloses the best of GRPO and of D3S",
            not outside,
            f"{', '.join(outside) or 'neither'} at its end",
        ),
    ]
    return reproduction.Findings(
        title="Down-sampling, best learning rate of each",
        table=table,
        claims=claims,
        panels={
            "expected reward by batch": {
                name: reproduction.band(np.arange(x.shape[1]), x) for name, x in curves.items()
            },
            "rows with a signal": {
                name: reproduction.band(np.arange(x["usefulness"].shape[1]), x["usefulness"])
                for name, x in best.items()
            },
        },
    )


def first_at(curve: np.ndarray, level: float) -> float:
    """The batch from which on the curve has reached the level; not a number if it never does."""
    there = np.flatnonzero(curve >= level)
    return float(there[0]) if there.size else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "d3s_efficiency", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
