"""What a run records about its own cost."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from pgjax import train
from pgjax.train import metrics, observing


class Widths:
    """Batches of these lengths, over and over."""

    def __init__(self, *widths):
        self.widths, self.at = widths, 0

    def __next__(self):
        self.at += 1
        return jnp.ones(self.widths[(self.at - 1) % len(self.widths)])

    def get_state(self):
        return self.at

    def set_state(self, at):
        self.at = at


def fitted(tmp_path, batches, steps, **options):
    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1), {"reward": batch.sum()}

    state = train.init({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0))
    with metrics.MetricsWriter(tmp_path / "run", tensorboard=False) as writer:
        train.fit(step, state, batches, num_steps=steps, phase="rl", writer=writer, **options)
    return metrics.read_metrics(tmp_path / "run")


def test_records_tell_when_something_was_compiled(tmp_path):
    rows = fitted(tmp_path, Widths(3, 3, 3, 5, 3), 6)
    # The last batch of another length means one program more, in its step.
    assert [row["compilations"] > 0 for row in rows] == [True, False, False, True, False, False]
    assert all((row["seconds_compiling"] > 0) == (row["compilations"] > 0) for row in rows)
    assert all(row["seconds"] >= row["seconds_waiting"] >= 0 for row in rows)
    assert not any(map(metrics.repeats, rows[0].keys() - {"step", "phase", "reward"}))
    assert all(map(metrics.repeats, ("step", "reward", "tokens", "accuracy/level 2")))


def test_a_trace_of_some_steps(tmp_path):
    profile = train.Profile(tmp_path / "trace", first=2, steps=2)
    fitted(tmp_path, Widths(3), 5, profile=profile)
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    # A run that ends within the traced steps ends the trace as well: another one can begin.
    fitted(tmp_path / "b", Widths(3), 2, profile=train.Profile(tmp_path / "b", first=2, steps=9))
    fitted(tmp_path / "c", Widths(3), 2, profile=train.Profile(tmp_path / "c", first=1, steps=1))
    assert len(list((tmp_path / "b").rglob("*.xplane.pb"))) == 1
    assert len(list((tmp_path / "c").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("values", [(0, 1), (1, 0)])
def test_bad_profiles(tmp_path, values):
    with pytest.raises(ValueError, match="profile: expected a first step"):
        train.Profile(tmp_path, *values)


def test_memory_is_the_most_of_the_devices(monkeypatch):
    def device(used, peak):
        stats = {"bytes_in_use": used, "peak_bytes_in_use": peak}
        return types.SimpleNamespace(memory_stats=lambda: stats)

    monkeypatch.setattr(jax, "local_devices", lambda: [device(5, 7), device(3, 9)])
    found = observing.Watch().read()
    assert (found["device_memory"], found["device_memory_peak"]) == (5, 9)


class FakeWandb(types.ModuleType):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.opened, self.logged, self.axes, self.finished = [], [], [], 0

    def init(self, **options):
        self.opened.append(options)
        run = types.SimpleNamespace(
            id=options["id"] or "new",
            log=self.logged.append,
            define_metric=lambda *a, **k: self.axes.append((*a, k.get("step_metric"))),
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )
        return run


def test_weights_and_biases(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):  # the second goes on with the first one's run
        with metrics.MetricsWriter(tmp_path, tensorboard=False, wandb="arithmetic") as writer:
            writer.write(3, {"reward": 0.5, "loss": float("nan")}, phase="rl")
    assert [o["id"] for o in fake.opened] == [None, "new"]
    assert all(o["project"] == "arithmetic" and o["resume"] == "allow" for o in fake.opened)
    assert fake.logged == [{"rl/step": 3, "rl/reward": 0.5}] * 2 and fake.finished == 2
    assert fake.axes[:2] == [("rl/step", None), ("rl/*", "rl/step")]
    assert json.loads((tmp_path / "wandb_run.json").read_text())["id"] == "new"


def test_without_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        metrics.MetricsWriter(tmp_path, wandb="arithmetic")
