"""A bonus for a tool only where it helps (GCPO).

Half of the prompts are solved with probability .8 with a tool and .3 without; for the other half it
is the other way round. The policy starts with the tool in 12% of its samples. A bonus of either
sign, decided per prompt by contrast, must be worth at least .03 accuracy over GRPO after 40 steps,
as much as an unconditional bonus, while the tool is used where it harms at least 30% less often
than with the unconditional one (arXiv 2506.07160). Exits with 1 if that does not show.

Of the two ways to contrast, the claims are about the one with samples drawn for the purpose, tool
forced or forbidden, of which a group has as many again; contrast within the group is shown, too.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction, tabular
from pgjax import objectives
from pgjax.diagnostics import problems
from pgjax.objectives import baselines
from pgjax.rewards import contrastive
from pgjax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Config:
    """A choice for or against a tool."""

    seeds: int = 20
    """Runs of every method."""
    steps: int = 300
    """Updates; the claims about speed are measured after `early` of them."""
    early: int = 40
    """See `steps`."""
    learning_rate: float = 3.0
    """Of plain gradient descent, the same for all."""
    prompts: int = 8
    """Half of them are helped."""
    group_size: int = 8
    """Samples per prompt and step."""
    first_use: float = 0.12
    """How often the tool is used before training."""
    bonus: float = 0.5
    """Weight of the tool's reward."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/gcpo_tool")
    """Directory for table and plot."""


KIND, USE, OUTCOME = 1, 2, 3  # positions


def tool_problem(prompts: int, *, contrast: float) -> problems.TokenProblem:
    """Nature marks a share of the samples as drawn for contrast, the policy chooses for or against
    the tool (for marked samples nature does, evenly), nature decides the outcome."""

    def chances(tokens: Array) -> Array:
        helped = tokens[:, 0] < prompts // 2
        return jnp.where((tokens[:, USE] == 1) == helped, 0.8, 0.3)

    def roles(tokens: Array) -> Array:
        fixed = jnp.array(
            [
                problems.NOBODY,
                problems.NATURE if contrast else problems.NOBODY,
                problems.POLICY,
                problems.NATURE,
            ]
        )
        forced = (tokens[:, KIND] == 1)[:, None] & (jnp.arange(4) == USE)
        return jnp.where(forced, problems.NATURE, jnp.broadcast_to(fixed, tokens.shape))

    def nature(tokens: Array) -> Array:
        half = jnp.full(tokens.shape[0], 0.5)
        ones = jnp.stack([half, half * 0 + contrast, half, chances(tokens)], axis=1)
        return jnp.stack([1 - ones, ones], axis=-1)

    def logits(params: Array, tokens: Array) -> Array:
        use = jnp.broadcast_to(params[tokens[:, 0]][:, None], tokens.shape)
        return jnp.stack([jnp.zeros_like(use), use], axis=-1)

    return problems.TokenProblem(
        num_prompts=prompts,
        num_actions=2,
        horizon=3,
        logits=logits,
        reward=lambda tokens: (tokens[:, OUTCOME] == 1).astype(jnp.float32),
        roles=roles,
        nature=nature,
        extras=lambda tokens: {"used": tokens[:, USE] == 1, "forced": tokens[:, KIND] == 1},
    )


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, seeds=3, steps=8, early=4)
    helped = jnp.arange(config.prompts) < config.prompts // 2

    def measure(params: Float[Array, " P"]) -> dict[str, Array]:
        use = jax.nn.sigmoid(params)
        good = jnp.where(helped, use, 1 - use)
        return {
            "accuracy": jnp.mean(0.3 + 0.5 * good),
            "use where it helps": jnp.mean(use, where=helped),
            "use where it harms": jnp.mean(use, where=~helped),
        }

    def everywhere(rollout: Rollout) -> Array:
        ids = rollout.group_ids
        return contrastive.gcpo_reward(
            rollout.rewards,
            rollout.extras["used"],  # type: ignore[index]
            rollout.mask.sum(-1),
            jnp.ones_like(ids),
            ids,
            use_weight=config.bonus,
            length_weight=0.0,
            length_reference=1.0,
        )

    # All samples are one token long: the reward for length would be the same for all.
    options: dict[str, Any] = {
        "length_reference": 1.0,
        "length_weight": 0.0,
        "use_weight": config.bonus,
    }
    plain = tool_problem(config.prompts, contrast=0.0)
    doubled = tool_problem(config.prompts, contrast=0.5)
    forced = baselines.gcpo(**options, contrast=lambda rollout: rollout.extras["forced"])  # type: ignore[index]
    methods = {
        "GRPO": (plain, objectives.grpo(), config.group_size),
        "bonus everywhere": (
            plain,
            dataclasses.replace(objectives.grpo(), rewards=everywhere),
            config.group_size,
        ),
        "GCPO, contrast within the group": (plain, baselines.gcpo(**options), config.group_size),
        "GCPO, samples for contrast": (doubled, forced, 2 * config.group_size),
    }
    start = float(np.log(config.first_use / (1 - config.first_use)))
    curves = {
        name: tabular.learn(
            problem,
            objective,
            optax.sgd(config.learning_rate),
            init=lambda key: jnp.full(config.prompts, start),
            measure=measure,
            group_size=size,
            steps=config.steps,
            seeds=config.seeds,
        )
        for name, (problem, objective, size) in reproduction.track(methods.items())
    }
    names = ("accuracy", "use where it helps", "use where it harms")
    table = {
        method: {
            **{f"{name} @{config.early}": x[name][:, config.early] for name in names},
            **{f"{name} @{config.steps}": x[f"final/{name}"] for name in names},
        }
        for method, x in curves.items()
    }
    steps = np.arange(config.steps)
    return reproduction.Findings(
        title="A tool that helps on half of the prompts",
        table=table,
        claims=claims(table, config),
        panels={
            name: {method: reproduction.band(steps, x[name]) for method, x in curves.items()}
            for name in names
        },
    )


def claims(table: dict[str, dict[str, Any]], config: Config) -> list[reproduction.Claim]:
    ours, plain = table["GCPO, samples for contrast"], table["GRPO"]
    always = table["bonus everywhere"]
    accuracy, harm = f"accuracy @{config.early}", f"use where it harms @{config.early}"
    return [
        reproduction.above(
            f"accuracy gained over GRPO after {config.early} steps",
            ours[accuracy] - plain[accuracy],
            0.03,
        ),
        reproduction.above(
            "accuracy gained over the bonus everywhere", ours[accuracy] - always[accuracy], 0.0
        ),
        reproduction.above(
            "share of the harmful use under the bonus everywhere that is avoided",
            1 - ours[harm] / np.mean(always[harm]),
            0.3,
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main("gcpo_tool", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
