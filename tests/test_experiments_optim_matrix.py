"""Matrix optimizers' experiments, in small, from the command line to the files."""

import json

import tiny_runs

from experiments import polar_grad


def test_completion_runs_to_its_files(tmp_path, capsys):
    code = polar_grad.main(["--problem", "completion", "--quick", "--out", str(tmp_path)])
    assert code in (0, 1)  # a sixth of the steps need not show anything
    found = json.loads((tmp_path / "completion" / "results.json").read_text())
    ends = {
        name: columns["mean squared error of seen entries"]
        for name, columns in found["table"].items()
    }
    assert set(ends) >= {"PolarGrad", "Muon", "Adam", "gradient descent"}
    assert max(ends["PolarGrad, 4 times"]) < min(ends["gradient descent"])
    assert (tmp_path / "completion" / "curves.png").stat().st_size > 0
    assert "PolarGrad" in capsys.readouterr().out


def test_wrong_settings_are_named(tmp_path, capsys):
    assert polar_grad.main(["--seeds", "1", "--out", str(tmp_path)]) == 2
    assert "seeds: expected at least 2, got 1" in capsys.readouterr().err
    assert polar_grad.main(["--steps", "130", "--out", str(tmp_path)]) == 2
    assert "steps: expected a multiple of 20" in capsys.readouterr().err


def test_tables_and_routers_run_to_their_files(tmp_path):
    found, _ = tiny_runs.run("symmetry_stack", tmp_path)
    assert any("AdamW" in name for name in found["table"])


def test_four_stacks_pretrain(tmp_path):
    found, _ = tiny_runs.run("pretrain_optimizers", tmp_path)
    assert set(found["table"]) == {"AdamW", "Muon", "PolarGrad", "symmetry"}


def test_the_proven_step_descends_as_proved(tmp_path):
    polar_grad.main(["--seeds", "2", "--steps", "120", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "quadratic" / "results.json").read_text())
    claims = [c for c in found["claims"] if "1/(L r)" in c["text"]]
    assert len(claims) == 1 and claims[0]["holds"]
