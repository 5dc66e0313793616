"""Rewards to advantages.

A sample whose reward is not finite (its verifier failed) counts in no statistic and gets advantage
0. Results carry no `stop_gradient`: the surrogates apply it.
"""

from __future__ import annotations

from pgjax.advantages.batch import batch_normalize, group_mean_batch_std
from pgjax.advantages.bayes import (
    bpg_model_1,
    bpg_model_2,
    bpg_natural_gradient,
    fisher_inverse_update,
    fisher_matrix,
    whitened_scores,
)
from pgjax.advantages.bayes_critic import bac_gradient
from pgjax.advantages.bayes_sparse import bpg_model_1_sparse, bpg_model_2_sparse
from pgjax.advantages.conditional import conditional_advantage, median_split
from pgjax.advantages.consistency import (
    answer_entropy,
    consistency_factor,
    consistency_weight,
    global_prompt_advantage,
)
from pgjax.advantages.entropy_modulated import (
    centered_steps,
    entropy_scale,
    future_clarity,
    modulate_by_entropy,
    normalized_entropy,
    step_entropy,
)
from pgjax.advantages.group import centered, group_normalize, leave_one_out
from pgjax.advantages.hybrid import soft_coefficients, switch_coefficients
from pgjax.advantages.novelty import (
    feature_novelty,
    printed_novelty_reward,
    relative_novelty,
    scaled_novelty_reward,
    signed_novelty_reward,
)
from pgjax.advantages.optimal_baseline import (
    BaselineHistory,
    history_baseline,
    history_init,
    history_update,
    score_norm_proxy,
    token_score_norms,
    token_weighted_leave_one_out,
    weighted_centered,
    weighted_leave_one_out,
)
from pgjax.advantages.reweight import (
    RolloutUtility,
    rollout_utility,
    success_is_longer,
    success_is_rare,
    utility_weights,
)
from pgjax.advantages.scaling import (
    batch_centered,
    by_batch_std,
    by_centered_batch_std,
    by_group_std,
    uncentered,
    unscaled,
)
from pgjax.advantages.sets import (
    all_sets,
    duplicate_labels,
    grouped_set_advantage,
    polychromic,
    random_sets,
    set_advantage,
    set_scores,
    unique_fraction,
)
from pgjax.advantages.stratified import stratified_advantage, stratum_of_count
from pgjax.advantages.token import at_last_token, kl_shaped_returns, to_tokens, token_whiten
from pgjax.advantages.turn_level import turn_leave_one_out, turn_level

__all__ = [
    "BaselineHistory",
    "RolloutUtility",
    "all_sets",
    "answer_entropy",
    "at_last_token",
    "bac_gradient",
    "batch_centered",
    "batch_normalize",
    "bpg_model_1",
    "bpg_model_1_sparse",
    "bpg_model_2",
    "bpg_model_2_sparse",
    "bpg_natural_gradient",
    "by_batch_std",
    "by_centered_batch_std",
    "by_group_std",
    "centered",
    "centered_steps",
    "conditional_advantage",
    "consistency_factor",
    "consistency_weight",
    "duplicate_labels",
    "entropy_scale",
    "feature_novelty",
    "fisher_inverse_update",
    "fisher_matrix",
    "future_clarity",
    "global_prompt_advantage",
    "group_mean_batch_std",
    "group_normalize",
    "grouped_set_advantage",
    "history_baseline",
    "history_init",
    "history_update",
    "kl_shaped_returns",
    "leave_one_out",
    "median_split",
    "modulate_by_entropy",
    "normalized_entropy",
    "polychromic",
    "printed_novelty_reward",
    "random_sets",
    "relative_novelty",
    "rollout_utility",
    "scaled_novelty_reward",
    "score_norm_proxy",
    "set_advantage",
    "set_scores",
    "signed_novelty_reward",
    "soft_coefficients",
    "step_entropy",
    "stratified_advantage",
    "stratum_of_count",
    "success_is_longer",
    "success_is_rare",
    "switch_coefficients",
    "to_tokens",
    "token_score_norms",
    "token_weighted_leave_one_out",
    "token_whiten",
    "turn_leave_one_out",
    "turn_level",
    "uncentered",
    "unique_fraction",
    "unscaled",
    "utility_weights",
    "weighted_centered",
    "weighted_leave_one_out",
    "whitened_scores",
]
