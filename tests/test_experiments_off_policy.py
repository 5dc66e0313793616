"""The reproductions of off-policy and offline learning from end to end, in their tiny versions."""

import importlib
import json

import pytest


@pytest.mark.parametrize("name", ["pqn_cartpole", "iql_grid", "iql_pendulum"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"]
    for columns in found["table"].values():
        assert all(len(x) == 3 for x in columns.values())


def test_the_recorded_walks_and_what_they_are_worth():
    import numpy as np

    from experiments import iql_grid

    data = iql_grid.recorded(0, 50)
    start, goal = 0, 99
    ended = data["terminated"]
    assert (data["next"][ended] == goal).all() and (data["reward"] == ended).all()
    assert (data["state"] != goal).all() and (data["state"] == start).any()
    # Value iteration over what was recorded: the best within the data.
    worth = np.zeros(100)
    for _ in range(60):
        after = data["reward"] + 0.95 * np.where(ended, 0.0, worth[data["next"]])
        worth = np.zeros(100)
        np.maximum.at(worth, data["state"], after)
    np.testing.assert_allclose(worth[start], 0.95**17, rtol=1e-6)
    v, _ = iql_grid.tabular_iql(data, 0.99, 1500)
    assert (np.asarray(v) <= worth + 1e-5).all() and v[start] > 0.395
    # Everybody to the right, then down.
    policy = np.zeros((100, 4))
    policy[:, 1], policy[9::10] = 1.0, (0, 0, 1, 0)
    assert iql_grid.success(policy, 0) == 1.0
    assert iql_grid.success(np.eye(4)[np.zeros(100, int)], 0) == 0.0
