"""The reproductions run from end to end, in their tiny versions."""

import importlib
import json

import pytest


@pytest.mark.parametrize(
    "name", ["san_search_bandit", "canon_metric", "g2rl_modes", "adora_length"]
)
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"] and (tmp_path / "run" / "curves.png").is_file()


def test_a_blend_that_the_claims_need(capsys):
    from experiments import san_search_bandit

    assert san_search_bandit.main(["--alphas", "0.5"]) == 2
    assert "alphas: expected 0.8 and 1.0 among them" in capsys.readouterr().err
