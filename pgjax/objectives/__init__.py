"""What a trainer minimises, and the published recipes, each a few lines over the parts."""

from pgjax.objectives.agentic import (
    by_turn,
    empg,
    trloo,
    with_entropy_modulation,
    with_mismatch_rejection,
    with_rejection,
    with_total_rewards,
)
from pgjax.objectives.baselines import gcpo, normalized, oblr, oblr_with_history, polychromic
from pgjax.objectives.curvature_aware import capo, capo_adam
from pgjax.objectives.discriminative import copo, disco, disco_b, disco_ratio
from pgjax.objectives.group_relative import cispo, dapo, dr_grpo, grpo, gspo, lite_ppo
from pgjax.objectives.hybrid import hpt, luffy, minirl, mixed, srft
from pgjax.objectives.objective import Memory, Objective, Regularizer, step_count
from pgjax.objectives.policy_gradient import ppo, reinforce, reinforce_pp, rloo, supervised
from pgjax.objectives.regularizers import entropy_bonus, kl_to_reference, value_loss
from pgjax.objectives.stratified import (
    adora,
    canon,
    canon_entropy,
    g2rl,
    stratified_grpo,
    with_utility_weights,
)
from pgjax.objectives.token_selection import d3s, gtpo, with_down_sampling
from pgjax.objectives.transforms import with_mismatch_weights

__all__ = [
    "Memory",
    "Objective",
    "Regularizer",
    "adora",
    "by_turn",
    "canon",
    "canon_entropy",
    "capo",
    "capo_adam",
    "cispo",
    "copo",
    "d3s",
    "dapo",
    "disco",
    "disco_b",
    "disco_ratio",
    "dr_grpo",
    "empg",
    "entropy_bonus",
    "g2rl",
    "gcpo",
    "grpo",
    "gspo",
    "gtpo",
    "hpt",
    "kl_to_reference",
    "lite_ppo",
    "luffy",
    "minirl",
    "mixed",
    "normalized",
    "oblr",
    "oblr_with_history",
    "polychromic",
    "ppo",
    "reinforce",
    "reinforce_pp",
    "rloo",
    "srft",
    "step_count",
    "stratified_grpo",
    "supervised",
    "trloo",
    "value_loss",
    "with_down_sampling",
    "with_entropy_modulation",
    "with_mismatch_rejection",
    "with_mismatch_weights",
    "with_rejection",
    "with_total_rewards",
    "with_utility_weights",
]
