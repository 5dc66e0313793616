"""What a trainer minimises, and the published recipes, each a few lines over the parts."""

from pgjax.objectives.group_relative import cispo, dapo, dr_grpo, grpo, gspo, lite_ppo
from pgjax.objectives.objective import Memory, Objective, Regularizer
from pgjax.objectives.policy_gradient import ppo, reinforce, reinforce_pp, rloo, supervised
from pgjax.objectives.regularizers import entropy_bonus, kl_to_reference, value_loss
from pgjax.objectives.transforms import with_mismatch_weights

__all__ = [
    "Memory",
    "Objective",
    "Regularizer",
    "cispo",
    "dapo",
    "dr_grpo",
    "entropy_bonus",
    "grpo",
    "gspo",
    "kl_to_reference",
    "lite_ppo",
    "ppo",
    "reinforce",
    "reinforce_pp",
    "rloo",
    "supervised",
    "value_loss",
    "with_mismatch_weights",
]
