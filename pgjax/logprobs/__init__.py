"""Log-probs and entropies of tokens, their sums over sequences, and KL estimators.

A token's log-prob is stored at the token's own index, so `from_logits` and `from_hidden` are the
only functions of the library that shift by one.
"""

from pgjax.logprobs.divergences import (
    kl_categorical,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_straight_through,
)
from pgjax.logprobs.hidden import from_hidden, from_hidden_with_entropy
from pgjax.logprobs.logits import entropy_from_logits, from_logits
from pgjax.logprobs.sequences import sequence, sequence_mean, shift_right, where_mask
from pgjax.logprobs.statistics import power_sum, score_features
from pgjax.logprobs.support import token_support

__all__ = [
    "entropy_from_logits",
    "from_hidden",
    "from_hidden_with_entropy",
    "from_logits",
    "kl_categorical",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_straight_through",
    "power_sum",
    "score_features",
    "sequence",
    "sequence_mean",
    "shift_right",
    "token_support",
    "where_mask",
]
