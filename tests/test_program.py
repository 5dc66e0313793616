"""What compiled updates send between devices; on eight virtual ones."""

import devices
import numpy as np
import pytest

from pgjax import parallel

TEXT = """
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %x = f32[64]{0} all-gather(%y), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = f32[16]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%outer (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %w = (s32[], f32[64]{0}) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %b = (bf16[2,3]{1,0}, bf16[6]{0}) all-to-all(%u, %v), replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %w = (s32[], f32[64]{0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[64]{0}) while(%t), condition=%c, body=%unknown
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  %d = f32[64]{0} all-gather-done(%s)
  ROOT %r = f32[10]{0} all-reduce(%p), to_apply=%add
}

%unknown (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  ROOT %x = pred[8]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_collectives_of_a_text():
    found = {(c.kind, c.in_loop): c for c in parallel.collectives(TEXT, 8)}
    assert len(found) == len(parallel.collectives(TEXT, 8)) == 6
    gather = found["all-gather", True]
    assert gather == ("all-gather", 15, 256, 4, True, True)
    assert gather.moved == 15 * 256 * 3 / 4
    scatter = found["reduce-scatter", True]
    assert scatter[1:4] == (15, 64, 4) and scatter.moved == 15 * 64 * 3
    swap = found["all-to-all", True]
    assert swap[1:4] == (5, 24, 8) and swap.moved == 5 * 24 * 7 / 8
    assert found["all-gather", False] == ("all-gather", 1, 256, 4, False, True)
    whole = found["all-reduce", False]
    assert whole[1:4] == (1, 40, 8) and whole.moved == 2 * 40 * 7 / 8
    passed_on = found["collective-permute", True]
    assert passed_on.nbytes == passed_on.moved == 8 and not passed_on.exact
    with pytest.raises(ValueError, match="without an entry"):
        parallel.collectives("nothing", 8)


EIGHT_DEVICES = """
    import json
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import parallel

    config = pg.models.DecoderConfig(
        vocab_size=96, hidden_size=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8,
        mlp_size=64, max_length=16, remat="full",
    )
    objective, optimizer = pg.objectives.grpo(), optax.sgd(0.1)
    rows, length = 16, 16
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= 4
    rollout = pg.Rollout(
        tokens=rng.integers(0, 96, (rows, length)).astype(np.int32),
        mask=np.broadcast_to(mask, (rows, length)),
        behavior_logprobs=np.where(mask, -4.5, 0.0) * np.ones((rows, 1), np.float32),
        rewards=rng.normal(size=rows).astype(np.float32),
        group_ids=(np.arange(rows) // 4).astype(np.int32),
    )
    rollout = jax.tree.map(jnp.asarray, rollout)

    def updated(spec, devices, given=True):
        mesh = parallel.make_mesh(spec, devices=devices)
        decoder, params = pg.models.init(config, jax.random.key(0))
        if given:
            decoder = pg.models.FunctionalDecoder(config, mesh)
        places = parallel.shardings(decoder.logical_axes(), mesh, shapes=params)
        state = pg.train.init(
            {"decoder": parallel.shard(params, places)}, optimizer, jax.random.key(0)
        )
        update = pg.train.make_update(
            pg.train.language_model_outputs(decoder), objective, optimizer,
            state_shardings=pg.train.shardings(state),
        )
        batch = jax.device_put(rollout, parallel.batch_sharding(mesh))
        compiled = update.lower(state, batch).compile()
        state, metrics = compiled(state, batch)
        return jax.tree.map(np.asarray, state.params), compiled, params

    alone, _, params = updated("data=1", jax.devices()[:1])
    out = {"errors": {}, "facts": {}}
    layer = sum(x.nbytes for x in jax.tree.leaves(params["layers"])) // config.num_layers
    for spec, given in [("fsdp=8", True), ("fsdp=8", False), ("data=8", True),
                        ("data=2,fsdp=4", True), ("tensor=2,fsdp=4", True)]:
        got, compiled, _ = updated(spec, jax.devices(), given)
        errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), alone, got)
        name = spec if given else spec + " left to the compiler"
        out["errors"][name] = max(jax.tree.leaves(errors))
        every = parallel.collectives(compiled.as_text(), 8)
        inside = [c for c in every if c.in_loop]
        facts = {}
        for c in inside:
            facts[c.kind] = facts.get(c.kind, 0) + c.times * c.nbytes
        out["facts"][name] = {
            "bytes": facts,
            "reduced": sum(c.times * c.nbytes for c in every if c.kind == "all-reduce"),
            "exact": all(c.exact for c in inside),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }
    params = pg.models.init(config, jax.random.key(0))[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), alone["decoder"], params)
    out["moved"] = max(jax.tree.leaves(moved))
    out["layers"] = layer * config.num_layers
    out["tables"] = sum(x.nbytes for x in jax.tree.leaves(params)) - out["layers"]
    print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight():
    return devices.run(EIGHT_DEVICES)


def test_updates_on_meshes_equal_the_update_on_one_device(eight):
    assert len(eight["errors"]) == 5 and eight["moved"] > 1e-3
    np.testing.assert_array_less(list(eight["errors"].values()), 1e-5)


def test_layers_are_gathered_when_they_come_and_gradients_reduced_once(eight):
    facts, layers = eight["facts"]["fsdp=8"], eight["layers"]
    assert facts["exact"] and set(facts["bytes"]) == {"all-gather", "all-reduce"}
    # Once forward, once backward for the rematerialised layer.
    assert facts["bytes"]["all-gather"] == 2 * layers
    assert facts["bytes"]["all-reduce"] == layers
    left = eight["facts"]["fsdp=8 left to the compiler"]
    assert facts["temporary"] < 0.6 * left["temporary"]


def test_data_parallel_layers_send_their_gradients_alone(eight):
    facts = eight["facts"]["data=8"]
    assert set(facts["bytes"]) <= {"all-reduce"}
    # In the loop over layers or after it, each once; beside them the tables and small sums.
    assert eight["layers"] <= facts["reduced"] <= eight["layers"] + eight["tables"] + 4096
