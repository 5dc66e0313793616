"""The reproductions run through, in their smallest form, and write what they found."""

import json

import pytest

from experiments import copo_vanishing, disco_difficulty, engine_mismatch, hpt_hybrid


@pytest.mark.parametrize("module", [disco_difficulty, copo_vanishing, hpt_hybrid, engine_mismatch])
def test_quick(module, tmp_path):
    code = module.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert code == (0 if all(claim["holds"] for claim in found["claims"]) else 1)
    assert found["table"] and found["claims"]
    assert (tmp_path / "curves.png").stat().st_size > 0
