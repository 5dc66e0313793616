"""Reproductions of changed policies in PPO and SAC, from end to end in their tiny versions."""

import pytest
from tiny_runs import run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual_peg", "pmoe_goals", "pomfc_kuramoto"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    found, _ = run(name, tmp_path / "run")
    assert len(found["claims"]) >= 3


def test_fishers_test_is_scipys():
    import scipy.stats

    from experiments import pmoe_goals

    for more, less in ((10, 2), (3, 3), (0, 4), (12, 11)):
        wanted = scipy.stats.fisher_exact([[more, 12 - more], [less, 12 - less]], "greater").pvalue
        assert abs(pmoe_goals.fisher(more, less, 12) - wanted) < 1e-9


def test_what_counts_as_success_on_the_one_step_tasks():
    import numpy as np

    from experiments import pmoe_goals
    from pgjax.policies.mixture import Mixture

    goal = np.arctanh(0.6)
    means = np.zeros((2, 2, 2, 2))  # seeds, sides, experts, entries of the action
    means[:, :, 0, 0], means[:, :, 1, 0] = -goal, goal
    logits = np.zeros((2, 2, 2))
    logits[:, 0, 0] = logits[0, 1, 1] = logits[1, 1, 0] = 2.0  # the second seed's right goes left
    found = Mixture(logits, means, np.zeros_like(means))
    np.testing.assert_array_equal(pmoe_goals.specialised(found), [1.0, 0.0])
    np.testing.assert_array_equal(pmoe_goals.specialised(found._replace(mean=0.5 * means)), 0.0)
    one_side = Mixture(logits[:, 0], means[:, 0], means[:, 0])
    np.testing.assert_array_equal(pmoe_goals.reaches(one_side), 1.0)
    far = one_side._replace(mean=np.where(np.arange(2)[:, None] == 0, 0.0, means[:, 0]))
    unused = np.array([[0.0, 0.0], [9.0, 0.0]])  # the expert at a goal does not act
    np.testing.assert_array_equal(pmoe_goals.reaches(far._replace(logits=unused)), [1.0, 0.0])


def test_ahead_asks_for_two_standard_errors_of_paired_differences():
    import numpy as np
    import scipy.stats

    from experiments.shared import reproduction

    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=12), rng.normal(size=12)
    outcomes = set()
    for gain in (0.1, 0.4, 0.6, 2.0):
        other = base + gain + noise
        found = reproduction.ahead("", other, base)
        assert found.holds == (scipy.stats.ttest_rel(other, base).statistic > 2)
        outcomes.add(found.holds)
    assert outcomes == {False, True}
    assert not reproduction.ahead("", base, base + 2.0 + noise).holds
