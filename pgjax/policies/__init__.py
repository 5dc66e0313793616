"""Distributions over actions, as pure functions of their parameters."""

from pgjax.policies import bayes_net, kernel_rule, mixture, residual
from pgjax.policies.bayes_net import (
    bn_joint,
    bn_log_prob,
    bn_log_probs,
    bn_mode,
    bn_sample,
    topological_order,
)
from pgjax.policies.composite import (
    CompositeAction,
    CompositeValues,
    composite_action,
    composite_argmax,
    composite_greedy_value,
    composite_index,
    composite_taken,
)
from pgjax.policies.distributions import Distribution, categorical, gaussian, tanh_gaussian

__all__ = [
    "CompositeAction",
    "CompositeValues",
    "Distribution",
    "bayes_net",
    "bn_joint",
    "bn_log_prob",
    "bn_log_probs",
    "bn_mode",
    "bn_sample",
    "categorical",
    "composite_action",
    "composite_argmax",
    "composite_greedy_value",
    "composite_index",
    "composite_taken",
    "gaussian",
    "kernel_rule",
    "mixture",
    "residual",
    "tanh_gaussian",
    "topological_order",
]
