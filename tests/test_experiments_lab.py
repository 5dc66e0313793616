"""The atlas and the comparison run from end to end, and say what they should."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import compare_objectives, compare_optimizers, estimator_atlas
from experiments.random_calculation import comparison_report
from experiments.shared import runs

ROOT = pathlib.Path(__file__).parent.parent


def test_a_quick_atlas(tmp_path, capsys):
    code = estimator_atlas.main(
        ["--quick", "--recipes", "grpo", "rloo", "--out", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["documented"] == {"rloo": "unbiased", "grpo": ""} and found["batches"] == 4**4
    assert list(found["results"]["grpo"]) == list(estimator_atlas.settings())
    exact, biased = (found["results"][name]["unequal scale"] for name in ("rloo", "grpo"))
    assert exact["residual"] < 1e-12 and abs(exact["scale"] - 1) < 1e-12
    assert biased["residual"] > 0.1 and biased["signal_to_noise"] > 0
    assert (tmp_path / "atlas.png").read_bytes()[:4] == b"\x89PNG"
    assert "objectives: 2/2" in capsys.readouterr().out
    assert estimator_atlas.main(["--recipes", "grop", "--out", str(tmp_path)]) == 2
    assert "got 'grop'" in capsys.readouterr().err


def test_every_recipe_is_on_the_map_with_what_it_needs():
    found = estimator_atlas.public_recipes()
    exported = {
        name for name in pg.objectives.__all__ if name[0].islower() and not name.startswith("with_")
    }
    parts = {
        "by_turn",
        "normalized",
        "step_count",
        "kl_to_reference",
        "entropy_bonus",
        "value_loss",
    }
    parts |= estimator_atlas.LEFT_OUT
    assert exported - parts <= set(found)
    for name, recipe in found.items():
        assert isinstance(recipe(**estimator_atlas.options_of(name, 4)), pg.Objective), name


def test_claims_are_read_from_docstrings_and_judged():
    recipes = estimator_atlas.public_recipes()
    assert estimator_atlas.documented(recipes["reinforce"]) == "unbiased"
    assert estimator_atlas.documented(recipes["dr_grpo"]) == "proportional"
    assert estimator_atlas.documented(recipes["grpo"]) == ""

    def report(residual, scale):
        zero = jnp.float32(0.0)
        estimate = {name: pg_estimate(zero) for name in ("bias_norm", "norm_ratio", "cosine")}
        expected = estimator_atlas.laboratory.Comparison(
            gradient=None,
            radius=zero,
            residual=pg_estimate(residual),
            scale=pg_estimate(scale),
            **estimate,
        )
        return type("Report", (), {"expected": expected})

    def pg_estimate(x):
        return estimator_atlas.laboratory.Estimate(x, x, x)

    columns = list(estimator_atlas.settings())

    def broken(claim, *pairs):
        by_column = {c: report(*pairs[i % len(pairs)]) for i, c in enumerate(columns)}
        return estimator_atlas.broken_claims({"x": claim}, {"x": by_column})

    assert broken("unbiased", (1e-14, 1.0)) == []
    assert "0.500000 times" in broken("unbiased", (1e-14, 0.5))[0]
    assert "residual 1.00e-02" in broken("proportional", (1e-2, 0.5))[0]
    assert broken("proportional", (1e-14, 0.5)) == []
    assert "not the same multiple" in broken("proportional", (1e-14, 0.5), (1e-14, 0.6))[0]
    assert broken("", (0.5, 0.1)) == []
    assert "residual nan" in broken("unbiased", (float("nan"), 1.0))[0]


def test_settings_are_what_their_names_say():
    settings = estimator_atlas.settings()
    rows = jnp.asarray(
        estimator_atlas.problems.all_sequences(estimator_atlas.tree(jnp.zeros((2, 4))))
    )
    assert rows.shape == (8, 4)

    def value(setting):
        problem = estimator_atlas.tree(jnp.asarray(setting.rewards))
        logs = estimator_atlas.problems.log_probability(problem, setting.current, rows)
        return (jnp.exp(logs) * problem.reward(rows)).reshape(2, 4).sum(1)

    easy, hard = value(settings["easy + hard"])
    assert easy > 0.8 and hard < 0.2
    gains = [float(value(settings[c]).mean()) for c in ("dense", "1 step old", "4 steps old")]
    assert gains == sorted(gains) and gains[2] - gains[0] > 0.02
    other = settings["other sampler"]
    assert np.array_equal(other.current, other.old)
    assert not np.array_equal(other.behavior, other.old)


def curve(tokens, accuracy):
    return comparison_report.Curve(np.array(tokens), np.array(accuracy), accuracy[0], accuracy[-1])


def test_scores_are_taken_at_the_tokens_that_all_have_used():
    curves = {
        "grpo": [[curve([0.0, 100.0], [0.2, 0.4])], [curve([0.0, 50.0], [0.0, 0.5])]],
        "long": [[curve([0.0, 200.0], [0.2, 0.6])], [curve([0.0, 100.0], [0.0, 0.4])]],
    }
    scores, budget = comparison_report.scores_at_equal_tokens(curves)
    np.testing.assert_array_equal(budget, [[100.0], [50.0]])
    np.testing.assert_allclose(scores["grpo"], [[0.4], [0.5]])
    np.testing.assert_allclose(scores["long"], [[0.4], [0.2]])
    middle, low, high = comparison_report.with_interval(scores["long"])
    assert middle == pytest.approx(0.3) and low == pytest.approx(0.2) and high == pytest.approx(0.4)


def test_the_search_space_is_the_same_for_all():
    config = compare_objectives.PRESETS["gpu"]
    made = [
        compare_objectives.run_config(config, "micro9", 0, recipe, rate)
        for recipe in compare_objectives.RECIPES
        for rate in config.learning_rates
    ]
    assert len({settings.out for settings in made}) == len(made)

    def others(settings):
        plain = dataclasses.replace(settings, objective="grpo", objective_options=(), out=None)
        rl = dataclasses.replace(plain.rl, learning_rate=1.0)
        return dataclasses.replace(plain, rl=rl)

    assert len({others(settings) for settings in made}) == 1
    assert {settings.rl.learning_rate for settings in made} == set(config.learning_rates)


def test_a_quick_comparison_and_the_same_command_again(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TFDS_DATA_DIR": str(tmp_path / "data"),
    }
    out = tmp_path / "out"

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "experiments.compare_objectives", "--preset", "quick",
             "--out", str(out), *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    content = json.loads((out / "results.json").read_text())
    assert set(content["scores"]) == {"grpo", "rloo"}
    assert np.array(content["scores"]["rloo"]).shape == (2, 1)
    assert content["minus_grpo"]["grpo"] == [0.0, 0.0, 0.0]
    assert (out / "comparison.png").exists()
    log = out / "micro9" / "seed1" / "rloo" / "metrics.jsonl"
    before = log.stat().st_mtime_ns
    again = run()
    assert again.returncode == 0 and log.stat().st_mtime_ns == before
    assert json.loads((out / "results.json").read_text()) == content
    other = run("--steps", "3")
    assert other.returncode == 2 and "other settings" in other.stderr


def test_a_quick_comparison_of_optimizers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    out = tmp_path / "out"
    assert compare_optimizers.main(["--preset", "quick", "--out", str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    assert set(content["scores"]) == set(compare_optimizers.STACKS)
    assert content["settings"]["symmetry"] == [1e-3, 1e-4]
    config = json.loads((out / "micro9/seed1/symmetry_0.001_0.0001/config.json").read_text())
    assert config["rl"]["learning_rate"] == 1e-3 and config["rl"]["adam_learning_rate"] == 1e-4
    assert "moonshot_muon on micro9, seed 1" in capsys.readouterr().out
    assert compare_optimizers.main(["--preset", "quick", "--others", "1", "2"]) == 2
    assert "as many to choose from" in capsys.readouterr().err


def test_presets_are_offered():
    assert set(compare_objectives.PRESETS) == {"quick", "cpu", "gpu"}
    assert runs.peek(["--preset", "gpu"], "--preset") == "gpu"
    assert all(c.seeds >= 3 for n, c in compare_objectives.PRESETS.items() if n != "quick")
