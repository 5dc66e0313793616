"""Which tokens and samples carry gradient.

Every function returns a boolean array; masks combine by `&`. Trust-region masks depend on the
current policy and act inside a surrogate; selection masks depend on the whole batch and act in
`Objective.prepare`.
"""

from pgjax.masks.mismatch import (
    geometric_mismatch,
    sequence_mismatch,
    token_mismatch,
    veto,
)
from pgjax.masks.selection import finite_rewards, informative_groups, overlong_filter
from pgjax.masks.trust_region import dual_clip, ppo_clip

__all__ = [
    "dual_clip",
    "finite_rewards",
    "geometric_mismatch",
    "informative_groups",
    "overlong_filter",
    "ppo_clip",
    "sequence_mismatch",
    "token_mismatch",
    "veto",
]
