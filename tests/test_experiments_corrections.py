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
