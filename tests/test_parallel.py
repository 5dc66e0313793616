"""Meshes and shardings. Those of many devices run in a process with eight virtual ones."""

import os

import devices
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.shared import runs
from pgjax import parallel


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,fsdp=4", {"data": 2, "fsdp": 4}),
        (" tensor = 2 , data=-1", {"tensor": 2, "data": -1}),
        ("expert=1", {"expert": 1}),
        ("", {}),
    ],
)
def test_parse(text, sizes):
    assert parallel.parse_mesh(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "unknown axis 'model'.*data, fsdp, tensor, expert"),
        ("data=2,data=4", "data appears twice"),
        ("data=0", "data has size 0"),
        ("data=-2", "data has size -2"),
        ("data=two", "size 'two'"),
        ("data=", "size ''"),
        ("data", "axis=size"),
        ("data=2,", "axis=size"),
        ("data=-1,fsdp=-1", "only one axis may be -1, got data and fsdp"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parallel.parse_mesh(text)


def test_mesh_of_one_device():
    device = jax.devices()[:1]
    for spec in (None, "", "data=1", {"tensor": -1}, "fsdp=-1,tensor=1"):
        mesh = parallel.make_mesh(spec, devices=device)
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, "sequence": 1}
    with pytest.raises(ValueError, match=r"needs 6 devices, but there are 1$"):
        parallel.make_mesh("data=2,fsdp=3", devices=device)
    with pytest.raises(ValueError, match="multiple of 2 devices, but there are 1"):
        parallel.make_mesh("data=2,fsdp=-1", devices=device)
    with pytest.raises(ValueError, match="unknown axis 'x'"):
        parallel.make_mesh({"x": 1}, devices=device)
    with pytest.raises(ValueError, match="expected an integer"):
        parallel.make_mesh({"data": True}, devices=device)


def test_spec_for():
    assert parallel.spec_for(("layers", "embed", "heads", "head_dim")) == P(
        None, "fsdp", "tensor", None
    )
    assert parallel.spec_for(("batch", None)) == P(("data", "fsdp", "expert"), None)
    assert parallel.spec_for(()) == P()
    # One mesh axis once in a leaf: the first dimension that asks gets it.
    assert parallel.spec_for(("embed", "embed")) == P("fsdp", None)
    assert parallel.spec_for(("embed", "batch")) == P("fsdp", ("data", "expert"))
    assert parallel.spec_for(("a",), {"a": "tensor"}) == P("tensor")
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        parallel.spec_for(("embed", "width"))


def test_shardings_errors_name_the_leaf():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    axes = {"layer": {"w": ("embed", "width")}}
    with pytest.raises(ValueError, match=r"\['layer'\]\['w'\]: unknown logical axis 'width'"):
        parallel.shardings(axes, mesh)
    with pytest.raises(ValueError, match=r"\['w'\]: 1 logical axes .* shape \(2, 3\)"):
        parallel.shardings({"w": ("embed",)}, mesh, shapes={"w": (2, 3)})
    with pytest.raises(ValueError, match=r"differing: \['b'\], \['w'\]"):
        parallel.shardings({"w": ("embed",)}, mesh, shapes={"b": (2,)})
    with pytest.raises(ValueError, match=r"\['w'\]: .* maps to mesh axis 'model'"):
        parallel.shardings({"w": ("embed",)}, mesh, rules={"embed": "model"})
    with pytest.raises(ValueError, match=r"\['w'\]: expected a tuple"):
        parallel.shardings({"w": "embed"}, mesh)


def test_shardings_like_errors():
    with pytest.raises(ValueError, match=r"\['w'\] has no sharding"):
        parallel.shardings_like({"w": np.zeros(2)}, {"w": np.zeros(2)})
    with pytest.raises(ValueError, match="at least one array"):
        parallel.shardings_like({"w": np.zeros(2)}, {})
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="shardings: expected one for each leaf"):
        parallel.shardings_like({}, {"w": np.zeros(2)}, {"v": parallel.replicated(mesh)})


EIGHT_DEVICES = """
    import json, warnings
    warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import PartitionSpec as P
    from pgjax import parallel as par

    out = {}
    assert jax.device_count() == 8
    mesh = par.make_mesh("data=2,fsdp=4")
    out["shape"] = dict(mesh.shape)
    out["default"] = dict(par.make_mesh().shape)
    out["empty"] = dict(par.make_mesh("").shape)
    out["rest"] = dict(par.make_mesh("tensor=2,fsdp=-1").shape)
    out["auto"] = [str(t) for t in getattr(mesh, "axis_types", ())]
    out["subset"] = dict(par.make_mesh("data=2", devices=jax.devices()[:2]).shape)
    def message(f):
        try:
            f()
        except ValueError as error:
            return str(error)
    out["few"] = message(lambda: par.make_mesh("data=2"))
    out["odd"] = message(lambda: par.make_mesh("data=3,fsdp=-1"))

    # The dropped axes: 6 is not divisible by fsdp=4, for that leaf only; batch falls back to data.
    axes = {"a": ("embed", "mlp"), "b": ("embed",), "c": ("batch",), "d": None, "e": ()}
    shapes = {"a": jax.ShapeDtypeStruct((6, 4), jnp.float32), "b": (8,), "c": (6,),
              "d": (3, 3), "e": ()}
    got = par.shardings(axes, mesh, shapes=shapes)
    out["specs"] = {k: str(tuple(v.spec)) for k, v in got.items()}

    # A training step of a linear model, on one device and on eight.
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 8)), "b": np.zeros(8)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    # A preconditioner-like factored state has the path of a parameter, but not its shape.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.ema(0.9))

    def step(params, opt_state, batch):
        if jnp.ndim(batch["x"]) and USE_MESH:
            batch = par.constrain_batch(batch, mesh)
        def loss_fn(p):
            return jnp.mean((batch["x"] @ p["w"] + p["b"] - batch["y"]) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    USE_MESH = False
    p, s, losses = params, optimizer.init(params), []
    one = jax.jit(step)
    for _ in range(5):
        p, s, loss = one(p, s, {"x": x, "y": y})
        losses.append(float(loss))

    USE_MESH = True
    logical = {"w": ("embed", "mlp"), "b": ("mlp",)}
    where = par.shardings(logical, mesh, shapes=params)
    q = par.shard(params, where)
    t = par.shard_like(optimizer.init(params), q)
    adam = t[1][0]
    out["mu"] = adam.mu["w"].sharding == q["w"].sharding
    out["spec"] = adam.mu["w"].sharding.spec == P("fsdp", "tensor")
    out["nu"] = adam.nu["b"].sharding == q["b"].sharding
    out["ema"] = t[2].ema["w"].sharding == q["w"].sharding
    out["count"] = adam.count.sharding == par.replicated(mesh)
    out["shard"] = list(adam.mu["w"].addressable_shards[0].data.shape)
    batch = par.shard({"x": x, "y": y}, par.batch_sharding(mesh))
    out["batch"] = list(batch["x"].addressable_shards[0].data.shape)
    many = jax.jit(step)
    sharded_losses = []
    for _ in range(5):
        q, t, loss = many(q, t, batch)
        sharded_losses.append(float(loss))
    out["losses"] = [losses, sharded_losses]
    out["error"] = float(max(jnp.max(jnp.abs(a - np.asarray(b)))
                             for a, b in zip(jax.tree.leaves((p, s)), jax.tree.leaves((q, t)))))
    out["stays"] = q["w"].sharding.is_equivalent_to(where["w"], 2)
    hlo = many.lower(q, t, batch).compile().as_text()
    out["collectives"] = "all-reduce" in hlo or "reduce-scatter" in hlo

    # Same path, other shape: replicated. Dict key 'mu' of the params is not Adam's field mu.
    like = par.shardings_like({"stats": {"w": jnp.zeros(16)}}, q)
    out["factored"] = like["stats"]["w"].is_fully_replicated
    tricky = {"mu": {"w": jnp.zeros((8, 8))}, "w": jnp.zeros((8, 8))}
    tricky_where = par.shardings({"mu": {"w": ("embed", None)}, "w": (None, "embed")}, mesh)
    state = jax.eval_shape(optax.adam(1.0).init, tricky)
    like = par.shardings_like(state, tricky, tricky_where)[0]
    out["tricky"] = [str(tuple(like.mu["w"].spec)), str(tuple(like.mu["mu"]["w"].spec))]

    out["uneven"] = message(
        lambda: jax.jit(lambda b: par.constrain_batch(b, mesh))({"x": jnp.zeros((12, 2))}))
    time_major = jax.jit(lambda b: par.constrain_batch(b, mesh, axis=1))(
        {"r": jnp.arange(24.0).reshape(3, 8), "n": jnp.zeros(3)})
    out["time_major"] = [list(time_major["r"].addressable_shards[0].data.shape),
                         time_major["n"].sharding.is_fully_replicated,
                         float(time_major["r"].sum())]
    print(json.dumps(out))
    """


@pytest.fixture(scope="module")
def eight():
    return devices.run(EIGHT_DEVICES)


def test_mesh_shapes(eight):
    one = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, "sequence": 1}
    assert eight["shape"] == {**one, "data": 2, "fsdp": 4}
    assert eight["default"] == eight["empty"] == {**one, "data": 8}
    assert eight["rest"] == {**one, "tensor": 2, "fsdp": 4}
    assert eight["subset"] == {**one, "data": 2}
    assert all("Auto" in t for t in eight["auto"])
    assert "needs 2 devices, but there are 8" in eight["few"]
    assert "multiple of 3 devices, but there are 8" in eight["odd"]


def test_axes_that_do_not_divide_are_dropped_for_that_leaf_only(eight):
    assert eight["specs"] == {
        "a": "(None, 'tensor')",
        "b": "('fsdp',)",
        "c": "(('data', 'expert'),)",
        "d": "()",
        "e": "()",
    }


def test_sharded_step_equals_single_device(eight):
    single, sharded = eight["losses"]
    np.testing.assert_allclose(sharded, single, rtol=1e-6)
    assert single[-1] < single[0]
    assert eight["error"] < 1e-6
    assert eight["stays"] and eight["collectives"]
    assert eight["batch"] == [4, 16]


def test_optimizer_state_follows_the_parameters(eight):
    assert eight["mu"] and eight["spec"] and eight["nu"] and eight["ema"] and eight["count"]
    assert eight["shard"] == [4, 8]
    assert eight["factored"]
    assert eight["tricky"] == ["(None, 'fsdp')", "('fsdp', None)"]


def test_constrain_batch(eight):
    assert "['x'] of shape (12, 2) has 12 along dimension 0" in eight["uneven"]
    assert "data x fsdp x expert = 8" in eight["uneven"]
    assert eight["time_major"] == [[3, 1], True, 276.0]


@pytest.mark.parametrize(
    ("variables", "added", "threads"),
    [
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, True, "64"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=32"}, True, "256"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, True, "64"),
        (
            {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true", "JAX_NUM_CPU_DEVICES": "4"},
            False,
            "64",
        ),
        ({"JAX_NUM_CPU_DEVICES": "4", "NPROC": "100"}, True, "100"),
        ({}, False, None),
    ],
)
def test_experiments_give_virtual_devices_threads(monkeypatch, variables, added, threads):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever is set in between
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runs.spare_threads()
    flags = os.environ.get("XLA_FLAGS", "")
    assert ("--xla_cpu_multi_thread_eigen=false" in flags) == added
    assert flags.startswith(variables.get("XLA_FLAGS", ""))
    assert os.environ.get("NPROC") == threads
