"""What to train on next, how much of it, and how much of each signal to use by when."""

from __future__ import annotations

from pgjax.curriculum.batch_size import (
    accumulate_moments,
    coordinate_test,
    inner_product_test,
    next_batch_size,
    norm_test,
    orthogonality_test,
)
from pgjax.curriculum.mixing import accuracy_mix, cosine_restarts
from pgjax.curriculum.sub_instruction import (
    Walk,
    random_walk_goal,
    subgoal_mask,
    subgoal_size,
    warm_start_chance,
    warm_start_mask,
)
from pgjax.curriculum.useful import (
    kmeans2,
    separating_epoch,
    slow_cluster_mask,
    upsample_indices,
)

__all__ = [
    "Walk",
    "accumulate_moments",
    "accuracy_mix",
    "coordinate_test",
    "cosine_restarts",
    "inner_product_test",
    "kmeans2",
    "next_batch_size",
    "norm_test",
    "orthogonality_test",
    "random_walk_goal",
    "separating_epoch",
    "slow_cluster_mask",
    "subgoal_mask",
    "subgoal_size",
    "upsample_indices",
    "warm_start_chance",
    "warm_start_mask",
]
