"""Updates, loops and runs: exactness of accumulation, one compilation, bad input, resuming."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from experiments.shared import kills
from pgjax import train
from pgjax.tasks import random_calculation as task

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = pg.models.DecoderConfig(
    vocab_size=task.VOCAB_SIZE,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=32,
    max_length=24,
)


@pytest.fixture(scope="module")
def model():
    decoder, params = pg.models.init(CONFIG, jax.random.key(0))
    return decoder, {
        "decoder": params,
        "value_head": pg.models.value_head_init(CONFIG, jax.random.key(1)),
    }


def sampled_rollout(decoder, params, *, num_prompts=4, num_samples=4, key=0):
    prompts = np.array([[5, 12, 6, 18], [7, 13, 3, 18], [9, 14, 2, 18], [4, 12, 4, 18]], np.int32)
    samples = pg.sampling.generate(
        decoder,
        params["decoder"],
        prompts[:num_prompts],
        np.full(num_prompts, 4, np.int32),
        jax.random.key(key),
        num_samples=num_samples,
        max_new_tokens=8,
        stop_tokens=(task.EOS,),
    )
    rewards = jax.random.normal(jax.random.key(key + 7), (num_prompts * num_samples,))
    return train.to_rollout(samples, rewards)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def one_update(model, objective, rollout, reference=None, **options):
    decoder, params = model
    optimizer = optax.sgd(1.0)
    state = train.init(copy(params), optimizer, jax.random.key(0))
    update = train.make_update(
        train.language_model_outputs(decoder), objective, optimizer, **options
    )
    return update(state, rollout, reference)


RECIPES = {
    "grpo": pg.objectives.grpo(kl_coefficient=0.1),
    "dapo": pg.objectives.dapo(),
    "ppo": pg.objectives.ppo(entropy_coefficient=0.01),
    "gspo": pg.objectives.gspo(low=0.2, high=0.2),
    "tis": pg.objectives.with_mismatch_weights(pg.objectives.grpo()),
    "supervised": pg.objectives.supervised(),
}


@pytest.mark.parametrize("name", RECIPES)
def test_accumulated_gradient_and_metrics_equal_the_full_batch(model, name):
    """Rows differ in length, so means of means would differ visibly."""
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    lengths = np.asarray(rollout.mask).sum(1)
    assert len(set(lengths.tolist())) > 2
    reference = jax.tree.map(lambda x: x * 1.01, params)
    whole, metrics = one_update(model, RECIPES[name], rollout, reference)
    parts, part_metrics = one_update(model, RECIPES[name], rollout, reference, num_microbatches=8)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), whole.params, params))
    assert max(moved) > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7),
        whole.params,
        parts.params,
    )
    assert set(metrics) == set(part_metrics)
    for key in metrics:
        np.testing.assert_allclose(
            part_metrics[key], metrics[key], rtol=2e-4, atol=2e-6, err_msg=key
        )


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_trimming_padding_changes_nothing(model, name):
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    reference = jax.tree.map(lambda x: x * 1.01, params)
    whole, metrics = one_update(model, RECIPES[name], rollout, reference)
    for parts in (1, 4):
        trimmed, other = one_update(
            model, RECIPES[name], rollout, reference, num_microbatches=parts, widths=(6, 9, 50)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7),
            whole.params,
            trimmed.params,
        )
        for key in metrics:
            np.testing.assert_allclose(other[key], metrics[key], rtol=2e-4, atol=2e-6, err_msg=key)


def test_the_update_is_the_gradient_of_the_loss(model):
    """One SGD step of rate 1 subtracts the gradient of the loss as a user would write it."""
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    state, metrics = one_update(model, pg.objectives.grpo(), rollout)

    def loss(params):
        hidden = decoder.apply(params["decoder"], rollout.tokens)
        logprobs = pg.logprobs.from_logits(
            decoder.logits(params["decoder"], hidden), rollout.tokens
        )
        advantages = pg.advantages.group_normalize(rollout.rewards, rollout.group_ids, num_groups=4)
        ratio = pg.surrogates.importance_ratio(logprobs, rollout.behavior_logprobs)
        losses = pg.surrogates.clipped(ratio, advantages[:, None], low=0.2, high=0.2)
        return pg.aggregate.sequence_mean_token_mean(losses, rollout.mask)

    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - g, atol=2e-6),
        state.params,
        params,
        gradient,
    )


def test_epochs_and_minibatches(model):
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    state, metrics = one_update(
        model, pg.objectives.grpo(), rollout, num_epochs=2, num_minibatches=4, num_microbatches=2
    )
    again, _ = one_update(
        model, pg.objectives.grpo(), rollout, num_epochs=2, num_minibatches=4, num_microbatches=2
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert int(state.step) == 1
    assert float(metrics["ratio_max"]) > 1.0 > float(metrics["ratio_min"])
    assert float(metrics["groups_without_signal"]) == 0.0


def test_sampler_and_learner_agree(model):
    decoder, params = model
    rollout = sampled_rollout(decoder, params, key=3)
    out = train.language_model_outputs(decoder)(params, rollout, frozenset({"entropy"}))
    np.testing.assert_allclose(out.logprobs, rollout.behavior_logprobs, atol=1e-4)
    assert np.all(np.asarray(out.entropy)[~np.asarray(rollout.mask)] == 0)


def test_loss_curve_goes_down_with_any_objective(model):
    """Advantage 1 for one fixed completion set: every update must raise its likelihood."""
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    optimizer = optax.adam(1e-2)
    state = train.init(copy(params), optimizer, jax.random.key(0))
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.supervised(), optimizer
    )
    losses = []
    for _ in range(20):
        state, metrics = update(state, rollout)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


# --- text steps -----------------------------------------------------------------------------------


def make_step(model, reward, objective=None, **options):
    decoder, params = model
    optimizer = optax.adam(1e-3)
    state = train.init(copy(params), optimizer, jax.random.key(5))
    update = train.make_update(
        train.language_model_outputs(decoder),
        objective or pg.objectives.grpo(),
        optimizer,
        state_shardings=train.shardings(state),
    )
    defaults = {"num_samples": 4, "max_new_tokens": 8, "stop_tokens": (task.EOS,)}
    return state, update, train.make_text_step(decoder, update, reward, **{**defaults, **options})


def batch_of(*texts):
    batch = task.prompt_batch(list(texts), length=6)
    return {**batch, "answers": np.array([eval(t[:-1]) for t in texts], np.int32)}


def exact(samples, batch, key):
    values, ok = task.parse_answer(samples.tokens, samples.mask)
    return pg.rewards.exact_reward(values, jnp.asarray(batch["answers"])[samples.prompt_ids], ok)


@pytest.mark.usefixtures("empty_caches")
def test_one_compilation_over_a_run(model):
    from pgjax.sampling import text as sampling_text

    state, update, step = make_step(model, exact)
    before = sampling_text._generate._cache_size()
    for i in range(6):
        state, _ = step(state, batch_of("3+4=", f"{i + 1}*2=", "7-1="))
    assert update._cache_size() == 1
    assert sampling_text._generate._cache_size() - before == 1
    assert int(state.step) == 6


def test_a_verifier_that_raises_costs_its_sample_and_is_logged(model, caplog):
    calls = []

    def verifier(completion, example):
        calls.append(completion)
        if len(calls) % 3 == 0:
            raise RuntimeError("no verdict")
        if len(calls) % 5 == 0:
            return float("nan")
        return float(len(calls) % 2)

    reward = train.host_reward(verifier, task.decode, lambda batch: list(batch["answers"]))
    state, _, step = make_step(model, reward)
    old = jax.tree.map(np.asarray, state.params)
    with caplog.at_level("WARNING", logger="pgjax.train"):
        state, metrics = step(state, batch_of("3+4=", "2*2="))
    assert len(calls) == 8
    assert "no verdict" in caplog.text and "sample left out" in caplog.text
    np.testing.assert_allclose(metrics["invalid_rewards"], 3 / 8)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, old)), strict=True)
    )


@pytest.mark.parametrize(
    ("reward", "samples"),
    [
        (lambda s, b, k: jnp.ones(s.tokens.shape[0]), 4),  # all rewards equal
        (lambda s, b, k: jnp.full(s.tokens.shape[0], jnp.nan), 4),  # every verdict missing
    ],
)
def test_batches_without_signal_change_nothing(model, reward, samples):
    decoder, params = model
    optimizer = optax.sgd(0.1)
    state = train.init(copy(params), optimizer, jax.random.key(5))
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.grpo(), optimizer
    )
    step = train.make_text_step(
        decoder, update, reward, num_samples=samples, max_new_tokens=8, stop_tokens=(task.EOS,)
    )
    state, metrics = step(state, batch_of("3+4=", "2*2="))
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert float(metrics["groups_without_signal"]) == 1.0
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_group_size_one_learns_from_raw_rewards(model):
    state, _, step = make_step(model, lambda s, b, k: jnp.ones(s.tokens.shape[0]), num_samples=1)
    state, metrics = step(state, batch_of("3+4=", "2*2="))
    np.testing.assert_allclose(metrics["advantage_magnitude"], 1.0, rtol=1e-5)


def test_a_completion_of_padding_only_is_ignored(model):
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    emptied = rollout.replace(mask=rollout.mask.at[3].set(False))
    state, metrics = one_update(model, pg.objectives.grpo(), emptied)
    other = emptied.replace(tokens=emptied.tokens.at[3, 4:].set(0))
    again, _ = one_update(model, pg.objectives.grpo(), other)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_bad_input_is_named(model):
    decoder, params = model
    rollout = sampled_rollout(decoder, params)
    with pytest.raises(ValueError, match="num_epochs"):
        one_update(model, pg.objectives.grpo(), rollout, num_epochs=0)
    with pytest.raises(ValueError, match="16 sequences cannot be cut"):
        one_update(model, pg.objectives.grpo(), rollout, num_minibatches=3)
    with pytest.raises(ValueError, match="reference_params"):
        one_update(model, pg.objectives.grpo(kl_coefficient=0.1), rollout)
    with pytest.raises(ValueError, match="value_head"):
        one_update((decoder, {"decoder": params["decoder"]}), pg.objectives.ppo(), rollout)
    with pytest.raises(ValueError, match="rewards"):
        train.to_rollout(
            pg.sampling.generate(
                decoder,
                params["decoder"],
                np.array([[5, 18]], np.int32),
                np.array([2], np.int32),
                jax.random.key(0),
                num_samples=2,
                max_new_tokens=2,
            ),
            jnp.ones(3),
        )
    with pytest.raises(ValueError, match="prompts"):
        pg.sampling.pad_prompts([])
    _, _, step = make_step(model, exact, max_new_tokens=100)
    with pytest.raises(ValueError, match="max_length"):
        step(train.init(copy(params), optax.adam(1e-3), jax.random.key(0)), batch_of("3+4="))


class Endless:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return batch_of("3+4=", f"{1 + self.position % 7}*2=")

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def test_fit_resumes_bit_for_bit_and_writes_its_metrics(model, tmp_path):
    def run(directory, stops):
        writer = train.metrics.MetricsWriter(directory, tensorboard=False)
        for stop in stops:
            state, _, step = make_step(model, exact)
            batches = Endless()
            with train.checkpoints.open(directory / "checkpoints") as saved:
                if saved.latest_step() is not None:
                    state, metadata = saved.restore(like=state)
                    batches.set_state(metadata["batches"])
                state = train.fit(
                    step,
                    state,
                    batches,
                    num_steps=stop,
                    phase="rl",
                    writer=writer,
                    checkpoints=saved,
                    checkpoint_every=2,
                )
        writer.close()
        return state, train.metrics.read_metrics(directory)

    straight, records = run(tmp_path / "a", [7])
    broken, again = run(tmp_path / "b", [3, 4, 7])
    jax.tree.map(np.testing.assert_array_equal, straight.params, broken.params)
    jax.tree.map(np.testing.assert_array_equal, straight.opt_state, broken.opt_state)
    assert [r["step"] for r in records] == [r["step"] for r in again] == list(range(1, 8))
    assert [r["loss"] for r in records] == [r["loss"] for r in again]


def test_fit_stops_cleanly_on_a_signal(model, tmp_path):
    state, _, step = make_step(model, exact)

    def stopping(state, batch):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, batch)

    with train.checkpoints.open(tmp_path) as saved:
        with pytest.raises(train.Interrupted, match="SIGINT at step 3"):
            train.fit(stopping, state, Endless(), num_steps=9, phase="rl", checkpoints=saved)
        assert saved.latest_step() == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the main job as a process --------------------------------------------------------------------

TINY = [
    *("--model.hidden-size", "16", "--model.num-layers", "2", "--model.mlp-size", "32"),
    *("--model.num-heads", "2", "--model.num-kv-heads", "2"),
    *("--warmup.steps", "12", "--warmup.batch-size", "8", "--warmup.levels", "1", "2", "3"),
    *("--rl.steps", "16", "--rl.prompts", "4", "--rl.samples", "4", "--rl.levels", "1", "2"),
    *("--evaluation.levels", "1", "2", "--evaluation.test-prompts", "4"),
    *("--evaluation.validation-prompts", "4", "--evaluation.every", "8"),
    *("--checkpoint-every", "3", "--show-every", "0"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One data set and one compilation cache for all processes of this file."""
    return kills.environment(tmp_path_factory.mktemp("main_job"))


def start(environment, *arguments):
    command = [sys.executable, "-m", "experiments.grpo_random_calculation", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture
def here(environment, monkeypatch, capfd):
    """The main job in this process, for what ends before it trains: its exit status and output."""
    from experiments import grpo_random_calculation

    for name, setting in environment.items():
        monkeypatch.setenv(name, setting)
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        try:
            code = grpo_random_calculation.main([*arguments])
        except SystemExit as end:
            code = end.code
        return code, "".join(capfd.readouterr())

    return call


def test_killed_ten_times_the_run_ends_with_identical_parameters(tmp_path):
    """SIGKILL at random moments: each run ends as the uninterrupted one, every step once."""
    moments = kills.moments(random.Random(0), 10)
    environment = kills.environment(tmp_path)
    tally = kills.run(tmp_path, moments, processes=1, seed=0, environment=environment)
    assert len(tally.kills) == len(tally.lost) == 10 and tally.runs > 0
    assert tally.mismatches == [] and tally.too_early == []
    assert max(tally.lost) <= 2 * kills.INTERVAL


def test_other_objective_and_optimizer_then_ctrl_c_and_resume(environment, tmp_path):
    out = str(tmp_path / "run")
    process = start(environment, *TINY, "--out", out, "--objective", "dapo", "--optimizer", "adamw")
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and '"rl"' in log.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 128 + signal.SIGINT, output
    assert "--resume" in output and "Traceback" not in output
    code, output = finish(start(environment, "--out", out, "--resume"))
    assert code == 0, output
    assert "level" in output and "curves.png" in output
    for name in ("results.json", "curves.png", "config.json", "metrics.jsonl", "tensorboard"):
        assert (tmp_path / "run" / name).exists(), name
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["objective"] == "dapo" and saved["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectiv", "dapo"], "objective"),
        (["--rl.stepz", "3"], "steps"),
        (["--objective-options", "hgih=0.3"], "no option 'hgih'"),
        (["--objective-options", "high=much"], "expected a number"),
        (["--mesh", "data=3,fsdp=5"], "mesh"),
        (["--warmup-from", "nowhere"], "nowhere"),
        (["--resume", "--out", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, tmp_path, arguments, message):
    if "--out" not in arguments:
        arguments = [*TINY, *arguments, "--out", str(tmp_path / "run")]
    code, output = here(*arguments)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output


def test_help_explains_every_field(here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, output = here("--help")
    assert code == 0
    from experiments.random_calculation import config as main_job

    for section in (main_job.Config, main_job.Model, main_job.Warmup, main_job.RL):
        for field in dataclasses.fields(section):
            assert field.name.replace("_", "-") in output, field.name
