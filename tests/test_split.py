"""Sampling on some devices while others learn: two of four virtual ones each."""

import devices
import numpy as np
import pytest

from pgjax import train

FOUR_DEVICES = """
    import json, sys, threading
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import parallel, train

    directory = sys.argv[1]
    config = pg.models.DecoderConfig(
        vocab_size=12, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_size=32,
        max_length=12,
    )
    objective, optimizer = pg.objectives.grpo(), optax.adam(1e-2)
    half = jax.devices()[:2], jax.devices()[2:]
    sampling_mesh, learning_mesh = (
        parallel.make_mesh(spec, devices=own) for spec, own in zip(("data=2", "fsdp=2"), half)
    )
    decoder, params = pg.models.init(config, jax.random.key(0))
    samplers, learners = (pg.models.FunctionalDecoder(config, m) for m in (sampling_mesh, learning_mesh))

    def reward(samples, batch, key):
        return jnp.mean(samples.tokens * samples.mask, axis=1) / 12 + 0.0

    class Prompts:
        at = 0
        def __next__(self):
            rng = np.random.default_rng(self.at)
            self.at += 1
            return {"prompts": rng.integers(1, 12, (4, 3)).astype(np.int32),
                    "prompt_lengths": np.full(4, 3, np.int32)}
        def get_state(self):
            return self.at
        def set_state(self, at):
            self.at = at

    options = dict(num_samples=2, max_new_tokens=6, stop_tokens=(0,))
    axes = {"decoder": decoder.logical_axes()}
    where = parallel.shardings(axes, learning_mesh, shapes={"decoder": params})

    def fresh():
        held = parallel.shard({"decoder": jax.tree.map(jnp.copy, params)}, where)
        return train.init(held, optimizer, jax.random.key(7))

    update = train.make_update(
        train.language_model_outputs(learners), objective, optimizer,
        state_shardings=train.shardings(fresh()),
    )
    log, began = [], {n: threading.Event() for n in range(40)}

    def collect(params, key, step, batch):
        began[step].set()
        log.append(["sample", step])
        return train.make_collect(samplers, reward, **options)(params, key, step, batch)

    def waiting(state, rollout, *rest):
        at = int(state.step)
        # The next rollout has begun on the other devices, or this would wait for ever.
        assert began[at + 1].wait(60)
        log.append(["learn", at])
        return update(state, rollout, *rest)

    def split(staleness, learn=waiting, sample=collect):
        return train.SplitStep(
            sample, learn, staleness=staleness,
            rollout_shardings=parallel.replicated(sampling_mesh),
            place_prompts=lambda b: jax.device_put(b, parallel.batch_sharding(sampling_mesh)),
            place_rollout=lambda r: jax.device_put(r, parallel.batch_sharding(learning_mesh)),
        )

    def data(tree):
        return [np.asarray(x) for x in jax.tree.leaves(parallel.fetch(tree))]

    def in_turn(staleness, steps):
        "The same, one thing after the other, with every version of the parameters kept."
        state, prompts, versions, ages = fresh(), Prompts(), [], []
        for at in range(steps):
            versions.append(jax.device_put(state.params, parallel.replicated(sampling_mesh), may_alias=False))
            batch = jax.device_put(next(prompts), parallel.batch_sharding(sampling_mesh))
            key = jax.random.key(7)
            rollout, _ = train.make_collect(samplers, reward, **options)(
                versions[max(at - staleness, 0)], key, at, batch
            )
            ages = jnp.full(8, min(staleness, at), jnp.int32)
            rollout = rollout.replace(extras={"staleness": ages})
            state, metrics = update(state, jax.device_put(rollout, parallel.batch_sharding(learning_mesh)))
        return state, metrics

    out = {}
    for staleness in (1, 2):
        log.clear(); [e.clear() for e in began.values()]
        with split(staleness) as step:
            state, batches = step.init(fresh()), train.Lookahead(Prompts(), staleness)
            seen = []
            for at in range(6):
                state, metrics = step(state, next(batches))
                seen.append([metrics["staleness"], batches.get_state(), float(metrics["ratio_max"])])
        wanted, _ = in_turn(staleness, 6)
        out[staleness] = {
            "same": all(a.tobytes() == b.tobytes() for a, b in zip(data(state.params), data(wanted.params))),
            "moved": float(np.abs(data(state.params)[0] - np.asarray(params["embedding"])).max()),
            "seen": seen, "log": list(log),
        }

    # A run stopped after three steps and gone on with by other objects ends the same.
    def through_fit(steps, name):
        class Writer:
            def write(self, *a, **k):
                pass
        with split(2, update, train.make_collect(samplers, reward, **options)) as step, \\
             train.checkpoints.open(f"{directory}/{name}") as saved:
            state, batches = step.init(fresh()), train.Lookahead(Prompts(), 2)
            if saved.latest_step() is not None:
                state, metadata = saved.restore(like=state)
                batches.set_state(metadata["batches"])
            return train.fit(step, state, batches, num_steps=steps, phase="rl", checkpoints=saved)
    whole = through_fit(6, "whole")
    through_fit(3, "parts")
    parts = through_fit(6, "parts")
    out["resumed"] = all(a.tobytes() == b.tobytes() for a, b in zip(data(whole.params), data(parts.params)))

    # Another state than the one that follows: what was in flight is not used.
    with split(1, update, train.make_collect(samplers, reward, **options)) as step:
        state, batches = step.init(fresh()), train.Lookahead(Prompts(), 1)
        for _ in range(3):
            state, _ = step(state, next(batches))
        state, batches = step.init(fresh()), train.Lookahead(Prompts(), 1)
        for _ in range(6):
            state, _ = step(state, next(batches))
    wanted, _ = in_turn(1, 6)
    out["again"] = all(a.tobytes() == b.tobytes() for a, b in zip(data(state.params), data(wanted.params)))

    def broken(params, key, step, batch):
        raise RuntimeError("no samples")
    with split(1, update, broken) as step:
        try:
            step(step.init(fresh()), next(train.Lookahead(Prompts(), 1)))
        except RuntimeError as error:
            out["error"] = str(error)
    print(json.dumps(out))
"""  # noqa: E501


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return devices.run(FOUR_DEVICES, tmp_path_factory.mktemp("split"), devices=4)


@pytest.mark.parametrize("staleness", [1, 2])
def test_what_is_done_at_once_is_what_would_be_done_in_turn(four, staleness):
    found = four[str(staleness)]
    assert found["same"] and found["moved"] > 1e-3
    ages, positions, ratios = zip(*found["seen"], strict=True)
    assert ages == tuple(min(staleness, n) for n in range(6))
    assert positions == (1, 2, 3, 4, 5, 6)
    # On policy at first; afterwards not.
    assert abs(ratios[0] - 1) < 1e-4 < abs(ratios[3] - 1)
    order = found["log"]
    for at in range(6):
        assert order.index(["sample", at + 1]) < order.index(["learn", at])
    sampled = [at for what, at in order if what == "sample"]
    assert sampled == sorted(set(sampled)) and max(sampled) <= 5 + staleness


def test_resuming_repeats_what_was_in_flight(four):
    assert four["resumed"] and four["again"]


def test_an_error_while_sampling_reaches_the_caller(four):
    assert four["error"] == "no samples"


class Counting:
    at = 0

    def __next__(self):
        self.at += 1
        return self.at

    def get_state(self):
        return self.at

    def set_state(self, at):
        self.at = at


def test_lookahead_has_the_position_of_its_first_batch():
    batches = train.Lookahead(Counting(), 2)
    assert batches.get_state() == 0
    assert [next(batches) for _ in range(3)] == [(1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert batches.get_state() == 3
    other = train.Lookahead(Counting(), 2)
    other.set_state(batches.get_state())
    assert next(other) == next(batches) == (4, 5, 6)
    assert next(train.Lookahead(Counting(), 0)) == (1,)
    with pytest.raises(ValueError, match="ahead: expected at least 0"):
        train.Lookahead(Counting(), -1)


def test_bad_splits():
    def make(**changes):
        options = {
            "staleness": 1, "rollout_shardings": None, "place_prompts": None, "place_rollout": None,
        }  # fmt: skip
        return train.SplitStep(None, None, **{**options, **changes})

    with pytest.raises(ValueError, match="staleness: expected at least 1, got 0"):
        make(staleness=0)
    with pytest.raises(ValueError, match="rollout_frozen: expected frozen parameters"):
        make(frozen={"w": np.ones(1)})
    step = make()
    with pytest.raises(ValueError, match="batches: expected 2"):
        step(None, (1,))
    step.close()
