"""What a completion was worth: verifiable rewards, control rewards, shaping terms."""

from pgjax.rewards.numeric import exact_reward, numeric_reward
from pgjax.rewards.shaping import soft_overlong_penalty
from pgjax.rewards.spurious import (
    inverted_reward,
    majority_incorrect_label,
    majority_incorrect_reward,
    random_reward,
)
from pgjax.rewards.verifier import Failure, call_verifier

__all__ = [
    "Failure",
    "call_verifier",
    "exact_reward",
    "inverted_reward",
    "majority_incorrect_label",
    "majority_incorrect_reward",
    "numeric_reward",
    "random_reward",
    "soft_overlong_penalty",
]
