"""What a completion was worth: verifiable rewards, control rewards, shaping terms."""

from pgjax.rewards import isolated
from pgjax.rewards.contrastive import contrastive_mask, gcpo_reward, length_reward
from pgjax.rewards.density import only_complete, sparsify
from pgjax.rewards.numeric import exact_reward, numeric_reward
from pgjax.rewards.potential import potential_shaping, with_potential
from pgjax.rewards.profiling import profiling_reward, time_coverage
from pgjax.rewards.shaping import soft_overlong_penalty
from pgjax.rewards.spurious import (
    inverted_reward,
    majority_incorrect_label,
    majority_incorrect_reward,
    random_reward,
)
from pgjax.rewards.verifier import Failure, call_verifier, own_completions

__all__ = [
    "Failure",
    "call_verifier",
    "contrastive_mask",
    "exact_reward",
    "gcpo_reward",
    "inverted_reward",
    "isolated",
    "length_reward",
    "majority_incorrect_label",
    "majority_incorrect_reward",
    "numeric_reward",
    "only_complete",
    "own_completions",
    "potential_shaping",
    "profiling_reward",
    "random_reward",
    "soft_overlong_penalty",
    "sparsify",
    "time_coverage",
    "with_potential",
]
