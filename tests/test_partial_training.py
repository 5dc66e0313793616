"""Training a part of the parameters: the split, optimizers, the compiled step, checkpoints."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax import models, train
from pgjax.models import lora

CONFIG = models.DecoderConfig(
    vocab_size=13,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=40,
    max_length=16,
)
PATTERNS = ("decoder/layers/mlp/*", "*norm*", "value_head/*")


@functools.cache
def build():
    decoder, params = models.init(CONFIG, jax.random.key(0))
    head = models.value_head_init(CONFIG, jax.random.key(1))
    return decoder, {"decoder": params, "value_head": head}


def rollout():
    rng = np.random.default_rng(0)
    mask = np.arange(7) >= rng.integers(2, 5, (6, 1))
    return pg.types.Rollout(
        tokens=jnp.asarray(rng.integers(0, 13, (6, 7)), jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(np.where(mask, -2.5, 0.0), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=6), jnp.float32),
        group_ids=jnp.asarray(np.repeat(np.arange(2), 3), jnp.int32),
    )


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def paths(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves(tree)}


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


class Pair(NamedTuple):
    left: object
    right: object


# --- the split ------------------------------------------------------------------------------------


def test_a_mask_has_true_where_a_pattern_matches():
    _, params = build()
    mask = train.trainable_mask(params, PATTERNS)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    chosen = {jax.tree_util.keystr(p, simple=True, separator="/") for p, on in leaves(mask) if on}
    assert chosen == {
        "decoder/layers/mlp/gate",
        "decoder/layers/mlp/up",
        "decoder/layers/mlp/down",
        "decoder/layers/attention_norm",
        "decoder/layers/mlp_norm",
        "decoder/norm",
        "value_head/kernel",
        "value_head/bias",
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["decoder/layers/mlp/*", "*/gates"],
            r"'\*/gates' matches none of the leaves: decoder/emb",
        ),
        (["DECODER/*"], "'DECODER/.*' matches none"),
        ("decoder/*", "patterns: expected a sequence of patterns, got 'decoder/"),
        ([], "patterns: expected at least one pattern, got none"),
        ([3], r"patterns: expected a sequence of patterns, got \[3\]"),
    ],
)
def test_bad_patterns_are_named(patterns, message):
    _, params = build()
    with pytest.raises(ValueError, match=message):
        train.partition(params, patterns)


def test_the_parts_are_disjoint_and_combine_to_the_whole():
    _, params = build()
    trainable, frozen = train.partition(params, PATTERNS)
    assert len(paths(trainable)) == 8
    assert paths(trainable) | paths(frozen) == paths(params)
    assert not paths(trainable) & paths(frozen)
    whole = train.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (whole, params)), strict=True))
    assert train.combine(params, None) is params


def test_any_tree_can_be_split():
    tree = Pair(
        left=[jnp.zeros(1), {"a": jnp.ones(2), "b": (jnp.ones(3), None)}], right=jnp.ones(4)
    )
    trainable, frozen = train.partition(tree, ["left/1/b/*", "right"])
    assert [x.size for x in jax.tree.leaves(trainable)] == [3, 4]
    whole = train.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, whole, tree)


def test_combining_takes_what_one_of_the_two_has():
    one = {"decoder": {"a": jnp.zeros(1)}, "head": jnp.ones(2)}
    assert set(train.combine(one, {"decoder": {"b": jnp.zeros(3)}})["decoder"]) == {"a", "b"}
    with pytest.raises(ValueError, match="trainable, frozen: both have a value at decoder/a"):
        train.combine(one, {"decoder": {"a": jnp.zeros(1)}})
    with pytest.raises(ValueError, match="both have a value at decoder"):
        train.combine(one, {"decoder": jnp.zeros(1)})
    with pytest.raises(ValueError, match="differ at the root"):
        train.combine([None, jnp.zeros(1)], (jnp.zeros(1), None))


def test_adapters_norms_and_a_head_train_together():
    """Adapters go onto frozen matrices, everything else stands beside what is frozen."""
    decoder, params = build()
    trainable, frozen = train.partition(params, ["*norm*", "value_head/*"])
    adapters = lora.init(params["decoder"], jax.random.key(0), rank=2, alpha=4)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    trained = {
        "decoder": train.combine(adapters, jax.tree.map(lambda x: x * 1.5, trainable["decoder"])),
        "value_head": trainable["value_head"],
    }
    whole = train.combine(trained, frozen)
    merged = lora.merge(params["decoder"], adapters)
    expected = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1.5 if "norm" in jax.tree_util.keystr(path) else x, merged
    )
    tokens = rollout().tokens
    np.testing.assert_allclose(
        decoder.apply(whole["decoder"], tokens), decoder.apply(expected, tokens), atol=1e-3
    )
    with pytest.raises(ValueError, match="adapters: decoder/layers/mlp/up has a of shape"):
        train.combine(
            {"decoder": {"layers": {"mlp": {"up": adapters["layers"]["mlp"]["down"]}}}}, params
        )


# --- optimizers -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2),
    "lion": optax.lion(1e-3),
    "clipped": optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-2)),
    "accumulating": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


def quadratic(params):
    targets = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)), params)
    losses = jax.tree.map(lambda x, t: jnp.sum((x.ravel() - t) ** 2), params, targets)
    return sum(jax.tree.leaves(losses))


def small_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": {"kernel": draw(4, 6), "bias": draw(6)}, "b": {"kernel": draw(6, 2)}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_ways_train_the_part_as_if_it_were_all_there_is(name):
    """The frozen leaves neither move nor leave a trace in what the others do."""
    optimizer, params = OPTIMIZERS[name], small_params()
    patterns = ["a/kernel", "b/*"]
    trainable, frozen = train.partition(params, patterns)

    def steps(optimizer, start, loss):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(x, state):
            updates, state = optimizer.update(jax.grad(loss)(x), state, x)
            return optax.apply_updates(x, updates), state

        x, state = copied(start), optimizer.init(start)
        for _ in range(4):
            x, state = step(x, state)
        return x, state

    alone = {"a": {"kernel": params["a"]["kernel"]}, "b": params["b"]}
    expected, alone_state = steps(optimizer, alone, quadratic)
    split, split_state = steps(optimizer, trainable, lambda x: quadratic(train.combine(x, frozen)))
    masked, masked_state = steps(train.only(optimizer, patterns), params, quadratic)
    for found in (split, masked):
        for where in (("a", "kernel"), ("b", "kernel")):
            np.testing.assert_allclose(
                found[where[0]][where[1]], expected[where[0]][where[1]], rtol=1e-5, atol=1e-7
            )
            assert (found[where[0]][where[1]] != params[where[0]][where[1]]).any()
    assert split["a"]["bias"] is None
    np.testing.assert_array_equal(masked["a"]["bias"], params["a"]["bias"])
    sizes = [sorted(x.size for x in jax.tree.leaves(s)) for s in (alone_state, split_state)]
    assert sizes[0] == sizes[1] == sorted(x.size for x in jax.tree.leaves(masked_state))


def test_only_names_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="'c/.*' matches none of the leaves: a/bias"):
        train.only(optax.sgd(1.0), ["c/*"]).init(small_params())


# --- updates --------------------------------------------------------------------------------------


def updated(params, frozen, optimizer, *, steps=1):
    decoder, _ = build()
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.ppo(), optimizer
    )
    state = train.init(copied(params), optimizer, jax.random.key(0))
    for _ in range(steps):
        state, metrics = update(state, rollout(), None, frozen)
    assert update._cache_size() == 1
    return state, metrics


@pytest.mark.usefixtures("empty_caches")
def test_an_update_moves_the_part_as_a_whole_update_would():
    _, params = build()
    trainable, frozen = train.partition(params, PATTERNS)
    before = jax.tree.map(np.asarray, frozen)
    whole, _ = updated(params, None, optax.sgd(0.1))
    part, metrics = updated(trainable, frozen, optax.sgd(0.1))
    expected, _ = train.partition(whole.params, PATTERNS)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), part.params, expected
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), part.params, trainable)
    assert min(jax.tree.leaves(moved)) > 0
    jax.tree.map(np.testing.assert_array_equal, frozen, before)  # still there: not donated
    # The gradient that is measured is the trained part's.
    gradient = jax.tree.map(lambda a, b: (b - a) / 0.1, part.params, trainable)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-3)


def test_the_compiled_step_has_no_gradient_of_what_is_frozen():
    """42 tokens: no activation has as many entries as a matrix, whose product would show."""
    decoder, params = build()
    optimizer = optax.adam(1e-3)
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.grpo(), optimizer
    )

    def sizes(trainable, frozen):
        state = train.init(trainable, optimizer, jax.random.key(0))
        compiled = update.lower(state, rollout(), None, frozen).compile()
        found = re.findall(r"= \w+\[([\d,]*)\][^=]* dot\(", compiled.as_text())
        numbers = {int(np.prod([int(n) for n in s.split(",")])) for s in found if s}
        return numbers, compiled.memory_analysis().output_size_in_bytes

    mlp, query, embedding = 16 * 40, 16 * 16, 13 * 16
    whole, whole_bytes = sizes({"decoder": params["decoder"]}, None)
    trainable, frozen = train.partition({"decoder": params["decoder"]}, ["*/mlp/*"])
    part, part_bytes = sizes(trainable, frozen)
    assert {mlp, query, embedding} <= whole
    assert mlp in part and not {query, embedding} & part
    assert part_bytes < 3 * 4 * 2 * 3 * mlp + 1000 < whole_bytes


@pytest.mark.usefixtures("empty_caches")
def test_checkpoints_hold_the_trained_part_and_restore_into_it(tmp_path):
    _, params = build()
    trainable, frozen = train.partition(params, PATTERNS)
    optimizer = optax.adam(1e-2)
    state, _ = updated(trainable, frozen, optimizer)
    with train.checkpoints.open(tmp_path) as saved:
        saved.save(1, state)
        saved.wait()
        fresh = train.init(copied(trainable), optimizer, jax.random.key(9))
        restored, _ = saved.restore(like=fresh)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    import orbax.checkpoint as ocp

    stored = ocp.StandardCheckpointer().restore(tmp_path / "1" / "state")
    count = sum(x.size for x in jax.tree.leaves(trainable))
    # Parameters and two moments; Adam's count, the step and the key's two words.
    assert sum(np.size(x) for x in jax.tree.leaves(stored)) == 3 * count + 4


EIGHT_DEVICES = """
    import json
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import models, parallel, train

    config = models.DecoderConfig(vocab_size=16, hidden_size=16, num_layers=2, num_heads=2,
                                  mlp_size=32, max_length=16)
    decoder, params = models.init(config, jax.random.key(0))
    patterns = ["*/mlp/*", "*norm*"]
    rng = np.random.default_rng(0)
    rollout = pg.types.Rollout(
        tokens=rng.integers(0, 16, (8, 9)).astype(np.int32), mask=np.ones((8, 9), bool),
        behavior_logprobs=np.full((8, 9), -2.7, np.float32),
        rewards=rng.normal(size=8).astype(np.float32),
        group_ids=np.repeat(np.arange(2), 4).astype(np.int32))
    # The usual eps would divide gradients that are zero but for rounding by their own size.
    optimizer = optax.adam(1e-2, eps=1e-3)

    def run(mesh):
        whole, batch = {"decoder": jax.tree.map(jnp.copy, params)}, rollout
        if mesh is not None:
            where = parallel.shardings(decoder.logical_axes(), mesh, shapes=params)
            whole = {"decoder": parallel.shard(params, where)}
            batch = parallel.shard(rollout, parallel.batch_sharding(mesh))
        trainable, frozen = train.partition(whole, patterns)
        state = train.init(trainable, optimizer, jax.random.key(0))
        update = train.make_update(
            train.language_model_outputs(decoder), pg.objectives.grpo(), optimizer,
            state_shardings=None if mesh is None else train.shardings(state))
        for _ in range(2):
            state, _ = update(state, batch, None, frozen)
        return state, update._cache_size()

    mesh = parallel.make_mesh("fsdp=4,tensor=2")
    (alone, _), (state, compilations) = run(None), run(mesh)
    up = state.opt_state[0].mu["decoder"]["layers"]["mlp"]["up"]
    print(json.dumps({
        "difference": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in
                          zip(jax.tree.leaves(alone.params), jax.tree.leaves(state.params))),
        "spec": str(tuple(up.sharding.spec)),
        "compilations": compilations,
    }))
    """


def test_sharded_partial_training_equals_unsharded():
    out = devices.run(EIGHT_DEVICES)
    assert out["difference"] < 2e-5
    assert out["spec"] == "(None, 'fsdp', 'tensor')" and out["compilations"] == 1
