"""Value functions: the errors they are trained by and the targets they are trained on.

Errors are one a sample, to be minimised; nothing here reduces. The half squared error is
`surrogates.value_error`, the same function under both names.
"""

from __future__ import annotations

from pgjax.surrogates.values import value_error
from pgjax.values import inventory, martingale
from pgjax.values.continuous import clstd, ctd_lambda_online, ctd_online
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
    "advantage_weights",
    "anchor_complete",
    "chebyshev_anchors",
    "clstd",
    "ctd_lambda_online",
    "ctd_online",
    "double_greedy_values",
    "expectile_error",
    "greedy_values",
    "huber_error",
    "inventory",
    "low_rank_backup",
    "low_rank_value_iteration",
    "martingale",
    "observed_entries",
    "one_step_targets",
    "pivoted_anchors",
    "q_lambda_targets",
    "random_anchors",
    "sampled_backup",
    "taken_values",
    "value_error",
]
