"""Value functions: the errors they are trained by and the targets they are trained on.

Errors are one a sample, to be minimised; nothing here reduces. The half squared error is
`surrogates.value_error`, the same function under both names.
"""

from __future__ import annotations

from pgjax.surrogates.values import value_error
from pgjax.values import inventory, martingale
from pgjax.values.composite import composite_error
from pgjax.values.continuous import clstd, ctd_lambda_online, ctd_online
from pgjax.values.finite_horizon import Plan, optimistic_values, policy_values
from pgjax.values.hybrid import hybrid_critic_loss, sampled_values
from pgjax.values.losses import expectile_error, huber_error
from pgjax.values.low_rank import (
    Completion,
    anchor_complete,
    chebyshev_anchors,
    observed_entries,
    pivoted_anchors,
    random_anchors,
)
from pgjax.values.low_rank_iteration import (
    LowRankRun,
    low_rank_backup,
    low_rank_value_iteration,
    sampled_backup,
)
from pgjax.values.rank import beer_bound, beer_penalty
from pgjax.values.targets import (
    double_greedy_values,
    greedy_values,
    one_step_targets,
    q_lambda_targets,
    taken_values,
)
from pgjax.values.weights import advantage_weights

__all__ = [
    "Completion",
    "LowRankRun",
    "Plan",
    "advantage_weights",
    "anchor_complete",
    "beer_bound",
    "beer_penalty",
    "chebyshev_anchors",
    "clstd",
    "composite_error",
    "ctd_lambda_online",
    "ctd_online",
    "double_greedy_values",
    "expectile_error",
    "greedy_values",
    "huber_error",
    "hybrid_critic_loss",
    "inventory",
    "low_rank_backup",
    "low_rank_value_iteration",
    "martingale",
    "observed_entries",
    "one_step_targets",
    "optimistic_values",
    "pivoted_anchors",
    "policy_values",
    "q_lambda_targets",
    "random_anchors",
    "sampled_backup",
    "sampled_values",
    "taken_values",
    "value_error",
]
