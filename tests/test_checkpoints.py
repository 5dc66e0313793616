"""Checkpoints: exact round trips, and what is left after kills, damage and wrong use."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from typing import NamedTuple

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax.train import checkpoints


@pytest.fixture(autouse=True)
def quiet():
    """Any warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Pair(NamedTuple):
    first: object
    second: object


class Twins:
    """A node whose two children go by the same name."""

    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda t: ([(jax.tree_util.DictKey("x"), c) for c in t.children], None),
    lambda _, children: Twins(*children),
)


def state_of(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"w": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)},
        "model.layers/0%": jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16),
        "list": [jnp.arange(4) + seed, Pair(jnp.float32(np.nan), jnp.zeros((0, 3)))],
        "héllo [x] 'y'": jnp.asarray([-0.0, np.inf, 1e-45], jnp.float32),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(1e-3 + seed)
    )
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), (2, 3)),
        "raw": jax.random.PRNGKey(seed),
        "step": jnp.int32(seed),
        "numpy": rng.normal(size=(2, 2)),
        "scalar": np.int64(2**40 + seed),
        "python": (seed, 0.1 + seed, bool(seed % 2), None),
        "mask": jnp.asarray([True, False]),
    }


def raw(leaf):
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_identical(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if isinstance(b, jax.Array):
            assert isinstance(a, jax.Array) and a.dtype == b.dtype
        else:
            assert type(a) is type(b)
        a, b = raw(a), raw(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def small(value):
    return {"w": jnp.full((64, 8), value, jnp.float32), "step": jnp.int32(value)}


def save_all(directory, steps=(1, 2, 3), **options):
    with checkpoints.open(directory, **{"keep_last": 9, **options}) as saved:
        for step in steps:
            saved.save(step, small(step), {"step": step}, {"reward": float(step)})


def test_round_trip(tmp_path):
    state = state_of(3)
    metadata = {
        "config": {"lr": 1e-3, "name": "é", "none": None},
        "iterator": [1, [2]],
        "big": 2**60,
    }
    with checkpoints.open(tmp_path / "new" / "run") as saved:
        assert saved.latest_step() is None and saved.steps() == []
        saved.save(5, state, metadata, {"reward": jnp.float32(1.5)})
        restored, found = saved.restore(like=state_of(0))
        assert_identical(restored, state)
        assert found == metadata
        # Further use of a restored key gives the same numbers.
        np.testing.assert_array_equal(
            jax.random.normal(restored["key"], (4,)), jax.random.normal(state["key"], (4,))
        )
    with checkpoints.open_readonly(tmp_path / "new" / "run") as reader:
        assert reader.latest_step() == 5
        restored, found = reader.restore(5, like=state_of(0))
        assert_identical(restored, state)
        assert found == metadata


def test_abstract_like(tmp_path):
    state = {k: v for k, v in state_of(3).items() if k in ("params", "opt_state", "key", "keys")}
    abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: x, state))
    with checkpoints.open(tmp_path) as saved:
        saved.save(0, state)
        restored, metadata = saved.restore(like=abstract)
    assert_identical(restored, state)
    assert metadata == {}


def test_a_single_array_and_metadata_kinds(tmp_path):
    with checkpoints.open(tmp_path) as saved:
        saved.save(0, jnp.arange(3), {"t": (1, 2), "n": np.float32(0.5), "a": jnp.int32(3)})
        restored, metadata = saved.restore(like=jnp.zeros(3, int))
    np.testing.assert_array_equal(restored, [0, 1, 2])
    assert metadata == {"t": [1, 2], "n": 0.5, "a": 3}


def test_retention_and_best(tmp_path):
    rewards = {1: 0.1, 2: 0.9, 3: float("nan"), 4: None, 5: 0.9, 6: 0.5, 7: 0.4}
    with checkpoints.open(tmp_path, keep_last=2, keep_best=1, best_metric="reward") as saved:
        assert saved.best_step() is None
        for step, reward in rewards.items():
            saved.save(step, small(step), {}, {} if reward is None else {"reward": reward})
        saved.wait()
        assert saved.steps() == [2, 6, 7]
        assert (saved.latest_step(), saved.best_step()) == (7, 2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "6", "7"]
    with checkpoints.open(tmp_path, keep_best=2, best_metric="reward") as saved:
        assert saved.best_step() == 2
        saved.save(8, small(8), {}, {"reward": 0.3})
        saved.wait()
        assert saved.steps() == [2, 6, 7, 8]
        assert saved.restore(saved.best_step(), like=small(0))[0]["step"] == 2
    with checkpoints.open_readonly(tmp_path, best_metric="reward", lowest_is_best=True) as reader:
        assert reader.best_step() == 8
    with (
        checkpoints.open_readonly(tmp_path) as reader,
        pytest.raises(ValueError, match="best_metric"),
    ):
        reader.best_step()


def test_donated_and_mutated_state_is_saved_as_it_was(tmp_path):
    @jax.jit
    def grow(state):
        return jax.tree.map(lambda x: x + 1, state)

    grow = jax.jit(grow, donate_argnums=0)
    state = {f"w{i}": jnp.zeros((400, 500)) for i in range(4)}
    host = np.zeros(1000)
    with checkpoints.open(tmp_path, keep_last=9) as saved:
        for step in range(6):
            metadata = {"list": [step]}
            saved.save(step, {"device": state, "host": host}, metadata)
            metadata["list"][0] = -1
            host += 1
            for _ in range(3):
                state = grow(state)
            jax.block_until_ready(state)
        for step in range(6):
            restored, metadata = saved.restore(step, like={"device": state, "host": host})
            assert metadata == {"list": [step]}
            assert (restored["host"] == step).all()
            for leaf in restored["device"].values():
                assert (np.asarray(leaf) == 3 * step).all()
        gone = jnp.zeros(3)
        gone.delete()
        with pytest.raises(ValueError, match=r"\['x'\] was donated"):
            saved.save(7, {"x": gone})


def test_restored_state_can_be_donated(tmp_path):
    save_all(tmp_path, [1])
    with checkpoints.open_readonly(tmp_path) as reader:
        first, _ = reader.restore(like=small(0))
        second, _ = reader.restore(like=small(0))
    for _ in range(3):
        first = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)(first)
    assert (np.asarray(first["w"]) == 8).all() and (np.asarray(second["w"]) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"w": jnp.zeros((8, 64))},
            r"\['w'\] is float32\[64,8\] in .*float32\[8,64\]",
        ),
        (lambda s: s | {"w": s["w"].astype(jnp.bfloat16)}, r"\['w'\] is float32.*bfloat16"),
        (lambda s: s | {"extra": jnp.zeros(2)}, r"\['extra'\] is not in the checkpoint"),
        (lambda s: {"w": s["w"]}, r"the checkpoint's \['step'\] \(int32\[\]\) is not in like"),
        (lambda s: {"a": s}, r"\['a'\]\['step'\] is not in the checkpoint"),
        (lambda s: s | {"step": jax.random.key(0)}, r"\['step'\] is int32\[\].*key<fry>\[\]"),
        (lambda s: s | {"step": "x"}, r"like: \['step'\] is a str"),
        (lambda s: {}, "like: expected at least one array"),
    ],
)
def test_another_structure_is_named(tmp_path, change, message):
    save_all(tmp_path, [1])
    with (
        checkpoints.open_readonly(tmp_path) as reader,
        pytest.raises(ValueError, match=message),
    ):
        reader.restore(like=change(small(1)))


def test_another_key_implementation_is_named(tmp_path):
    with checkpoints.open(tmp_path) as saved:
        saved.save(0, {"k": jax.random.key(0)})
        with pytest.raises(ValueError, match=r"\['k'\] is key<fry>\[\].* key<rbg>\[\] in like"):
            saved.restore(like={"k": jax.random.key(0, impl="rbg")})


def test_wrong_use(tmp_path):
    with checkpoints.open(tmp_path, keep_last=9) as saved:
        for step in (-1, True, 1.0, "1"):
            with pytest.raises(ValueError, match="step: expected an integer"):
                saved.save(step, small(0))
        saved.save(np.int64(4), small(4))
        for step in (3, 4):
            with pytest.raises(ValueError, match=f"step: {step} is not after the newest .* 4"):
                saved.save(step, small(0))
        with pytest.raises(ValueError, match=r"state: \['a'\] is a str"):
            saved.save(5, {"a": "text"})
        with pytest.raises(ValueError, match=r"state: \['a'\] has dtype"):
            saved.save(5, {"a": np.array(["text"])})
        with pytest.raises(ValueError, match="have the same name"):
            saved.save(5, Twins(jnp.zeros(2), jnp.zeros(2)))
        with pytest.raises(ValueError, match="state: expected at least one array"):
            saved.save(5, {})
        with pytest.raises(ValueError, match=r"metadata\['a'\]\[1\]: a bytes"):
            saved.save(5, small(5), {"a": [1, b"2"]})
        with pytest.raises(ValueError, match="key 3 is not a string"):
            saved.save(5, small(5), {3: 1})
        with pytest.raises(ValueError, match=r"metrics\['m'\]: expected a number"):
            saved.save(5, small(5), {}, {"m": "high"})
        with pytest.raises(ValueError, match="is traced"):
            jax.jit(lambda x: saved.save(5, {"x": x}))(jnp.zeros(2))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 .*there are \[4\]"):
            saved.restore(9, like=small(0))
        assert saved.steps() == [4]
    saved.close()
    with pytest.raises(ValueError, match="are closed"):
        saved.save(5, small(5))
    with (
        checkpoints.open_readonly(tmp_path) as reader,
        pytest.raises(ValueError, match="for reading"),
    ):
        reader.save(5, small(5))
    with pytest.raises(ValueError, match="keep_last: expected at least 1, got 0"):
        checkpoints.open(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="keep_best: expected at least 0, got -1"):
        checkpoints.open(tmp_path, keep_best=-1)


def test_half_deleted_checkpoint_is_handled_without_noise(tmp_path, caplog):
    save_all(tmp_path, [1, 2])
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    (tmp_path / "1" / "info" / "info.json").unlink()
    with checkpoints.open(tmp_path, best_metric="reward", keep_last=1) as saved:
        assert saved.best_step() == 2
        assert saved.restore(like=small(0))[0]["step"] == 2
        saved.save(3, small(3))
        saved.wait()
        assert saved.steps() == [2, 3]
    assert caplog.text == ""


def test_delete_after(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4])
    with checkpoints.open(tmp_path, keep_last=9) as saved:
        saved.delete_after(2)
        assert saved.steps() == [1, 2]
        saved.save(3, small(30))
        assert saved.restore(like=small(0))[0]["step"] == 30


def test_directories_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            checkpoints.open(path)
    with pytest.raises(NotADirectoryError):
        checkpoints.open_readonly(file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoints.open_readonly(tmp_path / "absent")
    with (
        checkpoints.open(tmp_path / "empty") as saved,
        pytest.raises(FileNotFoundError, match="no checkpoint in"),
    ):
        saved.restore(like=small(0))


def test_read_only_directory(tmp_path):
    # The superuser may write anywhere but in the kernel's file systems.
    path = "/proc" if os.geteuid() == 0 else tmp_path
    if path == "/proc" and not os.path.isdir("/proc"):
        pytest.skip("superuser without /proc")
    tmp_path.chmod(0o500)
    try:
        for directory in (path, os.path.join(path, "run")):
            with pytest.raises(OSError, match="cannot hold checkpoints"):
                checkpoints.open(directory)
    finally:
        tmp_path.chmod(0o700)


def files_of(directory):
    return sorted(
        p for p in pathlib.Path(directory).rglob("*") if p.is_file() and p.parent != directory
    )


def damage(path, kind):
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("kind", ["deleted", "emptied", "truncated", "one bit"])
def test_any_damaged_file_falls_back_to_the_newest_good(tmp_path, kind):
    save_all(tmp_path)
    names = [p.relative_to(tmp_path / "3") for p in files_of(tmp_path / "3")]
    assert len(names) > 5
    intact = {name: (tmp_path / "3" / name).read_bytes() for name in names}
    for name in names:
        damage(tmp_path / "3" / name, kind)
        with checkpoints.open_readonly(tmp_path) as reader:
            with pytest.warns(checkpoints.CheckpointWarning) as caught:
                restored, metadata = reader.restore(like=small(0))
            assert len(caught) == 1
            assert f"checkpoint 3 in {tmp_path} is damaged" in str(caught[0].message)
            assert f"file {name} " in str(caught[0].message)
            assert metadata == {"step": 2} and (np.asarray(restored["w"]) == 2).all()
            assert reader.steps() == [1, 2]
        (tmp_path / "3" / name).write_bytes(intact[name])


def test_damaged_checkpoint_is_set_aside_by_the_next_save(tmp_path):
    save_all(tmp_path)
    damage(tmp_path / "3" / "info" / "info.json", "truncated")
    with checkpoints.open(tmp_path, best_metric="reward") as saved:
        assert saved.best_step() == 2  # the damaged one has no readable metric
        with pytest.raises(
            checkpoints.CheckpointError, match=r"checkpoint 3 .* is damaged: file info"
        ):
            saved.restore(3, like=small(0))
        with pytest.warns(checkpoints.CheckpointWarning, match="passed over"):
            saved.restore(like=small(0))
        saved.save(3, small(33))
        restored, _ = saved.restore(like=small(0))
        assert restored["step"] == 33
        assert saved.steps() == [2, 3]
    assert (tmp_path / "unreadable-3" / "info").is_dir()


def test_all_damaged(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in "12":
        damage(tmp_path / step / "state" / "manifest.ocdbt", "deleted")
    with checkpoints.open_readonly(tmp_path) as reader:
        for _ in range(2):
            with (
                warnings.catch_warnings(),
                pytest.raises(checkpoints.CheckpointError, match=r"step 1: file .*; step 2: file "),
            ):
                warnings.simplefilter("ignore", checkpoints.CheckpointWarning)
                reader.restore(like=small(0))


def test_without_the_list_of_files(tmp_path):
    """A checkpoint whose list is lost is read, as far as Orbax itself finds nothing wrong."""
    save_all(tmp_path, [1])
    (tmp_path / "1" / "files.json").unlink()
    with checkpoints.open_readonly(tmp_path) as reader:
        assert reader.restore(like=small(0))[0]["step"] == 1
    (tmp_path / "1" / "files.json").write_text("{")
    with (
        checkpoints.open_readonly(tmp_path) as reader,
        pytest.raises(checkpoints.CheckpointError, match=r"files.json is unreadable"),
    ):
        reader.restore(1, like=small(0))


def test_failed_save_is_told_and_the_next_works(tmp_path):
    with checkpoints.open(tmp_path) as saved:
        saved.save(1, small(1))
        saved.wait()
        before_commit = checkpoints.files.list_files

        def full(directory):
            raise OSError(28, "No space left on device")

        checkpoints.files.list_files = full
        try:
            with pytest.raises(checkpoints.CheckpointError, match=r"step 2 .*No space left"):
                saved.save(2, small(2))  # tells already where it waits
                saved.wait()
        finally:
            checkpoints.files.list_files = before_commit
        assert saved.steps() == [1]
        saved.save(2, small(22))
        assert saved.restore(like=small(0))[0]["step"] == 22


def test_state_is_readable_with_orbax_alone(tmp_path):
    import orbax.checkpoint as ocp

    save_all(tmp_path, [1])
    with ocp.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no target was given
        tree = checkpointer.restore(tmp_path / "1" / "state")
    assert set(tree) == {"w", "step"} and (np.asarray(tree["w"]) == 1).all()


SAVE_FOR_EVER = textwrap.dedent(
    """
    import sys, warnings
    warnings.simplefilter("error")
    import jax.numpy as jnp
    from pgjax.train import checkpoints
    warnings.simplefilter("default", checkpoints.CheckpointWarning)

    def state(step):
        return {f"w{i}": jnp.full((200, 500), step + i, jnp.float32) for i in range(6)}

    saved = checkpoints.open(sys.argv[1], keep_last=2)
    step, start = 0, saved.latest_step()
    if start is not None:
        restored, metadata = saved.restore(like=state(0))
        step = metadata["step"]
        assert all((restored[f"w{i}"] == step + i).all() for i in range(6)), "not as saved"
        assert step == start, "fell back"
    print("ready", step, flush=True)
    sys.stdin.readline()  # until someone has looked at what is there
    while True:
        step += 1
        saved.save(step, state(step), {"step": step})
        print(step, flush=True)
    """
)


def test_sigkill_in_the_middle_of_saves(tmp_path):
    rng = random.Random(0)
    leftovers, reached = 0, 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)],
            env=devices.environment(1),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            line = process.stdout.readline().split()
            assert line[:1] == ["ready"], process.stderr.read()
            # What was complete before the kill is there after it.
            assert int(line[1]) >= reached - 2
            if leftovers_before := leftovers_now(tmp_path):
                raise AssertionError(f"not cleaned up: {leftovers_before}")
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.4))
        finally:
            process.send_signal(signal.SIGKILL)
            out, err = process.communicate(timeout=30)
        numbers = [int(n) for n in out.split() if n.isdigit()]
        reached = max([reached, *numbers])
        now = leftovers_now(tmp_path)
        leftovers += bool(now)
        if "unfinished" in err:
            assert "CheckpointWarning: deleted" in err
        # Some checkpoint is complete and exact; a partial one is never among the steps.
        with checkpoints.open_readonly(tmp_path) as reader:
            like = {f"w{i}": np.zeros((200, 500), np.float32) for i in range(6)}
            restored, metadata = reader.restore(like=like)
            step = metadata["step"]
            # Saves wait for the one before: when n was printed, n - 1 was complete.
            assert step >= reached - 1
            for i in range(6):
                assert (restored[f"w{i}"] == step + i).all()
    print("kills in the middle of a save:", leftovers)
    assert leftovers, "no kill hit a save: this test tested nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints.open(tmp_path).close()
    assert bool(now) == any("unfinished checkpoint" in str(w.message) for w in caught)
    assert not leftovers_now(tmp_path)


def leftovers_now(directory):
    return [p.name for p in pathlib.Path(directory).iterdir() if "tmp" in p.name]


def test_leaving_without_close_ends_with_complete_checkpoints(tmp_path):
    """A process that forgets to close ends, and its last save is complete."""
    code = SAVE_FOR_EVER.replace("while True:", "for _ in range(3):")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=devices.environment(1),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == "3", done.stderr
    assert done.stderr == ""
    with checkpoints.open_readonly(tmp_path) as reader:
        assert reader.steps() == [2, 3]


OTHER_MESH = textwrap.dedent(
    """
    import json, sys, warnings
    warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np, optax
    from pgjax import parallel
    from pgjax.train import checkpoints

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32), "b": jnp.zeros(24)}
    optimizer = optax.adam(1e-2)
    axes = {"w": ("embed", "mlp"), "b": ("mlp",)}

    def place(mesh):
        q = parallel.shard(params, parallel.shardings(axes, mesh, shapes=params))
        opt_state = parallel.shard_like(optimizer.init(q), q)
        key = jax.device_put(jax.random.key(7), parallel.replicated(mesh))
        # A step count that is not committed to any device goes with whatever it meets.
        return {"params": q, "opt_state": opt_state, "key": key, "step": jnp.int32(3)}

    @jax.jit
    def update(state):
        grads = jax.tree.map(jnp.sin, state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"])
        params = optax.apply_updates(state["params"], updates)
        noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), ())
        return state | {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, noise

    first, second = parallel.make_mesh("data=2,fsdp=4"), parallel.make_mesh("fsdp=2,tensor=4")
    state = place(first)
    saved_state, _ = update(state)
    saved_state["step"] = jnp.int32(4)
    with checkpoints.open(sys.argv[1]) as saved:
        saved.save(4, saved_state)
        like = place(second)
        restored, _ = saved.restore(like=like)
        one = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), like)
        single, _ = saved.restore(like=one)

    def data(x):
        return np.asarray(jax.random.key_data(x)
                          if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    def same(a, b):
        return all(data(x).tobytes() == data(y).tobytes()
                   for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    placed = all(x.sharding == y.sharding
                 for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True))
    after, noise = update(restored)  # fails where the placement of the leaves is inconsistent
    wanted, wanted_noise = update(saved_state)
    print(json.dumps({
        "same": same(restored, saved_state) and same(single, saved_state),
        "placed": placed,
        "shard": list(restored["params"]["w"].addressable_shards[0].data.shape),
        "noise": bool(noise == wanted_noise),
        "error": float(jnp.max(jnp.abs(jax.device_get(after["params"]["w"])
                                       - jax.device_get(wanted["params"]["w"])))),
    }))
    """
)


def test_restores_into_another_mesh(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MESH, str(tmp_path)],
        env=devices.environment(8),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["same"] and out["placed"] and out["noise"]
    assert out["shard"] == [8, 6]
    assert out["error"] < 1e-6
    assert done.stderr == ""


TWO_PROCESSES = textwrap.dedent(
    """
    import os, sys, warnings
    import jax
    rank, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    import numpy as np, optax
    from jax.experimental import multihost_utils
    from pgjax import parallel
    from pgjax.train import checkpoints

    mesh = parallel.make_mesh("data=2,fsdp=2")
    host = {"w": np.arange(32.0, dtype=np.float32).reshape(8, 4), "b": np.ones(4, np.float32)}
    where = parallel.shardings({"w": ("embed", "mlp"), "b": ("mlp",)}, mesh, shapes=host)
    optimizer = optax.adam(0.1)
    abstract = jax.eval_shape(optimizer.init, host)
    params = parallel.shard(host, where)
    state = {
        "params": params,
        "opt_state": jax.jit(
            optimizer.init, out_shardings=parallel.shardings_like(abstract, host, where)
        )(params),
        "key": parallel.shard(jax.random.key(3), parallel.replicated(mesh)),
        "step": parallel.shard(np.int32(5), parallel.replicated(mesh)),
        "host": np.arange(3),
    }

    def local(x):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return [np.asarray(s.data) for s in x.addressable_shards] if hasattr(x, "sharding") else x

    with checkpoints.open(directory) as saved:
        for i in range(3):
            saved.save(i, state, {"i": i})
        restored, metadata = saved.restore(like=state)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(local(a), local(b)),
                     restored, state)
        assert restored["params"]["w"].sharding == where["w"] and metadata == {"i": 2}
        if rank == 0:
            os.truncate(os.path.join(directory, "2", "info", "info.json"), 5)
        multihost_utils.sync_global_devices("damaged")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, metadata = saved.restore(like=state)
        assert metadata == {"i": 1} and "info.json has 5 bytes" in str(caught[-1].message)
        saved.save(2, state, {"i": 22})
        assert saved.restore(like=state)[1] == {"i": 22}
        assert saved.steps() == [1, 2]
    print("done")
    """
)


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), port, str(tmp_path / "run")],
            env=devices.environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and out.split()[-1:] == ["done"], err
    finally:
        for process in processes:
            process.kill()
