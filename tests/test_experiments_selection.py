"""The reproductions on row and token selection run, and write what they should."""

import json

import pytest

from experiments import capo_diagnostic, capo_stability, d3s_efficiency, gtpo_format


@pytest.mark.parametrize(
    "experiment", [d3s_efficiency, gtpo_format, capo_diagnostic, capo_stability]
)
def test_a_tiny_version_runs(experiment, tmp_path):
    assert experiment.main(["--quick", "--out", str(tmp_path)]) in (0, 1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["table"] and results["claims"]
    assert (tmp_path / "curves.png").stat().st_size > 0
