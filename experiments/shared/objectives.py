"""A recipe by name, with options from a command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from typing import Any, Literal

import pgjax as pg

ObjectiveName = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "lite_ppo", "ppo", "rloo", "reinforce",
    "reinforce_pp",
]  # fmt: skip
AggregateName = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]


def make_objective(
    name: str, options: Sequence[str], *, aggregate: str | None, length: int
) -> pg.Objective:
    """The recipe with its options.

    Args:
      name: of the recipe in `pgjax.objectives`.
      options: keywords of it, such as `kl_coefficient=0.01`.
      aggregate: a reduction of `pgjax.aggregate` instead of the recipe's own; None: grpo gets
        `token_mean`, as most code has it today, the others keep theirs.
      length: the generation budget, for dr_grpo.

    Raises:
      ValueError: an option that is no `name=value`, or that the recipe does not have.
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
    if name == "dr_grpo":
        values.setdefault("length", length)
    known = inspect.signature(recipe).parameters
    for key in values:
        if key not in known:
            raise ValueError(
                f"objective_options: {name} has no option {key!r}, "
                f"only {', '.join(known) or 'none'}"
            )
    objective = recipe(**values)
    chosen = aggregate or ("token_mean" if name == "grpo" else None)
    if chosen is None:
        return objective
    return dataclasses.replace(objective, aggregate=getattr(pg.aggregate, chosen))
