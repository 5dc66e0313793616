"""Agents from the command line: results, files, resuming to the bit, what is said of mistakes."""

import importlib
import json
import signal

import numpy as np
import pytest

from experiments.control import run, worlds
from pgjax import envs

TINY = ["--seeds", "2", "--parts", "2", "--episodes", "2"]
AGENTS = {
    "ppo": ["--steps", "256", "--num-steps", "32"],
    "a2c": ["--steps", "256"],
    "reinforce": ["--steps", "80", "--max-steps", "20", "--num-envs", "2"],
    "trpo": ["--steps", "256", "--num-steps", "16", "--no-line-search"],
    "dqn": ["--steps", "100", "--start-steps", "200", "--hidden", "16"],
    "pqn": ["--steps", "256", "--num-envs", "4", "--num-steps", "16", "--hidden", "16"],
    "sac": ["--steps", "8", "--start-steps", "300", "--batch-size", "8", "--hidden", "16"],
    "td3": ["--steps", "8", "--start-steps", "300", "--batch-size", "8", "--hidden", "16"],
    "ddpg": ["--steps", "8", "--start-steps", "300", "--batch-size", "8", "--hidden", "16"],
}


def main(name):
    return importlib.import_module(f"experiments.{name}").main


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_a_short_run_says_what_it_came_to(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(name)([*AGENTS[name], *TINY, "--out", str(out)]) == 1  # nothing is learnt so soon
    printed = capsys.readouterr().out
    assert "interquartile mean" in printed and "solved from" in printed
    result = json.loads((out / "results.json").read_text())
    assert len(result["greedy"]) == 2 and np.all(np.isfinite(result["greedy"]))
    for file in ("curves.png", "episode.png", "episode.gif", "metrics.jsonl", "config.json"):
        assert (out / file).stat().st_size > 100, file
        assert file == "config.json" or str(out / file)[-20:] in printed.replace("\n", "")
    assert main(name)([*AGENTS[name], *TINY, "--out", str(out)]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, capsys, monkeypatch):
    sizes = ["--steps", "1024", "--num-steps", "32", "--parts", "4"]
    options = [*sizes, "--seeds", "2", "--episodes", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main("ppo")([*options, "--out", str(whole)]) == 1
    write = run.pg.train.metrics.MetricsWriter.write

    def stopping(self, step, *rest, **named):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return write(self, step, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(run.pg.train.metrics.MetricsWriter, "write", stopping)
        assert main("ppo")([*options, "--out", str(cut)]) == 130
    assert f"--resume --out {cut}" in capsys.readouterr().out.replace("\n", " ")
    assert main("ppo")(["--resume", "--out", str(cut)]) == 1
    one, two = (json.loads((x / "results.json").read_text()) for x in (whole, cut))
    for name in ("returns", "greedy"):
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.slow
def test_images(tmp_path, capsys):
    pytest.importorskip("gymnax")
    sizes = ["--steps", "64", "--num-envs", "4", "--num-steps", "8", "--minibatches", "2"]
    out = tmp_path / "run"
    assert main("pqn_minatar")([*sizes, *TINY, "--out", str(out)]) == 0
    assert "pqn_minatar on Breakout-MinAtar" in capsys.readouterr().out
    assert (out / "curves.png").stat().st_size > 100
    assert main("pqn_minatar")(["--env", "CartPole-v1", "--out", str(tmp_path / "other")]) == 2
    assert "expected one whose observations are images" in capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    assert main("ppo")(["--env", "CartPol-v1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "perhaps CartPole-v1" in said and "Acrobot-v1" in said and "gymnax:NAME" in said
    assert not list(tmp_path.iterdir())
    assert main("ppo")(["--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "seeds: expected at least 1" in capsys.readouterr().err
    assert main("ppo")(["--minibatches", "5", "--out", str(tmp_path)]) == 2
    assert "num_minibatches: expected a divisor" in capsys.readouterr().err
    assert main("dqn")(["--env", "Pendulum-v1", "--out", str(tmp_path)]) == 2
    assert "expected Discrete actions" in capsys.readouterr().err
    assert main("sac")(["--env", "CartPole-v1", "--out", str(tmp_path)]) == 2
    assert "expected a vector in [-1, 1]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main("ppo")(["--resume", "--out", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit) as stop:
        main("ppo")(["--stepz", "3"])
    assert stop.value.code == 2


def test_a_library_that_is_not_there(capsys, monkeypatch):
    def missing(name):
        raise ImportError("from_brax needs brax: pip install 'pgjax[brax]'")

    monkeypatch.setattr(envs, "from_brax", missing)
    assert main("ppo")(["--env", "brax:ant"]) == 2
    assert "pgjax[brax]" in capsys.readouterr().err


def test_worlds():
    for name in worlds.OWN:
        env, _ = worlds.vectors(name)
        assert isinstance(env.observation, envs.Box) and env.name == name
        if isinstance(env.action, envs.Box):
            assert (env.action.low, env.action.high) == (-1.0, 1.0)
    assert run.sizes(run.Config(steps=1000, parts=20), 100) == (1, 10)
    assert run.sizes(run.Config(steps=1001, parts=4), 100) == (3, 4)
    x, curves = run.smoothed(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    np.testing.assert_array_equal(curves, [[1, np.nan, 3], [np.nan] * 3])
    np.testing.assert_array_equal(x, [0, 1, 2])
