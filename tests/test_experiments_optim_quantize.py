"""The reproductions run and write what they found; whether claims hold takes their full size."""

import pytest
import tiny_runs


@pytest.mark.parametrize("name", ["foem", "quantlrm", "blora", "quantize_decoder"])
def test_tiny_run(name, tmp_path):
    found, columns = tiny_runs.run(name, tmp_path)
    assert all(x.shape == (3,) for x in columns)
    if name == "quantize_decoder":
        exact = [c for c in found["claims"] if "packed" in c["text"]]
        assert len(exact) == 2 and all(c["holds"] for c in exact)
