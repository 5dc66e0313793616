"""The reproductions of locks and games from end to end, in their tiny versions."""

import importlib
import json

import pytest


@pytest.mark.parametrize("name", ["bn_coordination", "bn_learned_graph", "hnpg_lock"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"] and (tmp_path / "run" / "curves.png").is_file()
    for columns in found["table"].values():
        assert all(len(x) == 3 for x in columns.values())
