"""Exact gradients by enumeration, the judge of every estimator; what drafts are worth."""

from pgjax.diagnostics import speculative
from pgjax.diagnostics.enumeration import (
    all_draws,
    bandit_rollout,
    expected_gradient,
    policy_gradient,
)

__all__ = [
    "all_draws",
    "bandit_rollout",
    "expected_gradient",
    "policy_gradient",
    "speculative",
]
