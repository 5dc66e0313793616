"""Bayesian gradients and values in continuous time: tiny runs, and the numbers they rest on."""

import importlib
import json

import numpy as np
import pytest


@pytest.mark.parametrize("name", ["bac_random_walk", "martingale_evaluation"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"] and (tmp_path / "run" / "curves.png").is_file()


def test_the_walks_exact_gradient():
    from experiments import bac_random_walk

    truth = bac_random_walk.exact(0.99)
    wanted = [-2.79, -7.10, -10.02, -11.77, -12.49, -12.25, -11.03, -8.72, -5.14]
    np.testing.assert_allclose(truth.gradient, wanted, atol=0.006)
    # By differences of the objective itself.
    policy = 0.5 * np.ones(9)
    for x in (0, 4, 8):
        shifted = [policy + sign * 1e-5 * (np.arange(9) == x) for sign in (1, -1)]
        up, down = (value(p, 0.99) for p in shifted)
        # The slope of σ at 0 is 1/4.
        np.testing.assert_allclose(truth.gradient[x], 0.25 * (up - down) / 2e-5, rtol=1e-4)


def value(right, discount):
    """Of the start, where the chances of going right are these."""
    moves = np.zeros((9, 9))
    for x in range(9):
        moves[x, max(x - 1, 0)] += 1 - right[x]
        if x < 8:
            moves[x, x + 1] += right[x]
    return np.linalg.solve(np.eye(9) - discount * moves, np.ones(9))[0]


def test_configurations_that_make_no_sense(capsys):
    from experiments import bac_random_walk, martingale_evaluation

    assert bac_random_walk.main(["--episodes", "0"]) == 2
    assert "episodes: expected" in capsys.readouterr().err
    assert bac_random_walk.main(["--repeats", "1"]) == 2
    assert "repeats: expected" in capsys.readouterr().err
    assert martingale_evaluation.main(["--seeds", "1"]) == 2
    assert "seeds, long_steps: expected" in capsys.readouterr().err
