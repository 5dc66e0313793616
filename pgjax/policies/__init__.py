"""Distributions over actions, as pure functions of their parameters."""

from pgjax.policies.distributions import Distribution, categorical, gaussian, tanh_gaussian

__all__ = ["Distribution", "categorical", "gaussian", "tanh_gaussian"]
