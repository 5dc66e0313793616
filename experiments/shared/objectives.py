"""A recipe by name, with options from a command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pgjax as pg

# Recipes that need no more than completions and their rewards; others need turns, demonstrations or
# facts that only a task of one's own can give.
ObjectiveName = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "lite_ppo", "ppo", "rloo", "reinforce",
    "reinforce_pp", "adora", "canon", "canon_entropy", "capo", "capo_adam", "copo", "d3s", "disco",
    "disco_b", "disco_ratio", "g2rl", "gtpo", "minirl", "oblr", "polychromic", "stratified_grpo",
]  # fmt: skip
# Of options that no run knows.
_EXAMPLES = {"alpha": "0.8", "vocab_size": "151936", "hidden_size": "1536"}
AggregateName = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]


def make_objective(
    name: str, options: Sequence[str], *, aggregate: str | None, known: Mapping[str, Any]
) -> pg.Objective:
    """The recipe with its options.

    Args:
      name: of the recipe in `pgjax.objectives`.
      options: keywords of it, such as `kl_coefficient=0.01`.
      aggregate: a reduction of `pgjax.aggregate` instead of the recipe's own; None: grpo gets
        `token_mean`, as most code has it today, the others keep theirs.
      known: what the run knows itself, for options that a recipe requires: `length` and
        `max_length` in tokens, `group_size`, `steps`, `learning_rate`, and where the model is
        known `vocab_size` and `hidden_size`.

    Raises:
      ValueError: an option that is no `name=value`, that the recipe does not have, or that it
        requires and that was not given.
    """
    recipe = getattr(pg.objectives, name)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"objective_options: expected name=value, got {option!r}")
        try:
            values[key] = json.loads(value.replace("True", "true").replace("False", "false"))
        except json.JSONDecodeError:
            raise ValueError(
                f"objective_options: {key}: expected a number or true/false, got {value!r}"
            ) from None
    parameters = inspect.signature(recipe).parameters
    for key in values:
        if key not in parameters:
            raise ValueError(
                f"objective_options: {name} has no option {key!r}, "
                f"only {', '.join(parameters) or 'none'}"
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in values:
            if key not in known:
                raise ValueError(
                    f"objective_options: {name} needs {key}, for instance "
                    f"--objective-options {key}={_EXAMPLES.get(key, '1')}"
                )
            values[key] = known[key]
    objective = recipe(**values)
    chosen = aggregate or ("token_mean" if name == "grpo" else None)
    if chosen is None:
        return objective
    return dataclasses.replace(objective, aggregate=getattr(pg.aggregate, chosen))
