"""CAPO: does the predicted change of the policy rank steps as their true divergence does?

GRPO trains a linear policy with weights shared by all prompts and positions, at rising learning
rates. Of each batch the mean of the tokens' predicted shifts, from the power sums that `capo` uses,
is set against KL(old ‖ new) of the step that was taken, exact over all states. Exits 1 if
Spearman's rank correlation over the steps of all learning rates is not above 0.7 or if, as a harder
question, it is not above 0.7 within the runs of one learning rate either.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import pgjax as pg
from experiments.shared import reproduction, tabular
from pgjax import objectives
from pgjax.diagnostics import problems
from pgjax.masks import curvature

OPEN, CLOSE, FIRST_DIGIT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    out: pathlib.Path = pathlib.Path("runs/capo_diagnostic")
    """Where results go."""
    seeds: int = 5
    """Independent runs of every learning rate."""
    steps: int = 100
    """Batches."""
    group_size: int = 8
    """Samples of each prompt."""
    learning_rates: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Of plain gradient descent."""
    quick: bool = False
    """A tiny version, for tests."""


PROMPTS, FEATURES, DIGITS, CHOICES = 16, 8, 2, 6
HORIZON = DIGITS + 2
ACTIONS = FIRST_DIGIT + CHOICES


def make_problem() -> problems.TokenProblem:
    """Opening token, digits, closing token; a reward only in perfect format: the share of right
    digits. Every state's features have length 1, as `problems.outputs` takes them to have."""
    keys = jax.random.split(jax.random.key(40), 2)
    features = jax.random.normal(keys[0], (PROMPTS, FEATURES))
    features /= jnp.linalg.norm(features, axis=1, keepdims=True)
    answers = jax.random.randint(keys[1], (PROMPTS, DIGITS), FIRST_DIGIT, ACTIONS)

    def logits(params: Array, tokens: Array) -> Array:
        prompt = jnp.repeat(features[tokens[:, 0]][:, None], HORIZON, axis=1)
        place = jnp.broadcast_to(jnp.eye(HORIZON), (len(tokens), HORIZON, HORIZON))
        hidden = jnp.concatenate([place, prompt], axis=-1) / 2**0.5
        return jnp.pad(hidden @ params, ((0, 0), (1, 0), (0, 0)))

    def reward(tokens: Array) -> Array:
        formed = (tokens[:, 1] == OPEN) & (tokens[:, -1] == CLOSE)
        right = tokens[:, 2:-1] == answers[tokens[:, 0]]
        return formed * jnp.mean(right, axis=1)

    return problems.TokenProblem(
        num_prompts=PROMPTS,
        num_actions=ACTIONS,
        horizon=HORIZON,
        logits=logits,
        reward=reward,
        extras=lambda tokens: {
            "answers": jnp.pad(answers[tokens[:, 0]], ((0, 0), (2, 1)), constant_values=CLOSE)
            .at[:, 1]
            .set(OPEN)
        },
    )


def initial() -> Array:
    """Format tokens lead in their places, digits do not."""
    lead = 3.0 * 2**0.5
    weights = jnp.zeros((HORIZON + FEATURES, ACTIONS))
    return weights.at[0, OPEN].set(lead).at[HORIZON - 1, CLOSE].set(lead)


def every_state(problem: problems.TokenProblem, params: Array) -> Array:
    """Log-probs `[prompts, positions, actions]`; no position depends on what was drawn before."""
    tokens = jnp.zeros((PROMPTS, 1 + HORIZON), jnp.int32).at[:, 0].set(jnp.arange(PROMPTS))
    return jax.nn.log_softmax(problem.logits(params, tokens)[:, 1:])


def with_shift(objective: pg.Objective, learning_rate: float) -> pg.Objective:
    """The objective with the mean predicted shift of its tokens among the diagnostics."""

    def extras(rollout: pg.Rollout) -> dict[str, Array]:
        old, advantages = rollout.old, rollout.advantages
        assert old is not None and advantages is not None
        assert old.square_sum is not None and old.cube_sum is not None
        assert old.feature_square_norm is not None
        found = curvature.head_curvature_sgd(
            old.logprobs,
            old.square_sum,
            old.cube_sum,
            old.feature_square_norm,
            advantages,
            learning_rate=learning_rate,
        )
        return {"shift": found.shift}

    def term(outputs: pg.PolicyOutputs, rollout: pg.Rollout) -> Array:
        assert rollout.extras is not None
        return rollout.extras["shift"]

    return dataclasses.replace(
        objective,
        extras=extras,
        old_needs=frozenset({"square_sum", "cube_sum", "feature_square_norm"}),
        regularizers=(*objective.regularizers, pg.Regularizer("shift", term, 0.0)),
    )


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, seeds=2, steps=6, learning_rates=(1.0, 3.0))
    problem = make_problem()
    table: dict[str, dict[str, np.ndarray]] = {}
    predicted, true = [], []
    for rate in reproduction.track(config.learning_rates):
        found = tabular.learn(
            problem,
            with_shift(objectives.grpo(), rate),
            optax.sgd(rate),
            init=lambda key: initial(),
            measure=lambda params: {"logprobs": every_state(problem, params)},
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
        )
        policies = np.concatenate(
            [found["logprobs"], found["final/logprobs"][:, None]], axis=1
        ).astype(float)
        old, new = policies[:, :-1], policies[:, 1:]
        divergence = np.sum(np.exp(old) * (old - new), axis=-1).mean((-1, -2))
        predicted.append(found["shift"])
        true.append(divergence)
        table[f"learning rate {rate}"] = {
            "rank correlation": rank_correlations(found["shift"], divergence),
            "mean divergence": divergence.mean(1),
            "mean predicted shift": found["shift"].mean(1),
            "final reward": found["reward"][:, -10:].mean(1),
        }
    pooled = rank_correlations(np.concatenate(predicted, axis=1), np.concatenate(true, axis=1))
    table["all"] = {"rank correlation": pooled}
    within = np.concatenate(
        [table[f"learning rate {r}"]["rank correlation"] for r in config.learning_rates]
    )
    claims = [
        reproduction.above("over all steps and learning rates", pooled, 0.7),
        reproduction.above("within runs of one learning rate", within, 0.7),
    ]
    panels = {
        f"learning rate {rate}": {
            "KL(old, new)": reproduction.band(np.arange(config.steps), divergence),
            "predicted, scaled": reproduction.band(
                np.arange(config.steps), shift * divergence.mean() / shift.mean()
            ),
        }
        for rate, shift, divergence in zip(config.learning_rates, predicted, true, strict=True)
    }
    return reproduction.Findings(
        title="Predicted and true change of the policy", table=table, claims=claims, panels=panels
    )


def rank_correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman's, of each row."""

    def ranks(x: np.ndarray) -> np.ndarray:
        return np.argsort(np.argsort(x, axis=1), axis=1)

    pairs = zip(ranks(left), ranks(right), strict=True)
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs])


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "capo_diagnostic", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
