"""Updates that are not finite: skipped to the bit, counted, written down, and the end of a run."""

import dataclasses
import functools
import json
import math

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_processes import free_port

from pgjax import objectives, train
from pgjax.diagnostics import problems
from pgjax.types import PolicyOutputs, Rollout, TokenSupport

GROUPS, SAMPLES, LENGTH, ACTIONS = 2, 4, 3, 4


def problem():
    """What the digits of a prompt's sequence add up to, times the prompt."""

    def logits(params, tokens):
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        return params["table"][before] + params["bias"]

    return problems.TokenProblem(
        num_prompts=GROUPS,
        num_actions=ACTIONS,
        horizon=LENGTH,
        logits=logits,
        reward=lambda tokens: tokens[:, 1:].sum(-1) * (1.0 + tokens[:, 0]),
    )


PROBLEM = problem()
OUTPUTS = functools.partial(problems.outputs, PROBLEM)
PARAMS = {
    "table": jax.random.normal(jax.random.key(3), (ACTIONS, ACTIONS)),
    "bias": jnp.zeros(ACTIONS),
}


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def batch(key=0):
    found = problems.sample(PROBLEM, PARAMS, jax.random.key(key), group_size=SAMPLES)
    return found.replace(proximal_logprobs=None)


def changed(field, value, where=(5, 2), rollout=None):
    rollout = batch() if rollout is None else rollout
    given = getattr(rollout, field)
    return rollout.replace(**{field: given.at[where[: given.ndim]].set(value)})


def same(one, other):
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))

    jax.tree.map(check, one, other)


def random_steps():
    """Adam's steps with noise: a state with a key and a count beside the moments."""
    adam = optax.adam(0.1)

    def init(params):
        return {"adam": adam.init(params), "key": jax.random.key(7), "calls": jnp.int32(0)}

    def update(grads, state, params=None):
        updates, inner = adam.update(grads, state["adam"], params)
        key, own = jax.random.split(state["key"])
        noise = 1e-3 * jax.random.normal(own)
        updates = jax.tree.map(lambda x: x + noise, updates)
        return updates, {"adam": inner, "key": key, "calls": state["calls"] + 1}

    return optax.GradientTransformation(init, update)


def made(objective, optimizer=None, **options):
    optimizer = optimizer or random_steps()
    state = train.init(copy(PARAMS), optimizer, jax.random.key(0), objective=objective)
    return state, train.make_update(OUTPUTS, objective, optimizer, **options)


def with_reference(rollout):
    return rollout.replace(reference_logprobs=rollout.behavior_logprobs)


GRPO = objectives.grpo()
KL = objectives.grpo(kl_coefficient=0.1)


def exploding():
    """A loss beyond float32 where a reward is large."""

    def term(outputs, rollout):
        slope = jnp.where(rollout.rewards[:, None] > 1e3, 200.0, 0.0)
        return jnp.exp(slope * jnp.abs(outputs.logprobs))

    cost = objectives.Regularizer("cost", term, 1.0)
    return dataclasses.replace(GRPO, regularizers=(cost,))


def failing_steps():
    """An optimizer whose own arithmetic fails where the gradient is large."""
    inner = random_steps()

    def update(grads, state, params=None):
        updates, state = inner.update(grads, state, params)
        failure = jnp.where(optax.tree.norm(grads) > 1e3, jnp.nan, 0.0)
        return jax.tree.map(lambda x: x + failure, updates), state

    return optax.GradientTransformation(inner.init, update)


GOOD = batch()
BAD = {
    "NaN behaviour": (GRPO, None, GOOD, changed("behavior_logprobs", np.nan)),
    "infinite behaviour": (objectives.gspo(), None, GOOD, changed("behavior_logprobs", np.inf)),
    "NaN reference": (
        KL,
        None,
        with_reference(GOOD),
        changed("reference_logprobs", np.nan, rollout=with_reference(GOOD)),
    ),
    "exploding loss": (exploding(), None, GOOD, changed("rewards", 1e4)),
    "failing optimizer": (
        objectives.reinforce(),
        failing_steps(),
        GOOD,
        GOOD.replace(rewards=1e6 * GOOD.rewards),
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("empty_caches")
def test_a_bad_batch_leaves_no_trace(name):
    objective, optimizer, good, bad = BAD[name]
    for microbatches in (1, 4) if name == "NaN behaviour" else (1,):
        failing = name == "failing optimizer"
        options = {"num_microbatches": microbatches, "measure_updates": failing}
        state, update = made(objective, optimizer, **options)
        state, metrics = update(state, good)
        assert metrics["skipped_updates"] == 0 and np.isfinite(metrics["loss"])
        before = copy(state)
        state, metrics = update(state, bad)
        assert metrics["skipped_updates"] == 1
        assert failing == all(np.isfinite(metrics[n]) for n in ("loss", "gradient_norm"))
        assert ("update_norm" in metrics) == failing
        if failing:
            assert not np.isfinite(metrics["update_norm"])
        same((state.params, state.opt_state), (before.params, before.opt_state))
        assert int(state.step) == 2
        after, metrics = update(state, good)
        assert metrics["skipped_updates"] == 0
        never, _ = update(before, good)
        same((after.params, after.opt_state), (never.params, never.opt_state))
        assert np.any(np.asarray(after.params["table"]) != np.asarray(PARAMS["table"]))
        assert int(after.step) == 3 and int(never.step) == 2
        assert update._cache_size() == 1


def test_rewards_that_are_not_finite_are_left_out_as_before():
    start, update = made(GRPO, optax.sgd(0.1))
    for value in (np.nan, np.inf, -np.inf):
        state, metrics = update(copy(start), changed("rewards", value))
        assert metrics["skipped_updates"] == 0
        np.testing.assert_allclose(metrics["invalid_rewards"], 1 / 8)
        assert np.any(np.asarray(state.params["table"]) != np.asarray(PARAMS["table"]))


def test_only_the_bad_minibatch_is_skipped():
    bad = changed("behavior_logprobs", np.nan)  # in the second group
    first = jax.tree.map(lambda x: x[:SAMPLES], bad)
    state, update = made(GRPO, optax.sgd(0.1), num_minibatches=2, group_size=SAMPLES)
    state, metrics = update(state, bad)
    assert metrics["skipped_updates"] == 1 and np.isnan(metrics["loss"])
    alone, update = made(GRPO, optax.sgd(0.1))
    alone, _ = update(alone, first)
    for name, old in PARAMS.items():
        np.testing.assert_allclose(state.params[name], alone.params[name], rtol=1e-6, atol=1e-7)
        assert np.any(np.asarray(state.params[name]) != np.asarray(old))
    state, update = made(
        GRPO, optax.sgd(0.1), num_epochs=3, num_minibatches=2, num_microbatches=2, group_size=2
    )
    state, metrics = update(state, bad)
    assert metrics["skipped_updates"] == 3
    assert np.any(np.asarray(state.params["table"]) != np.asarray(PARAMS["table"]))
    assert all(np.all(np.isfinite(x)) for x in state.params.values())


def test_a_memory_does_not_take_in_what_is_not_finite():
    """Of a batch that poisons it nothing is remembered; a start at infinity is no poison."""

    def update(memory, rollout):
        return {
            "mean": 0.5 * memory["mean"] + 0.5 * rollout.behavior_logprobs.mean(),
            "least": jnp.minimum(memory["least"], rollout.rewards.min()),
            "batches": memory["batches"] + 1,
        }

    def init():
        return {"mean": jnp.float32(0), "least": jnp.float32(np.inf), "batches": jnp.int32(0)}

    objective = dataclasses.replace(GRPO, memory=objectives.Memory(init, update))
    state, step = made(objective)
    state, _ = step(state, GOOD)
    assert int(state.memory["batches"]) == 1 and np.isfinite(state.memory["least"])
    before = copy(state)
    state, metrics = step(state, changed("behavior_logprobs", np.nan))
    assert metrics["skipped_updates"] == 1
    same(state.memory, before.memory)
    state, _ = step(state, GOOD)
    same(state.memory, step(before, GOOD)[0].memory)
    assert int(state.memory["batches"]) == 2


# --- what is kept ---------------------------------------------------------------------------------


def answering(skipped=1.0, **metrics):
    """An update that does nothing but say that it skipped."""

    def update(state, rollout, *rest):
        numbers = {"loss": np.nan, "gradient_norm": np.inf, "update_norm": 1.0, **metrics}
        state = state.replace(step=state.step + 1)
        return state, {n: jnp.float32(x) for n, x in numbers.items()} | {
            "skipped_updates": jnp.float32(skipped)
        }

    return update


def plain_state(params=None):
    return train.init(copy(PARAMS) if params is None else params, optax.sgd(1.0), jax.random.key(0))


def full_rollout():
    rows, shape = GOOD.tokens.shape[0], GOOD.tokens.shape
    numbers = jax.random.normal(jax.random.key(1), shape)
    return GOOD.replace(
        behavior_logprobs=GOOD.behavior_logprobs.at[5, 2].set(np.nan).at[7].set(-np.inf),
        values=numbers.astype(jnp.bfloat16).at[1, 1].set(np.nan),
        rewards=np.asarray(GOOD.rewards),
        truncated=jnp.arange(rows) % 2 == 0,
        experts=jnp.zeros((*shape, 2, 1), jnp.int32),
        extras={"answer_ids": jnp.arange(rows), "cost/step": numbers},
        old=PolicyOutputs(
            logprobs=numbers,
            support=TokenSupport(jnp.ones((*shape, 2)), jnp.zeros((*shape, 2), int), GOOD.tokens),
        ),
    )


def test_what_was_skipped_can_be_read_back(tmp_path, caplog):
    rollout = full_rollout()
    update = train.keep_skipped(answering(ratio_min=np.exp(-3.0), ratio_max=2.0), tmp_path / "a")
    with caplog.at_level("WARNING", logger="pgjax.train"):
        state, metrics = update(plain_state(), rollout)
    assert int(state.step) == 1 and np.isnan(metrics["loss"])
    path = tmp_path / "a" / "step_1.npz"
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_1.json", "step_1.npz"]
    assert str(path) in caplog.text and "gradient norm inf" in caplog.text
    found = train.load_skipped(path)
    assert isinstance(found, Rollout) and isinstance(found.old.support, TokenSupport)
    assert jax.tree.structure(found) == jax.tree.structure(rollout)

    def exactly(a, b):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype
        assert a.tobytes() == np.asarray(b).tobytes() and a.shape == b.shape

    jax.tree.map(exactly, found, rollout)
    diagnosis = json.loads(path.with_suffix(".json").read_text())
    assert diagnosis["step"] == 1 and diagnosis["loss"] == "nan"
    assert diagnosis["gradient_norm"] == "inf" and diagnosis["update_norm"] == 1.0
    assert math.isclose(diagnosis["largest_log_ratio"], 3.0, rel_tol=1e-6)
    assert diagnosis["parameters_not_finite"] == []
    assert diagnosis["fields"]["behavior_logprobs"] == {
        "not_finite": 1 + GOOD.tokens.shape[1],
        "num_rows": 2,
        "rows": [5, 7],
    }
    assert diagnosis["fields"]["values"]["rows"] == [1]
    assert diagnosis["fields"]["old/logprobs"]["not_finite"] == 0
    assert "tokens" not in diagnosis["fields"]
    text = train.describe_skipped(tmp_path / "a")
    assert "behavior_logprobs: 5 not finite, in rows 5, 7" in text and str(path.parent) in text
    assert "loss: nan" in text and "parameters not finite" not in text


def test_a_kept_batch_trains_as_the_given_one_did(tmp_path):
    state, update = made(GRPO)
    bad = changed("behavior_logprobs", np.nan)
    update = train.keep_skipped(update, tmp_path)
    state, _ = update(state, GOOD)
    assert not list(tmp_path.iterdir())
    update(state, bad)
    again = train.load_skipped(tmp_path / "step_2.npz")
    mended = again.replace(behavior_logprobs=np.nan_to_num(again.behavior_logprobs))
    state, metrics = update(made(GRPO)[0], mended)
    assert metrics["skipped_updates"] == 0
    wanted, _ = update(made(GRPO)[0], changed("behavior_logprobs", 0.0))
    same(state.params, wanted.params)


def test_so_many_batches_and_no_more(tmp_path):
    for sitting in range(2):
        update = train.keep_skipped(answering(), tmp_path, keep=3)
        state = plain_state().replace(step=jnp.int32(5 * sitting))
        for _ in range(2):
            state, _ = update(state, GOOD)
    names = ["step_1", "step_2", "step_6"]
    assert sorted(p.stem for p in tmp_path.glob("*.npz")) == names
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == names
    update = train.keep_skipped(answering(skipped=0.0), tmp_path / "none")
    update(state, GOOD)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        train.keep_skipped(answering(), tmp_path, keep=0)


def test_what_is_to_blame_is_named(tmp_path):
    assert "no batch was kept" in train.describe_skipped(tmp_path / "nowhere")
    update = train.keep_skipped(answering(), tmp_path)
    update(plain_state(), GOOD)
    assert "the model's outputs, the loss or the optimizer" in train.describe_skipped(tmp_path)
    params = {**PARAMS, "bias": jnp.array([0.0, np.nan, 0.0, 0.0])}
    update(plain_state(params).replace(step=jnp.int32(10)), GOOD)  # after step_1, not before it
    text = train.describe_skipped(tmp_path)
    assert "step_11.json" in text and "parameters not finite: bias" in text
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        train.load_skipped(tmp_path / "step_3.npz")
    np.savez(tmp_path / "other.npz", tokens=np.zeros(3))
    with pytest.raises(ValueError, match="one without mask, rewards"):
        train.load_skipped(tmp_path / "other.npz")


PROCESSES = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import parallel

    directory, port, index = sys.argv[1:]
    parallel.connect(f"127.0.0.1:{port}", count=2, index=int(index))
    mesh = parallel.make_mesh("data=4")
    rows, length = 8, 3
    own = np.arange(rows // 2) + int(index) * rows // 2
    given = pg.Rollout(
        tokens=np.tile(own[:, None], (1, length)).astype(np.int32),
        mask=np.ones((4, length), bool),
        behavior_logprobs=np.where(own[:, None] == 6, np.nan, np.zeros((4, length), np.float32)),
        rewards=own.astype(np.float32),
        group_ids=own.astype(np.int32),
    )
    rollout = parallel.place_rows(given, mesh)

    def update(state, rollout):
        one = jnp.float32(1)
        names = ("loss", "gradient_norm", "update_norm", "skipped_updates")
        return state.replace(step=state.step + 1), dict.fromkeys(names, one)

    params = {"w": jnp.zeros(3)}
    state = pg.train.init(params, optax.sgd(1.0), jax.random.key(0))
    pg.train.keep_skipped(update, directory)(state, rollout)
    path = f"{directory}/step_1.process_{index}"
    found = pg.train.load_skipped(path + ".npz")
    diagnosis = json.loads(open(path + ".json").read())
    print(json.dumps({
        "rows": [np.asarray(x).reshape(4, -1)[:, 0].tolist()
                 for x in (found.tokens, found.rewards, found.group_ids)],
        "bad": diagnosis["fields"]["behavior_logprobs"],
    }))
"""


def test_each_process_keeps_its_own_rows(tmp_path):
    found = devices.run_each(PROCESSES, tmp_path, free_port(), processes=2, devices=2)
    for index, result in enumerate(found):
        assert result["rows"] == [[i + 4 * index for i in range(4)]] * 3
    assert found[0]["bad"]["not_finite"] == 0
    assert found[1]["bad"] == {"not_finite": 3, "num_rows": 1, "rows": [2]}
    assert len(list(tmp_path.iterdir())) == 4


# --- the end of a run -----------------------------------------------------------------------------


class Batches:
    """Good ones, but for the given positions."""

    def __init__(self, bad):
        self.position, self.bad = 0, bad

    def __next__(self):
        self.position += 1
        found = batch(self.position)
        if self.position in self.bad:
            return changed("behavior_logprobs", np.nan, rollout=found)
        return found

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def test_a_run_stops_where_nothing_is_finite_any_more(tmp_path):
    state, update = made(GRPO)
    options = {"num_steps": 12, "phase": "rl"}
    writer = train.metrics.MetricsWriter(tmp_path, tensorboard=False)
    with train.checkpoints.open(tmp_path / "checkpoints") as saved:
        with pytest.raises(train.NonFinite) as stop:
            train.fit(
                update,
                state,
                Batches({2, 4, 5, 6}),
                writer=writer,
                checkpoints=saved,
                max_skipped=3,
                **options,
            )
        assert saved.latest_step() == 6
    writer.close()
    error = stop.value
    assert str(error) == (
        "rl: 3 steps in a row skipped, the last of them step 6: last loss nan, gradient norm nan"
    )
    assert (error.phase, error.step, error.skipped) == ("rl", 6, 3)
    skipped = [r["skipped_updates"] for r in train.metrics.read_metrics(tmp_path)]
    assert skipped == [0, 1, 0, 1, 1, 1]

    def resumed(bad):
        with train.checkpoints.open_readonly(tmp_path / "checkpoints") as saved:
            state, metadata = saved.restore(like=made(GRPO)[0])
        batches = Batches(bad)
        batches.set_state(metadata["batches"])
        return state, batches

    state, batches = resumed({7, 8})  # two more in a row are not five
    assert int(state.step) == batches.position == 6
    only_good = made(GRPO)[0]
    for position in (1, 3):
        only_good, _ = update(only_good, batch(position))
    same((state.params, state.opt_state), (only_good.params, only_good.opt_state))
    done = train.fit(update, state, batches, max_skipped=3, **options)
    assert int(done.step) == 12
    # The last step may be the one too many; 0 means never.
    state, batches = resumed(set(range(7, 13)))
    done = train.fit(update, copy(state), batches, max_skipped=0, **options)
    same(done.params, state.params)
    state, batches = resumed(set(range(7, 13)))
    with pytest.raises(train.NonFinite, match="6 steps in a row skipped, the last of them step 12"):
        train.fit(update, state, batches, max_skipped=6, **options)
    with pytest.raises(ValueError, match="max_skipped: expected at least 0"):
        train.fit(update, state, batches, max_skipped=-1, **options)


@pytest.mark.parametrize("at", [3, 4])  # a step with a checkpoint, and one without
def test_a_run_with_lost_parameters_stops_and_keeps_its_checkpoint(tmp_path, at):
    """An optimizer that fails where nobody measures its steps."""

    class Large(Batches):
        def __next__(self):
            found = super().__next__()
            return found.replace(rewards=1e6 * found.rewards) if self.position == at else found

    state, update = made(objectives.reinforce(), failing_steps())
    expected, _ = update(made(objectives.reinforce(), failing_steps())[0], batch(1))
    options = {"num_steps": 12, "phase": "rl", "checkpoint_every": 1 if at == 3 else 3}
    with train.checkpoints.open(tmp_path) as saved:
        with pytest.raises(train.NonFinite, match="the parameters are not finite") as stop:
            train.fit(update, state, Large(()), checkpoints=saved, **options)
        assert stop.value.lost and "not saved" in str(stop.value)
        assert (stop.value.step, stop.value.skipped) == ((3, 0) if at == 3 else (5, 1))
        newest = 2 if at == 3 else 3
        assert saved.latest_step() == newest
        restored, _ = saved.restore(like=made(objectives.reinforce(), failing_steps())[0])
    for position in range(2, newest + 1):
        expected, _ = update(expected, batch(position))
    same(restored.params, expected.params)


def test_a_skipped_step_holds_one_state():
    """Beside the old state the step needs the gradient alone, unless updates are measured."""
    sizes = {}
    wide = {"table": jnp.ones((512, 512)), "bias": jnp.ones(512)}

    def outputs(params, rollout, needs):
        h = params["table"].sum(0) + params["bias"]
        logits = jnp.broadcast_to(h, (*rollout.tokens.shape, 512))
        found = jax.nn.log_softmax(logits)[..., 0]
        return PolicyOutputs(logprobs=jnp.where(rollout.mask, found, 0.0))

    for measured in (False, True):
        optimizer = optax.adamw(1e-3)
        state = train.init(copy(wide), optimizer, jax.random.key(0))
        update = train.make_update(outputs, GRPO, optimizer, measure_updates=measured)
        program = update.lower(state, batch()).compile()
        sizes[measured] = program.memory_analysis().temp_size_in_bytes
    of_parameters = sum(x.nbytes for x in jax.tree.leaves(wide))
    assert sizes[False] < 1.2 * of_parameters  # the gradient
    assert sizes[True] > sizes[False] + 0.9 * of_parameters, sizes


# --- experiments ----------------------------------------------------------------------------------


def poisoned(to_rollout):
    def made(samples, rewards, **options):
        found = to_rollout(samples, rewards, **options)
        return found.replace(behavior_logprobs=found.behavior_logprobs.at[3].set(jnp.nan))

    return made


@pytest.mark.slow
def test_a_checkpoint_is_not_trained_on_what_is_not_finite(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("math_verify")
    import test_experiments_llm as llm
    import tiny_checkpoint

    from experiments import grpo_llm, sft
    from experiments.llm import build
    from pgjax.train import collecting

    model = tiny_checkpoint.make(tmp_path / "model", num_layers=1, hidden_size=16, mlp_size=16)
    task, out = tmp_path / "task.jsonl", tmp_path / "run"
    lines = [{"question": f"{a} + 1?", "answer": f"#### {a + 1}"} for a in range(40)]
    task.write_text("\n".join(map(json.dumps, lines)))
    flags = llm.grpo_flags(model, task, out, **{"rl.steps": 8})
    with monkeypatch.context() as patch:
        patch.setattr(collecting, "to_rollout", poisoned(collecting.to_rollout))
        assert grpo_llm.main(flags) == 3
    said = capsys.readouterr().out
    assert "rl: 5 steps in a row skipped, the last of them step 5" in said
    assert str(out / "skipped" / "rl" / "step_5.json") in said and "loss: nan" in said
    assert "behavior_logprobs: 54 not finite, in rows 3" in said
    assert f"--resume --out {out}" in said
    assert len(list((out / "skipped" / "rl").glob("*.npz"))) == 5
    assert grpo_llm.main(["--resume", "--out", str(out)]) == 0
    records = [r for r in train.metrics.read_metrics(out) if r["phase"] == "rl"]
    assert [r["skipped_updates"] for r in records] == [1] * 5 + [0] * 3

    monkeypatch.setattr(build, "make_optimizer", lambda *given: optax.scale(np.nan))
    options = {"steps": 8, "batch-size": 4, "lengths": 64}
    assert sft.main(llm.flags(model, task, tmp_path / "sft", **options)) == 3
    said = capsys.readouterr().out
    assert "sft: the parameters are not finite after step 2, and are not saved" in said
    assert str(tmp_path / "sft" / "skipped" / "sft" / "step_2.json") in said
    assert "parameters not finite: " in said and "before they were lost" in said


@pytest.mark.slow
def test_the_main_job_stops_too(tmp_path, monkeypatch, capsys):
    from test_train import TINY

    from experiments import grpo_random_calculation
    from pgjax.train import collecting

    out = tmp_path / "run"
    monkeypatch.setattr(collecting, "to_rollout", poisoned(collecting.to_rollout))
    flags = [*TINY, "--out", str(out), "--data-dir", str(tmp_path / "data")]
    assert grpo_random_calculation.main(flags) == 3
    said = capsys.readouterr().out
    assert "rl: 5 steps in a row skipped, the last of them step 5" in said
    assert str(out / "skipped" / "rl") in said and f"--resume --out {out}" in said
    kept = sorted(path.name for path in (out / "skipped" / "rl").iterdir())
    assert kept == [f"step_{n}.{kind}" for n in range(1, 6) for kind in ("json", "npz")]
