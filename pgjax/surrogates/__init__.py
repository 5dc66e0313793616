"""Per-token losses, to be minimised, and the one estimator they are all instances of.

None of them reduces: `pgjax.aggregate` does.
"""

from pgjax.surrogates.core import (
    cispo,
    clipped,
    dual_clipped,
    importance_ratio,
    importance_weighted,
    score_function,
    sequence_ratio,
    unified,
)
from pgjax.surrogates.discriminative import (
    class_balanced,
    hard_negative_weights,
    kl_hinge,
    log_likelihood,
    sequence_scores,
)
from pgjax.surrogates.minirl import minirl
from pgjax.surrogates.mismatch import (
    masked_weights,
    truncated_sequence_weights,
    truncated_weights,
)
from pgjax.surrogates.mixture import best_expert_loss, frequency_loss
from pgjax.surrogates.offline import shaped, shaped_weight, unit_denominator
from pgjax.surrogates.values import clipped_value_error, value_error

__all__ = [
    "best_expert_loss",
    "cispo",
    "class_balanced",
    "clipped",
    "clipped_value_error",
    "dual_clipped",
    "frequency_loss",
    "hard_negative_weights",
    "importance_ratio",
    "importance_weighted",
    "kl_hinge",
    "log_likelihood",
    "masked_weights",
    "minirl",
    "score_function",
    "sequence_ratio",
    "sequence_scores",
    "shaped",
    "shaped_weight",
    "truncated_sequence_weights",
    "truncated_weights",
    "unified",
    "unit_denominator",
    "value_error",
]
