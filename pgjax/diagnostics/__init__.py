"""Exact gradients by enumeration, the judge of every estimator; what drafts are worth."""

from pgjax.diagnostics import problems, spectra, speculative
from pgjax.diagnostics.enumeration import (
    all_draws,
    bandit_rollout,
    expected_gradient,
    policy_gradient,
)
from pgjax.diagnostics.intervals import interquartile_mean, stratified_bootstrap
from pgjax.diagnostics.lab_figure import draw_atlas
from pgjax.diagnostics.laboratory import Comparison, Estimate, EstimatorReport, estimator_report
from pgjax.diagnostics.problems import TokenProblem
from pgjax.diagnostics.rank import representation_rank
from pgjax.diagnostics.sampling_error import fitted_sampling_error, tabular_sampling_error
from pgjax.diagnostics.surrogate_gap import exact_gap, sampled_mismatch

__all__ = [
    "Comparison",
    "Estimate",
    "EstimatorReport",
    "TokenProblem",
    "all_draws",
    "bandit_rollout",
    "draw_atlas",
    "estimator_report",
    "exact_gap",
    "expected_gradient",
    "fitted_sampling_error",
    "interquartile_mean",
    "policy_gradient",
    "problems",
    "representation_rank",
    "sampled_mismatch",
    "spectra",
    "speculative",
    "stratified_bootstrap",
    "tabular_sampling_error",
]
