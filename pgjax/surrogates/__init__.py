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
from pgjax.surrogates.mismatch import (
    masked_weights,
    truncated_sequence_weights,
    truncated_weights,
)
from pgjax.surrogates.values import clipped_value_error, value_error

__all__ = [
    "cispo",
    "clipped",
    "clipped_value_error",
    "dual_clipped",
    "importance_ratio",
    "importance_weighted",
    "masked_weights",
    "score_function",
    "sequence_ratio",
    "truncated_sequence_weights",
    "truncated_weights",
    "unified",
    "value_error",
]
