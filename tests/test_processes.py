"""Several processes as one program, over loopback: what they agree on, and that nothing changes."""

import socket

import devices
import numpy as np
import pytest

from pgjax import parallel

CORE = (
    "reinforce", "rloo", "dr_grpo", "grpo", "dapo", "gspo", "cispo", "lite_ppo", "reinforce_pp",
    "ppo", "supervised",
)  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


UPDATES = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import parallel

    spec, names, count, port, index = sys.argv[1:]
    if int(count) > 1:
        parallel.connect(f"127.0.0.1:{port}", count=int(count), index=int(index))
    config = pg.models.DecoderConfig(
        vocab_size=32, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4,
        mlp_size=32, max_length=12,
        moe=pg.models.MoEConfig(
            num_experts=4, experts_per_token=2, expert_size=32, normalize_weights=True
        ) if "expert" in spec else None,
    )
    rows, length = 16, 12
    rng = np.random.default_rng(0)
    mask = (np.arange(length) >= 4) & (np.arange(length) < rng.integers(6, 13, (rows, 1)))
    rollout = pg.Rollout(
        tokens=rng.integers(0, 32, (rows, length)).astype(np.int32),
        mask=mask,
        behavior_logprobs=np.where(mask, rng.normal(-3.5, 0.1, mask.shape), 0).astype(np.float32),
        rewards=rng.integers(0, 2, rows).astype(np.float32),
        group_ids=(np.arange(rows) // 4).astype(np.int32),
        truncated=mask[:, -1],
    )
    mesh = parallel.make_mesh(spec)
    here = parallel.make_mesh("data=1", devices=jax.local_devices()[:1])
    objectives = {
        "dr_grpo": lambda: pg.objectives.dr_grpo(length=length),
        "reinforce_pp": lambda: pg.objectives.reinforce_pp(kl_coefficient=0.1),
        "grpo": lambda: pg.objectives.grpo(kl_coefficient=0.1),
    }

    def updated(objective, mesh, batch):
        decoder, params = pg.models.init(config, jax.random.key(0))
        params = {"decoder": params}
        axes = {"decoder": decoder.logical_axes()}
        if "values" in objective.needs:
            params["value_head"] = pg.models.value_head_init(config, jax.random.key(1))
            axes["value_head"] = pg.models.value_head_logical_axes()
        decoder = pg.models.FunctionalDecoder(config, mesh)
        params = parallel.shard(params, parallel.shardings(axes, mesh, shapes=params))
        reference = jax.tree.map(lambda x: 1.1 * x, params)
        optimizer = optax.adamw(1e-3, eps=1e-5)
        state = pg.train.init(params, optimizer, jax.random.key(0), objective=objective)
        update = pg.train.make_update(
            pg.train.language_model_outputs(decoder), objective, optimizer,
            group_size=4 if objective.whole_groups else None,
            state_shardings=pg.train.shardings(state),
        )
        state, metrics = update(state, batch, reference)
        return parallel.fetch((state.params, state.opt_state)), parallel.fetch(metrics)

    part, parts = parallel.process_shard(mesh)
    own = jax.tree.map(lambda x: np.split(x, parts)[part], rollout)
    out = {}
    for name in names.split(","):
        objective = objectives.get(name, getattr(pg.objectives, name))()
        alone, wanted = updated(objective, here, jax.device_put(rollout, jax.local_devices()[0]))
        got, metrics = updated(objective, mesh, parallel.place_rows(own, mesh))
        off = lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - b), initial=0))
        out[name] = {
            "error": max(map(off, jax.tree.leaves(got), jax.tree.leaves(alone))),
            "gradient": off(metrics["gradient_norm"], wanted["gradient_norm"]),
            "norm": float(wanted["gradient_norm"]),
        }
    print(json.dumps(out))
"""


SETUPS = [  # of a mesh, how many processes with how many devices each
    ("fsdp=2,tensor=2", 2, 2),
    ("sequence=2", 2, 1),
    ("data=2,fsdp=2", 4, 1),
    ("data=8", 1, 8),
    ("fsdp=8", 1, 8),
    ("tensor=2,fsdp=4", 1, 8),
    ("expert=4,data=2", 1, 8),
    ("sequence=2,fsdp=4", 1, 8),
]


def check_updates(names, spec, processes, each):
    found = devices.run_each(
        UPDATES, spec, ",".join(names), processes, free_port(), processes=processes, devices=each
    )
    assert all(f == found[0] for f in found) and set(found[0]) == set(names)
    for name, x in found[0].items():
        assert x["error"] < 1e-5 and x["gradient"] < 1e-5 * max(1, x["norm"]), (name, x)
        assert x["norm"] > 1e-3, name


@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_an_update_by_processes_equals_one_device(setup):
    check_updates(("grpo", "ppo"), *setup)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS[:1] + SETUPS[2:], ids=str)
def test_every_objective_on_a_mesh_equals_one_device(setup):
    check_updates(CORE, *setup)


AGREEING = """
    import json, sys, warnings
    import jax, jax.numpy as jnp, numpy as np
    from pgjax import parallel, sampling
    from pgjax.train import text

    port, directory, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    parallel.connect(f"127.0.0.1:{port}", count=2, index=index)
    out = {"first": parallel.is_first(), "largest": parallel.largest_of(3 * index)}
    out["gathered"] = parallel.gather_json({"mine": "é" * (1 + 5 * index)})

    def raised(function):
        try:
            function()
        except Exception as error:
            return [type(error).__name__, str(error)]

    def fail():
        assert parallel.is_first()
        raise FileExistsError("already there")

    calls = []
    out["failed"] = raised(lambda: parallel.on_first(fail))
    out["failed too"] = raised(lambda: parallel.first_then_others(fail))
    out["value"] = parallel.on_first(lambda: [calls.append(1), index, None][1:])
    out["calls"] = len(calls)
    out["same"] = raised(lambda: parallel.check_same({"a": {"b": 1}, "c": [1, 2]}))
    out["differs"] = raised(
        lambda: parallel.check_same({"a": {"b": index, "d": 1}, **({"c": 2} if index else {})})
    )
    path = f"{directory}/made"

    def made():
        with open(path, "a") as file:
            file.write(str(index))
        return open(path).read()

    out["made"] = parallel.first_then_others(made)

    for spec in ("data=4", "fsdp=2,tensor=2", "tensor=4"):
        mesh = parallel.make_mesh(spec)
        part, parts = parallel.process_shard(mesh)
        whole = np.arange(24.0).reshape(8, 3)
        batch = {"x": np.split(whole, parts)[part], "n": np.split(np.arange(8), parts)[part]}
        placed = parallel.place_rows(batch, mesh)
        assert placed["x"].shape == (8, 3)
        back, first = parallel.own_rows(placed)
        np.testing.assert_array_equal(back["x"], batch["x"])
        assert first == 8 * part // parts
        # What a compiled program left in another layout, and what lies on every host.
        moved = jax.jit(lambda x: x + 0, out_shardings=parallel.replicated(mesh))(placed["x"])
        mixed, _ = parallel.own_rows({"a": moved, "b": np.arange(8)})
        np.testing.assert_array_equal(mixed["a"], batch["x"])
        np.testing.assert_array_equal(mixed["b"], batch["n"])
        # Processes with the same rows may find different things; the first one's count.
        found = parallel.rows_of_all(batch["x"][:, 0] + 100 * index, placed["x"])
        every = parallel.fetch(found)
        out[spec] = {"part": [part, parts], "rows": every.tolist()}
        np.testing.assert_array_equal(parallel.fetch(placed)["x"], whole)

    mesh = parallel.make_mesh("data=4")
    tokens = np.arange(16, dtype=np.int32).reshape(8, 2)
    samples = parallel.place_rows(
        {
            "tokens": np.split(tokens, 2)[index],
            "mask": np.split(tokens % 2 == 0, 2)[index],
            "prompt_ids": np.split(np.repeat(np.arange(4), 2), 2)[index],
        },
        mesh,
    )
    samples = type("Some", (), samples)
    batch = parallel.place_rows({"ids": 10 * np.split(np.arange(4), 2)[index]}, mesh)
    judged = []

    def verifier(completion, example):
        judged.append(completion)
        if completion == "6":
            raise RuntimeError("no")
        return int(completion) + 1000 * example

    reward = text.host_reward(
        verifier,
        lambda ids: " ".join(map(str, ids)),
        lambda batch: [int(i) for i in batch["ids"]],
    )(samples, batch, None)
    out["rewards"] = parallel.fetch(reward).tolist()
    out["judged"] = judged
    print(json.dumps(out))
"""


def test_what_two_processes_agree_on(tmp_path):
    first, second = devices.run_each(AGREEING, free_port(), tmp_path, processes=2, devices=2)
    assert first.pop("first") and not second.pop("first")
    assert first.pop("calls") == 1 and second.pop("calls") == 0
    assert (first.pop("made"), second.pop("made")) == ("0", "01")
    judged = first.pop("judged"), second.pop("judged")
    assert judged == (["0", "2", "4", "6"], ["8", "10", "12", "14"])
    parts = [x.pop("part") for x in (first["data=4"], second["data=4"])]
    assert parts == [[0, 2], [1, 2]]
    for spec, want in (("fsdp=2,tensor=2", [[0, 2], [1, 2]]), ("tensor=4", [[0, 1], [0, 1]])):
        assert [x[spec].pop("part") for x in (first, second)] == want
    np.testing.assert_equal(first, second)  # NaN equals NaN here
    assert first["largest"] == 3 and first["value"] == [0, None] and first["same"] is None
    assert first["gathered"] == [{"mine": "é"}, {"mine": "é" * 6}]
    assert first["failed"] == first["failed too"] == ["FileExistsError", "already there"]
    kind, message = first["differs"]
    assert kind == "ValueError" and "c: '<missing>' in 0, 2 in 1" in message
    assert "a.b: 0 in 0, 1 in 1" in message and "a.d" not in message
    split = [0.0, 3.0, 6.0, 9.0, 112.0, 115.0, 118.0, 121.0]
    assert first["data=4"]["rows"] == first["fsdp=2,tensor=2"]["rows"] == split
    assert first["tensor=4"]["rows"] == [3.0 * i for i in range(8)]
    wanted = [0, 2, 10004, np.nan, 20008, 20010, 30012, 30014]
    np.testing.assert_array_equal(first["rewards"], wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2}, "need a coordinator"),
        ({"coordinator": "here", "count": 2, "index": 0}, "expected a coordinator host:port"),
        ({"coordinator": "h:x", "count": 2, "index": 0}, "expected a coordinator host:port"),
        ({"coordinator": "h:1"}, "needs count and index"),
        ({"coordinator": "h:1", "count": 2, "index": 2}, "index 2 of 2"),
    ],
)
def test_bad_addresses(options, message):
    with pytest.raises(ValueError, match=message):
        parallel.connect(**{"coordinator": None, **options})


def test_a_process_alone_needs_no_others():
    parallel.connect(None)
    assert parallel.is_first() and parallel.largest_of(7) == 7
    assert parallel.gather_json({"a": (1,)}) == [{"a": [1]}]
    assert parallel.on_first(lambda: 5) == parallel.first_then_others(lambda: 5) == 5
    parallel.check_same({"anything": 1})
    assert parallel.process_shard(parallel.make_mesh("")) == (0, 1)


STOPPING = """
    import json, os, signal, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import parallel, train

    port, directory, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    parallel.connect(f"127.0.0.1:{port}", count=2, index=index)
    mesh = parallel.make_mesh("fsdp=2")
    params = parallel.shard({"w": np.ones(4, np.float32)}, parallel.batch_sharding(mesh))
    state = train.init(params, optax.sgd(0.1), jax.random.key(0))

    class Numbers:
        at = 0
        def __next__(self):
            self.at += 1
            if index == 1 and self.at == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.at
        def get_state(self):
            return self.at
        def set_state(self, at):
            self.at = at

    @jax.jit
    def step(state, batch):
        state = state.replace(params={"w": state.params["w"] + batch}, step=state.step + 1)
        return state, {"reward": state.params["w"].sum()}

    with train.checkpoints.open(directory) as saved:
        try:
            train.fit(step, state, Numbers(), num_steps=9, phase="rl", checkpoints=saved)
            out = None
        except train.Interrupted as stop:
            out = [stop.step, stop.signal_number]
        restored, metadata = saved.restore(like=state)
    print(json.dumps([out, parallel.fetch(restored.params)["w"].tolist(), metadata["batches"]]))
"""


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    found = devices.run_each(STOPPING, free_port(), tmp_path, processes=2)
    assert found[0] == found[1] == [[3, 15], [7.0] * 4, 3]
