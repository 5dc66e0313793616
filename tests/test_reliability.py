"""Killed runs and misbehaving verifiers, as the benchmark has them, and what it makes of them."""

import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from experiments.benchmarks import reliability
from experiments.shared import kills, torture
from pgjax.rewards.isolated import workers
from pgjax.train import checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")


@pytest.fixture(scope="module")
def rack():
    return torture.Rack(torture.Limits(seconds=1.5, memory_bytes=1 << 28))


def test_a_step_with_bad_samples_accounts_for_all_and_leaves_nothing(rack):
    """Each kind once, beside good ones."""
    outcome = rack.torture("all", torture.KINDS)
    assert outcome.unaccounted == [] and outcome.left == []
    assert (outcome.bad, outcome.invalid, outcome.samples) == (8, 7, 16)


def test_what_is_left_or_not_accounted_for_is_seen(rack, monkeypatch):
    """A pool that leaves verifiers' children alone, and a kind that is expected to fail."""
    with monkeypatch.context() as patch:
        patch.setattr(workers.Worker, "has_more_processes", lambda worker: False)
        left = rack.torture("child", ("child",)).left
    assert any(text.endswith("after the step") for text in left)
    assert torture.marked(rack.mark) == []  # the rack does not leave them either
    monkeypatch.setitem(torture.REASONS, "child", (RuntimeError, "ended"))
    outcome = rack.torture("child", ("child",))
    assert len(outcome.unaccounted) == 2 * outcome.bad + 1
    claims = reliability.torture_claims([outcome])
    assert [c.holds for c in claims][:2] == [False, True]


@pytest.mark.slow
def test_the_benchmark_in_short(tmp_path, capfd):
    arguments = ["--kills", "3", "--processes", "1", "--kinds", "hang", "exit", "--seconds", "1"]
    code = reliability.main([*arguments, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    printed = capfd.readouterr()
    assert code == 0, printed
    (tally,) = found["kills"]
    assert len(tally["kills"]) == 3 and tally["runs"] >= 1 and tally["mismatches"] == []
    assert [row["name"] for row in found["torture"]][1:3] == ["hangs", "exits the process"]
    assert (
        "steps lost by a kill, most" in printed.out and "1 process: none loses more" in printed.out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "kills: expected at least 1, got 0"),
        (["--processes", "0"], "processes: expected numbers of at least 1"),
        (["--seconds", "0"], "seconds: expected more than 0"),
        (["--kinds", "sulk"], "sulk"),
        (["--only", "sleep"], "sleep"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.reliability", *arguments],
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert message in done.stdout + done.stderr and "Traceback" not in done.stderr


# --- what the comparison sees ---------------------------------------------------------------------


def record(step, phase="rl", **values):
    return {"step": step, "phase": phase, "seconds": random.random(), **values}


def write(files, records):
    files.directory.mkdir(exist_ok=True)
    new = files.log.with_suffix(".new")
    new.write_text("".join(json.dumps(r) + "\n" for r in records))
    new.replace(files.log)


def checkpoint(files, phase, step):
    (files.directory / "checkpoints" / phase / str(step)).mkdir(parents=True, exist_ok=True)


def test_moments_are_of_all_kinds_and_repeat():
    made = kills.moments(random.Random(3), 50)
    assert made == kills.moments(random.Random(3), 50) != kills.moments(random.Random(4), 50)
    counts = [sum(m.when == when for m in made) for when in ("step", "checkpoint", "start")]
    assert len(made) == 50 and min(counts) >= 16


def test_a_start_that_outlasts_the_run_is_shortened(tmp_path):
    class Ends:
        """A sitting that ends by itself, after so many looks."""

        def __init__(self, looks):
            self.looks = looks

        def running(self):
            self.looks -= 1
            return self.looks > 0

    watch, moment = kills.Watch(), kills.Moment("start", 0, 1.0)
    watch.start_seconds = 600.0  # as after a pause of the whole machine
    assert not watch.wait(Ends(4), kills.Files(tmp_path), moment)
    assert watch.start_seconds < 1
    assert watch.wait(Ends(1000), kills.Files(tmp_path), moment)


def test_lost_steps_and_too_early_starts_are_seen(tmp_path):
    tally = kills.Tally(1)
    run = kills._Run(tmp_path / "run", tally)
    files = run.files
    run.sat(True, 0)  # before there is anything
    first = [record(i, "warmup") for i in range(1, 8)]
    write(files, first)
    checkpoint(files, "warmup", 6)
    (files.directory / "checkpoints/warmup/7.orbax-checkpoint-tmp").mkdir()
    run.sat(True, 0)
    run.sat(True, 0)  # it had not come to go on
    again = [*first[:6], *(record(i, "warmup") for i in range(7, 41)), record(1), record(2)]
    write(files, again)
    checkpoint(files, "warmup", 40)
    checkpoint(files, "warmed_up", 40)
    checkpoint(files, "rl", 0)
    (files.directory / "checkpoints/warmup/7.orbax-checkpoint-tmp").rmdir()
    run.sat(True, 0)
    write(files, [*again[:39], record(40, "warmup")])  # before its newest checkpoint
    run.sat(False, 0)
    assert tally.lost == [0, 1, 0, 3]
    (text,) = tally.too_early
    assert text == "run: killed at 42 with a checkpoint of 40, went on from 39"
    facts = [(k.at, k.saved, k.phase, k.writing, k.idle) for k in tally.kills]
    assert facts == [
        (0, None, "warm-up", False, True),
        (7, 6, "warm-up", True, False),
        (7, 6, "warm-up", False, True),
        (42, 40, "reinforcement", False, False),
    ]
    tally.runs, tally.mismatches = 1, ["run: rl['step']"]
    assert [c.holds for c in reliability.kill_claims(tally, 4)] == [False, False, True]
    tally.lost[1] = 7
    assert not reliability.kill_claims(tally, 4)[2].holds


def test_differences_are_seen(tmp_path, monkeypatch):
    arrays = {"whole": np.zeros(2, np.float32), "other": np.float32([0.0, -0.0])}
    monkeypatch.setattr(kills, "final_arrays", lambda path, phase: {"['w']": arrays[path.name]})
    records = [record(i, loss=0.5 * i) for i in (1, 2, 3)]
    for name in arrays:
        files = kills.Files(tmp_path / name)
        write(files, records)
        checkpoint(files, "rl", 3)
        for test in ("test_before.json", f"test_after_{kills.RL_STEPS}.json"):
            (files.directory / test).write_text("{}")
    whole, other = tmp_path / "whole", tmp_path / "other"
    # Zeros of two signs are equal, but not the same bits.
    assert kills.differences(whole, other) == ["other: warmed_up['w']", "other: rl['w']"]
    arrays["other"] = arrays["whole"]
    assert kills.differences(whole, other) == []
    write(kills.Files(other), [records[0], record(2, loss=0.9), record(3, loss=1.5), records[2]])
    (other / "checkpoints/rl/2.orbax-checkpoint-tmp").mkdir()
    (other / "test_before.json").write_text("[]")
    first, second, *more = kills.differences(whole, other)
    assert first == "other: 4 records, expected 3"
    assert second.startswith("other: record rl 2: {'step': 2, 'phase': 'rl', 'loss': 0.9}")
    assert more == [
        "other: test_before.json",
        "other: file checkpoints/rl/2.orbax-checkpoint-tmp",
    ]


def test_a_process_that_dies_while_it_opens_checkpoints_leaves_nothing_for_good(
    tmp_path, monkeypatch
):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.open(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with checkpoints.open(tmp_path):
        assert list(tmp_path.iterdir()) == []
