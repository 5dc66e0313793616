"""The reproductions of corrected sampling from end to end, in their tiny versions."""

import importlib
import json

import pytest


@pytest.mark.parametrize("name", ["props_bandit", "props_grid"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"] and (tmp_path / "run" / "curves.png").is_file()
    for columns in found["table"].values():
        assert all(len(x) == (3 if name == "props_grid" else 10) for x in columns.values())


def test_mistakes(tmp_path, capsys):
    from experiments import props_bandit

    assert props_bandit.main(["--every", "5", "--out", str(tmp_path)]) == 2
    assert "every: expected a divisor of 16, got 5" in capsys.readouterr().err


def test_the_grids_exact_value():
    """Of the shortest way, and by walking where the policy is uniform."""
    import jax.numpy as jnp
    import numpy as np

    from experiments import props_grid

    right_then_down = jnp.zeros((25, 4)).at[:, 1].set(50.0).at[jnp.arange(4, 25, 5), 2].set(100.0)
    np.testing.assert_allclose(
        props_grid.start_value(right_then_down), props_grid.best_value(), rtol=1e-5
    )
    rng, total = np.random.default_rng(0), np.zeros(4000)
    after, paid = np.asarray(props_grid.successors()), np.asarray(props_grid.rewards())
    cell, going, weight = np.full(4000, props_grid.MIDDLE), np.ones(4000, bool), 1.0
    for _ in range(600):
        cell = np.where(going, after[cell, rng.integers(0, 4, 4000)], cell)
        total += going * weight * paid[cell]
        going &= (cell != props_grid.LESSER) & (cell != props_grid.BETTER)
        weight *= props_grid.DISCOUNT
    error = total.std() / 4000**0.5
    assert abs(props_grid.start_value(jnp.zeros((25, 4))) - total.mean()) < 4 * error
