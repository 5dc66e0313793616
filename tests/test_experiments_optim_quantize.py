"""The reproductions run and write what they found; whether claims hold takes their full size."""

import importlib
import json

import numpy as np
import pytest


@pytest.mark.parametrize("name", ["foem", "quantlrm", "blora", "quantize_decoder"])
def test_tiny_run(name, tmp_path):
    module = importlib.import_module(f"experiments.{name}")
    assert module.main(["--quick", "--out", str(tmp_path)]) in (0, 1)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["claims"] and (tmp_path / "curves.png").stat().st_size > 0
    columns = [np.asarray(x) for row in found["table"].values() for x in row.values()]
    assert all(x.shape == (3,) and np.isfinite(x).all() for x in columns)
    if name == "quantize_decoder":
        exact = [c for c in found["claims"] if "packed" in c["text"]]
        assert len(exact) == 2 and all(c["holds"] for c in exact)
