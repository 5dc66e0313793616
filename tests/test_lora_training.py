"""Training of adapters alone: gradients, the compiled step, runs, checkpoints, shardings."""

from __future__ import annotations

import functools
import math
import re

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax import models, train
from pgjax.models import lora

BASE = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_size": 40,
    "max_length": 32,
}


def randomized(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(scale * rng.normal(size=leaf.shape) + offset, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.cache
def build():
    config = models.DecoderConfig(**BASE)
    return models.FunctionalDecoder(config), randomized(models.abstract_params(config))


@functools.cache
def adapters_and_rollout():
    """Adapters that do something, and sequences with log-probs near those they give."""
    decoder, params = build()
    targets = ["*/query", "*/output", "*/down"]
    fresh = lora.init(params, jax.random.key(0), rank=3, alpha=6, targets=targets)
    adapters = randomized(fresh, 5)
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 13, (8, 9)), jnp.int32)
    mask = jnp.asarray((np.arange(9) >= 3) & (np.arange(9) < rng.integers(5, 10, (8, 1))))
    with_adapters = lora.attach(params, adapters)
    logits = jax.jit(lambda p: decoder.logits(p, decoder.apply(p, tokens)))(with_adapters)
    noise = jnp.asarray(0.05 * rng.normal(size=mask.shape), jnp.float32)
    logprobs = pg.logprobs.from_logits(logits, tokens) + noise
    return adapters, pg.types.Rollout(
        tokens=tokens,
        mask=mask,
        behavior_logprobs=jnp.where(mask, logprobs, 0.0),
        rewards=jnp.asarray(rng.normal(size=8), jnp.float32),
        group_ids=jnp.asarray(np.repeat(np.arange(2), 4), jnp.int32),
    )


def num_bytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def test_an_update_is_the_gradient_through_the_merged_model():
    decoder, params = build()
    adapters, rollout = adapters_and_rollout()
    optimizer = optax.sgd(1.0)

    def updated(**options):
        update = train.make_update(
            train.language_model_outputs(decoder), pg.objectives.grpo(), optimizer, **options
        )
        state = train.init({"decoder": copied(adapters)}, optimizer, jax.random.key(0))
        state, metrics = update(state, rollout, None, {"decoder": params})
        return state.params["decoder"], metrics

    found, metrics = updated()

    def loss(adapters):
        merged = dict(
            params,
            layers={k: dict(v) if type(v) is dict else v for k, v in params["layers"].items()},
        )
        for family, leaf, sums in (
            ("attention", "query", "lhr,lrnd->lhnd"),
            ("attention", "output", "lndr,lrh->lndh"),
            ("mlp", "down", "lfr,lrh->lfh"),
        ):
            adapter = adapters["layers"][family][leaf]
            product = jnp.einsum(sums, adapter.a, adapter.b)
            merged["layers"][family][leaf] = params["layers"][family][leaf] + 2.0 * product
        logits = decoder.logits(merged, decoder.apply(merged, rollout.tokens))
        logprobs = pg.logprobs.from_logits(logits, rollout.tokens)
        advantages = pg.advantages.group_normalize(rollout.rewards, rollout.group_ids, num_groups=2)
        ratio = pg.surrogates.importance_ratio(logprobs, rollout.behavior_logprobs)
        losses = pg.surrogates.clipped(ratio, advantages[:, None], low=0.2, high=0.2)
        return pg.aggregate.sequence_mean_token_mean(losses, rollout.mask)

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters)
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-3)
    assert float(optax.tree.norm(gradient)) > 1e-2
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - g, rtol=2e-3, atol=2e-4),
        found,
        adapters,
        gradient,
    )
    # Accumulated and trimmed, it is the same.
    parts, _ = updated(num_microbatches=4, widths=(6,))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, parts)


def products(compiled):
    """The number of entries of each product's result."""
    shapes = re.findall(r"= \w+\[([\d,]*)\][^=]* dot\(", compiled.as_text())
    return {math.prod(int(n) for n in shape.split(",")) for shape in shapes if shape}


def compiled_update(decoder, trained, frozen):
    """Of three sequences of seven tokens; nothing is allocated or run."""
    optimizer = optax.adam(1e-3)
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.grpo(), optimizer
    )
    state = jax.eval_shape(
        lambda p: train.TrainState(
            params=p, opt_state=optimizer.init(p), step=jnp.int32(0), key=jax.random.key(0)
        ),
        trained,
    )
    rollout = jax.eval_shape(
        lambda: pg.types.Rollout(
            tokens=jnp.zeros((3, 7), jnp.int32),
            mask=jnp.ones((3, 7), bool),
            behavior_logprobs=jnp.zeros((3, 7)),
            rewards=jnp.zeros(3),
            group_ids=jnp.zeros(3, jnp.int32),
        )
    )
    return update.lower(state, rollout, None, frozen).compile()


def test_the_compiled_step_has_no_gradient_of_a_frozen_matrix():
    """A matrix' gradient is a product over all tokens whose result has the matrix' size."""
    config = models.DecoderConfig(**{**BASE, "hidden_size": 64, "mlp_size": 640})
    decoder, params = models.FunctionalDecoder(config), models.abstract_params(config)
    adapters = jax.eval_shape(
        lambda p: lora.init(p, jax.random.key(0), rank=2, alpha=4, targets=["*/query", "*/mlp/*"]),
        params,
    )
    sizes = {"query": 64 * 4 * 6, "key": 64 * 2 * 6, "up": 64 * 640, "embedding": 64 * 13}
    whole = compiled_update(decoder, {"decoder": params}, None)
    part = compiled_update(decoder, {"decoder": adapters}, {"decoder": params})
    for name, size in sizes.items():
        assert size in products(whole), name
        assert size not in products(part), name
    # The base is an argument and not a constant of the program; the state alone is written back.
    base, trained = num_bytes(params), num_bytes(adapters)
    whole, part = (c.memory_analysis() for c in (whole, part))
    assert 0 < part.argument_size_in_bytes - base - 3 * trained < 2000
    assert 0 < part.output_size_in_bytes - 3 * trained < 2000
    assert 0 < whole.output_size_in_bytes - 3 * base < 2000
    # Beside the activations, which both have, the whole one holds a gradient of the base.
    assert whole.temp_size_in_bytes - part.temp_size_in_bytes > 0.8 * base


class Prompts:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        tokens = np.array([[5, 12, 6, 1], [7, 3, 3, self.position % 13]], np.int32)
        return {"prompts": tokens, "prompt_lengths": np.full(2, 4, np.int32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@functools.cache
def text_step():
    """A step that rewards every token 3, of adapters and a value head; the base is frozen."""
    decoder, params = build()
    frozen = {"decoder": copied(params)}
    fresh = {
        "decoder": lora.init(params, jax.random.key(0), rank=2, alpha=4),
        "value_head": models.value_head_init(decoder.config, jax.random.key(0)),
    }
    optimizer = optax.adam(3e-2)
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.ppo(), optimizer, num_minibatches=2
    )

    def reward(samples, batch, key):
        return (samples.mask & (samples.tokens == 3)).sum(-1).astype(jnp.float32)

    step = train.make_text_step(
        decoder,
        update,
        reward,
        num_samples=16,
        max_new_tokens=6,
        stop_tokens=(0,),
        frozen=frozen,
    )
    return fresh, frozen, optimizer, update, step


def start():
    fresh, _, optimizer, _, _ = text_step()
    return train.init(copied(fresh), optimizer, jax.random.key(1))


@pytest.mark.usefixtures("empty_caches")
def test_a_run_trains_and_saves_the_adapters_alone_and_resumes(tmp_path):
    fresh, frozen, _, update, step = text_step()
    _, params = build()

    def run(directory, stops):
        for stop in stops:
            state, batches = start(), Prompts()
            with train.checkpoints.open(directory) as saved:
                if saved.latest_step() is not None:
                    state, metadata = saved.restore(like=state)
                    batches.set_state(metadata["batches"])
                state = train.fit(
                    step, state, batches, num_steps=stop, phase="rl", checkpoints=saved
                )
        return state

    straight, broken = run(tmp_path / "a", [4]), run(tmp_path / "b", [2, 4])
    jax.tree.map(np.testing.assert_array_equal, straight.params, broken.params)
    assert update._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, frozen["decoder"], params)  # not donated either
    assert jax.tree.structure(straight.params) == jax.tree.structure(fresh)
    moments = straight.opt_state[0]
    assert jax.tree.structure(moments.mu) == jax.tree.structure(fresh)
    count = sum(x.size for x in jax.tree.leaves(fresh))
    assert sum(x.size for x in jax.tree.leaves(straight.opt_state)) == 2 * count + 1
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), straight.params, fresh)
    assert min(jax.tree.leaves(moved)) > 0
    # On disk, too: three arrays of each of the adapters' and the head's, a count, a step, a key.
    import orbax.checkpoint as ocp

    stored = ocp.StandardCheckpointer().restore(tmp_path / "a" / "4" / "state")
    assert sum(np.size(x) for x in jax.tree.leaves(stored)) == 3 * count + 4


def test_adapters_learn_what_they_are_rewarded_for():
    _, _, _, _, step = text_step()
    state, batches, rewards = start(), Prompts(), []
    for _ in range(30):
        state, metrics = step(state, next(batches))
        rewards.append(float(metrics["reward"]))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 1.0


EIGHT_DEVICES = """
    import json
    import jax, jax.numpy as jnp, numpy as np, optax
    import pgjax as pg
    from pgjax import models, parallel, train
    from pgjax.models import lora

    config = models.DecoderConfig(vocab_size=16, hidden_size=16, num_layers=2, num_heads=4,
                                  num_kv_heads=2, mlp_size=32, max_length=16)
    decoder, params = models.init(config, jax.random.key(0))
    adapters = lora.init(params, jax.random.key(1), rank=2, alpha=4)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    rng = np.random.default_rng(0)
    mask = np.arange(12) >= rng.integers(2, 5, (16, 1))
    rollout = pg.types.Rollout(
        tokens=rng.integers(0, 16, (16, 12)).astype(np.int32), mask=mask,
        behavior_logprobs=np.where(mask, -2.7, 0).astype(np.float32),
        rewards=rng.normal(size=16).astype(np.float32),
        group_ids=np.repeat(np.arange(4), 4).astype(np.int32))
    optimizer = optax.adam(1e-2)

    def run(mesh):
        trained, frozen, batch = {"decoder": adapters}, {"decoder": params}, rollout
        trained = jax.tree.map(jnp.copy, trained)
        if mesh is not None:
            axes = decoder.logical_axes()
            frozen = {"decoder": parallel.shard(
                params, parallel.shardings(axes, mesh, shapes=params))}
            trained = {"decoder": parallel.shard(adapters, parallel.shardings(
                lora.logical_axes(axes, adapters), mesh, shapes=adapters))}
            batch = parallel.shard(rollout, parallel.batch_sharding(mesh))
        state = train.init(trained, optimizer, jax.random.key(0))
        update = train.make_update(
            train.language_model_outputs(decoder), pg.objectives.grpo(kl_coefficient=0.1),
            optimizer, state_shardings=train.shardings(state) if mesh is not None else None)
        for _ in range(3):
            state, metrics = update(state, batch, frozen, frozen)
        assert update._cache_size() == 1
        return state, float(metrics["loss"]), trained

    alone, loss, _ = run(None)
    out = {"losses": [loss]}
    out["differences"], out["specs"] = [], []
    for spec in ("data=2,fsdp=2,tensor=2",):
        mesh = parallel.make_mesh(spec)
        state, loss, _ = run(mesh)
        out["losses"].append(loss)
        out["differences"].append(max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max())
            for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(state.params))))
        query = state.params["decoder"]["layers"]["attention"]["query"]
        out["specs"].append([str(tuple(query.a.sharding.spec)), str(tuple(query.b.sharding.spec))])
        mu = state.opt_state[0].mu["decoder"]["layers"]["attention"]["query"].b
        out["specs"][-1].append(str(tuple(mu.sharding.spec)))
        only = {"layers": {"attention": {"query": query}}}
        placed = parallel.shardings(decoder.logical_axes(), mesh, shapes=params)
        merged = lora.merge(parallel.shard(params, placed), only)
        expected = lora.merge(params, jax.tree.map(np.asarray, only))
        out["differences"].append(max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max())
            for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(expected))))
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), alone.params["decoder"], adapters)
    out["moved"] = min(jax.tree.leaves(moved))
    print(json.dumps(out))
    """


def test_sharded_training_equals_unsharded():
    out = devices.run(EIGHT_DEVICES)
    assert max(out["differences"]) < 2e-5 < 1e-2 < out["moved"]
    np.testing.assert_allclose(out["losses"], out["losses"][0], atol=1e-5)
    for specs in out["specs"]:
        assert specs == [
            "(None, 'fsdp', None)",
            "(None, None, 'tensor', None)",
            "(None, None, 'tensor', None)",
        ]
