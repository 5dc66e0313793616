"""The reproductions of searches and completions, run from end to end in their tiny versions."""

import importlib
import json

import numpy as np
import pytest


@pytest.mark.parametrize("name", ["qstar_pancake", "low_rank_pendulum"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"] and (tmp_path / "run" / "curves.png").is_file()


def test_more_singular_values_than_anchors(capsys):
    from experiments import low_rank_pendulum

    assert low_rank_pendulum.main(["--rank", "9"]) == 2
    assert "rank: expected 1 to 8 anchors, got 9" in capsys.readouterr().err


def test_the_exact_values_are_what_sampling_tends_to():
    import jax

    from experiments import low_rank_pendulum as experiment

    grid = experiment.Grid(9, 4)
    truth = experiment.exact(grid, 0.5)
    drawn = experiment.sampled(jax.random.key(0), grid, 0.5, 20, num_samples=1000)
    assert np.abs(np.asarray(drawn) - truth).max() < 0.05
