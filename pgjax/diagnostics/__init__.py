"""Exact gradients by enumeration: the judge of every estimator."""

from pgjax.diagnostics.enumeration import (
    all_draws,
    bandit_rollout,
    expected_gradient,
    policy_gradient,
)

__all__ = ["all_draws", "bandit_rollout", "expected_gradient", "policy_gradient"]
