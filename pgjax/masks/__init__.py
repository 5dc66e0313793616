"""Which tokens and samples carry gradient.

Masks are boolean arrays and combine by `&`. Trust-region masks depend on the current policy and act
inside a surrogate; selection masks depend on the whole batch and act in `Objective.prepare`. What
they are made from (curvatures, probabilities to be kept, weights of conflicts) is here too.
"""

from pgjax.masks.conflict import Conflicts, conflict_tokens, conflict_weights
from pgjax.masks.curvature import (
    Curvature,
    ShadowAdam,
    adam_direction,
    curvature_mask,
    head_curvature,
    head_curvature_sgd,
    head_gradient,
    head_support,
    sgd_direction,
    shadow_adam_init,
    shadow_adam_update,
)
from pgjax.masks.downsample import (
    max_variance_subset,
    max_variance_subset_by_group,
    rows_to_keep,
    token_uncertainty,
    topk_token_mask,
)
from pgjax.masks.entropy_filter import entropy_gate
from pgjax.masks.mismatch import (
    geometric_mismatch,
    sequence_mismatch,
    token_mismatch,
    veto,
)
from pgjax.masks.quality import bernoulli_mask, coverage_keep_probability, geometric_coverage
from pgjax.masks.selection import finite_rewards, informative_groups, overlong_filter
from pgjax.masks.trajectory_mismatch import (
    trajectory_geometric_mismatch,
    trajectory_sequence_mismatch,
    trajectory_veto,
    turn_geometric_mismatch,
    turn_sequence_mismatch,
)
from pgjax.masks.trust_region import dual_clip, ppo_clip

__all__ = [
    "Conflicts",
    "Curvature",
    "ShadowAdam",
    "adam_direction",
    "bernoulli_mask",
    "conflict_tokens",
    "conflict_weights",
    "coverage_keep_probability",
    "curvature_mask",
    "dual_clip",
    "entropy_gate",
    "finite_rewards",
    "geometric_coverage",
    "geometric_mismatch",
    "head_curvature",
    "head_curvature_sgd",
    "head_gradient",
    "head_support",
    "informative_groups",
    "max_variance_subset",
    "max_variance_subset_by_group",
    "overlong_filter",
    "ppo_clip",
    "rows_to_keep",
    "sequence_mismatch",
    "sgd_direction",
    "shadow_adam_init",
    "shadow_adam_update",
    "token_mismatch",
    "token_uncertainty",
    "topk_token_mask",
    "trajectory_geometric_mismatch",
    "trajectory_sequence_mismatch",
    "trajectory_veto",
    "turn_geometric_mismatch",
    "turn_sequence_mismatch",
    "veto",
]
