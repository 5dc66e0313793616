"""Verdicts on paired seeds, against SciPy's standard error."""

import numpy as np
import pytest
import scipy.stats

from experiments.shared import reproduction

GAINS = np.array([0.4, -0.1, 0.3, 0.2])


def test_standard_error_is_scipys():
    assert reproduction.standard_error(GAINS) == pytest.approx(scipy.stats.sem(GAINS), rel=1e-12)
    assert reproduction.with_error(GAINS, "+.3f") == "+0.200 ± 0.108"
    assert reproduction.with_error(-GAINS, ".2f") == "-0.20 ± 0.11"


@pytest.mark.parametrize(("factor", "holds"), [(2.1, True), (1.9, False), (-2.1, False)])
def test_ahead_is_more_than_two_standard_errors(factor, holds):
    shift = factor * scipy.stats.sem(GAINS) - GAINS.mean()  # the mean is `factor` errors from 0
    other = np.array([0.5, 0.2, 0.9, 0.1])
    claim = reproduction.ahead("text", other + GAINS + shift, other)
    assert (claim.text, claim.holds) == ("text", holds)
